"""Binding the arguments of a Triton kernel as Triton's launcher does.

What a call passes decides what is compiled: types, integers that are 1 or multiples of 16, aligned
pointers, buffers small enough for 32-bit offsets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cdna_emulator.errors import ArgumentError

#: Pointers count as aligned from this many bytes on, and integers as multiples of it.
ALIGNMENT = 16
#: Buffers up to this size may be addressed with 32-bit offsets.
_SMALL_BUFFER = 2**31 - 1

_POINTEE = {
    "bool": "i1",
    "int8": "i8",
    "uint8": "u8",
    "int16": "i16",
    "uint16": "u16",
    "int32": "i32",
    "uint32": "u32",
    "int64": "i64",
    "uint64": "u64",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
    "float8_e4m3fn": "fp8e4nv",
    "float8_e5m2": "fp8e5",
    "float8_e4m3fnuz": "fp8e4b8",
    "float8_e5m2fnuz": "fp8e5b16",
}


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a kernel, as far as binding needs to know it."""

    name: str
    is_constexpr: bool
    type: str
    has_default: bool
    default: Any
    specialize: bool
    align: bool


@dataclass(frozen=True)
class Specialisation:
    """What a set of arguments makes of a kernel's signature."""

    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[str, list[list[Any]]]
    #: Values that are passed at run time, in order.
    passed: tuple[Any, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        """What two calls must share to run the same machine code."""
        return repr(self.signature), repr(self.constants), repr(self.attributes)


def bind(
    name: str,
    parameters: Sequence[Parameter],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the value of each parameter, and the keyword arguments that are none."""
    if len(args) > len(parameters):
        raise ArgumentError(
            f"{name}: at most {len(parameters)} arguments must be passed, got {len(args)}"
        )
    values = {parameter.name: value for parameter, value in zip(parameters, args, strict=False)}
    options: dict[str, Any] = {}
    known = {parameter.name for parameter in parameters}
    for key, value in kwargs.items():
        if key in values:
            raise ArgumentError(f"{name}: argument {key} must be passed once, got it twice")
        (values if key in known else options)[key] = value
    for parameter in parameters:
        if parameter.name not in values:
            if not parameter.has_default:
                raise ArgumentError(f"{name}: argument {parameter.name} must be passed, got none")
            values[parameter.name] = parameter.default
    return {parameter.name: values[parameter.name] for parameter in parameters}, options


def specialise(
    name: str, parameters: Sequence[Parameter], values: Mapping[str, Any]
) -> Specialisation:
    """Return the signature that Triton would compile for these values."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[str, list[list[Any]]] = {}
    passed: list[Any] = []
    for parameter in parameters:
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = _constant(value)
            continue
        kind, hints = _classify(f"{name}: argument {parameter.name}", parameter, value)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
            continue
        if hints:
            attributes[parameter.name] = hints
        passed.append(value)
    return Specialisation(signature, constants, attributes, tuple(passed))


def _classify(where: str, parameter: Parameter, value: Any) -> tuple[str, list[list[Any]]]:
    """Return the type of a run-time argument and what the compiler may assume of it."""
    hints: list[list[Any]] = []
    if isinstance(value, bool):
        return parameter.type or "u1", hints
    if isinstance(value, int):
        if parameter.specialize and value == 1:
            return "constexpr", hints
        if parameter.specialize and parameter.align and value % ALIGNMENT == 0:
            hints.append(["tt.divisibility", ALIGNMENT])
        return parameter.type or _integer_type(where, value), hints
    if isinstance(value, float):
        return parameter.type or "fp32", hints
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise ArgumentError(
            f"{where} must be a tensor, an array, int, float, bool or None, "
            f"got {type(value).__name__}"
        )
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in _POINTEE:
        raise ArgumentError(f"{where} must be of a dtype in {', '.join(_POINTEE)}, got {dtype}")
    if parameter.specialize and parameter.align and _address(value) % ALIGNMENT == 0:
        hints.append(["tt.divisibility", ALIGNMENT])
    if _storage_bytes(value) <= _SMALL_BUFFER:
        # Lets the compiler use buffer instructions, as it does for real tensors.
        hints.append(["tt.pointer_range", 32])
    return "*" + _POINTEE[dtype], hints


def _integer_type(where: str, value: int) -> str:
    if -(2**31) <= value < 2**31:
        return "i32"
    if -(2**63) <= value < 2**63:
        return "i64"
    if 0 <= value < 2**64:
        return "u64"
    raise ArgumentError(f"{where} must fit in 64 bits, got {value}")


def _constant(value: Any) -> Any:
    """Replace a dtype of this process's Triton, which the worker's may not be."""
    if type(value).__module__.startswith("triton.") and type(value).__name__ == "dtype":
        return ("triton dtype", value.name)
    return value


def _address(value: Any) -> int:
    pointer = getattr(value, "data_ptr", None)
    return int(pointer() if pointer is not None else value.ctypes.data)


def _storage_bytes(value: Any) -> int:
    storage = getattr(value, "untyped_storage", None)
    return int(storage().size() if storage is not None else value.nbytes)
