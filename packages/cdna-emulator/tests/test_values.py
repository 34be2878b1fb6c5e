"""Words of the command line become arrays and values, or errors that say what is accepted."""

from __future__ import annotations

import numpy as np
import pytest

from cdna_emulator.errors import ArgumentError
from cdna_emulator.values import DTYPES, parse_value


@pytest.fixture
def generator(seed):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_of_every_dtype(generator, dtype):
    zeros = parse_value(f"zeros:{dtype}:3,4", generator)
    assert (zeros.shape, zeros.dtype, zeros.any()) == ((3, 4), DTYPES[dtype], False)
    random = parse_value(f"random:{dtype}:1000", generator)
    assert (random.shape, random.dtype) == ((1000,), DTYPES[dtype])
    assert len(np.unique(random)) > 100
    count = parse_value(f"arange:{dtype}:2,5", generator)
    assert count.dtype == DTYPES[dtype]
    if dtype == "bf16":
        count = (count.astype(np.uint32) << 16).view(np.float32)
    assert count.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_random_bf16_are_normal_numbers(generator):
    bits = parse_value("random:bf16:10000", generator)
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    assert abs(values.mean()) < 0.1
    assert abs(values.std() - 1) < 0.1


def test_random_integers_fill_their_range(generator):
    values = parse_value("random:i8:10000", generator)
    assert (values.min(), values.max()) == (-128, 127)


def test_a_seed_repeats(seed):
    first, second = (parse_value("random:f32:16", np.random.default_rng(seed)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("int:5", 5),
        ("int:-7", -7),
        ("int:0x10", 16),
        ("float:0.5", 0.5),
        ("float:-1e-3", -1e-3),
        ("float:inf", float("inf")),
        ("null", None),
    ],
)
def test_values(generator, text, value):
    found = parse_value(text, generator)
    assert found == value
    assert type(found) is type(value)


def test_files(generator, tmp_path):
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    np.save(tmp_path / "x.npy", array)
    found = parse_value(f"file:{tmp_path / 'x.npy'}", generator)
    np.testing.assert_array_equal(found, array)
    assert found.dtype == np.int16
    # A path may have colons.
    np.save(tmp_path / "a:b.npy", array)
    assert parse_value(f"file:{tmp_path}/a:b.npy", generator).shape == (2, 3)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("zeros:f8:4", "DTYPE must be one of f64, f32"),
        ("zeros:f32", "SHAPE"),
        ("zeros:f32:4:4", "SHAPE"),
        ("zeros:f32:4,x", "SHAPE"),
        ("arange:f32:-1", "SHAPE"),
        ("zeros:f32:-4", "SHAPE"),
        ("int:five", "five"),
        ("int:", "int:N"),
        ("float:", "float:X"),
        ("file:/nowhere/x.npy", "/nowhere/x.npy"),
        ("null:4", "or null"),
        ("5", "int:N"),
        ("", "int:N"),
    ],
)
def test_refused(generator, text, reason):
    with pytest.raises(ArgumentError) as caught:
        parse_value(text, generator)
    message = str(caught.value)
    assert message.startswith("argument must be zeros|random|arange:DTYPE:SHAPE")
    assert repr(text) in message
    assert reason in message


def test_pickled_files_are_not_loaded(generator, tmp_path):
    np.save(tmp_path / "x.npy", np.array([{}], object))
    with pytest.raises(ArgumentError, match="argument must be"):
        parse_value(f"file:{tmp_path / 'x.npy'}", generator)
