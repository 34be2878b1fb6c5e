"""The process that compiles Triton and Gluon kernels; `cdna_emulator.triton_bridge` starts it.

It runs as a plain file in a Python of its own: a test process often has Triton's interpreter
switched on, which replaces the functions that the compiler needs, and it can hold only one version
of Triton. It imports nothing but Triton and the standard library.

One request is a pickled dictionary behind its length in 8 bytes, and so is each answer:
``{"ok": value}`` or ``{"error": text}``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import re
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import IO, Any

_LENGTH = struct.Struct("<Q")


def read_message(stream: IO[bytes]) -> Any:
    """Return the next message of a stream; EOFError when it is closed."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError("the other side closed the pipe")
    (length,) = _LENGTH.unpack(head)
    body = stream.read(length)
    if len(body) < length:
        raise EOFError("the other side closed the pipe in a message")
    return pickle.loads(body)


def write_message(stream: IO[bytes], message: Any) -> None:
    """Send one message."""
    body = pickle.dumps(message)
    stream.write(_LENGTH.pack(len(body)) + body)
    stream.flush()


#: Set in the environment of a compiler process: nothing it imports may start another.
INSIDE = "CDNA_EMULATOR_COMPILER"


def load_module(where: str) -> ModuleType:
    """Import a module by dotted name, or by path when it ends in ``.py``."""
    if not where.endswith(".py"):
        return importlib.import_module(where)
    path = Path(where)
    # A name of its own for every path: two test folders may have files of one name.
    name = "_kernels_" + re.sub(r"\W", "_", str(path.with_suffix("")))
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{where} cannot be loaded as a module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # Kernel files import their neighbours as scripts do.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except SystemExit:
        # A script came to its first launch; the kernels above it are defined.
        return module
    except BaseException:
        del sys.modules[name]
        raise
    return module


def load_kernel(where: str, attribute: str) -> Any:
    """Return a jitted function; wrappers like the autotuner are taken off."""
    kernel: Any = load_module(where)
    for part in attribute.split("."):
        kernel = getattr(kernel, part)
    while not hasattr(kernel, "params") and hasattr(kernel, "fn"):
        kernel = kernel.fn
    if not hasattr(kernel, "params"):
        raise TypeError(
            f"kernel {attribute} of {where} must be decorated with @triton.jit or @gluon.jit, "
            f"got {type(kernel).__name__}"
        )
    return kernel


def describe(where: str, attribute: str) -> dict[str, Any]:
    """Return what binding arguments needs to know of a kernel's parameters."""
    import triton

    parameters = []
    for parameter in load_kernel(where, attribute).params:
        default = parameter.default if parameter.has_default else None
        parameters.append(
            {
                "name": parameter.name,
                "is_constexpr": parameter.is_constexpr,
                "type": "" if parameter.is_constexpr else parameter.annotation_type,
                "has_default": parameter.has_default,
                "default": getattr(default, "value", default),
                "specialize": not parameter.do_not_specialize,
                "align": not parameter.do_not_specialize_on_alignment,
            }
        )
    return {"parameters": parameters, "version": triton.__version__}


def compile_kernel(
    where: str,
    attribute: str,
    arch: str,
    signature: dict[str, str],
    constants: dict[str, Any],
    attributes: dict[str, list[list[Any]]],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Compile for an AMD architecture and return the code object with what a launch needs."""
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = load_kernel(where, attribute)
    if getattr(kernel, "is_gluon", lambda: False)():
        from triton.experimental.gluon._runtime import GluonASTSource as Source
    else:
        from triton.compiler import ASTSource as Source
    positions = {name: index for index, name in enumerate(kernel.arg_names)}
    constants = {name: _constant(value) for name, value in constants.items()}
    source = Source(
        kernel,
        signature,
        constexprs=constants,
        attrs={(positions[name],): value for name, value in attributes.items()},
    )
    compiled = triton.compile(source, target=GPUTarget("hip", arch, 64), options=options)
    metadata = compiled.metadata
    return {
        "code_object": compiled.asm["hsaco"],
        "assembly": compiled.asm["amdgcn"],
        "name": metadata.name,
        "shared": metadata.shared,
        "num_warps": metadata.num_warps,
        "global_scratch": getattr(metadata, "global_scratch_size", 0) or 0,
        "profile_scratch": getattr(metadata, "profile_scratch_size", 0) or 0,
    }


def _constant(value: Any) -> Any:
    """Turn the stand-in for a dtype into this Triton's dtype."""
    if isinstance(value, tuple) and len(value) == 2 and value[0] == "triton dtype":
        from triton import language as tl

        return tl.dtype(value[1])
    return value


OPERATIONS: dict[str, Callable[..., Any]] = {"describe": describe, "compile_kernel": compile_kernel}


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer requests until the pipe is closed."""
    while True:
        try:
            request = read_message(requests)
        except EOFError:
            return
        try:
            answer = {"ok": OPERATIONS[request.pop("op")](**request)}
        except Exception as exc:
            answer = {"error": f"{type(exc).__name__}: {exc}\n{traceback.format_exc()}"}
        write_message(answers, answer)


def main() -> None:
    """Serve on stdin and stdout; whatever the compiler prints goes to stderr."""
    # The folder of this file is first on the path and its module names are not meant for here.
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if entry != here]
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
