"""Entry point of the command line: parse, dispatch, turn errors into exit statuses.

Exit status 0 means yes, 1 that the answer is no (no kernel, a wrong result), 2 that the question
was bad or an extra is missing.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from mla_core import registry
from mla_core.__about__ import __version__
from mla_core.cli import backends, bench, doctor, explain
from mla_core.errors import BackendUnavailableError, MLAError

_COMMANDS = {
    "backends": (backends, "list the installed backends, their status and what they offer"),
    "doctor": (doctor, "report this environment, to paste into a bug report"),
    "explain": (explain, "say which kernel would serve a problem, and why not the others"),
    "bench": (bench, "measure contenders side by side, after checking that they are right"),
}

#: Commands that backends bring, listed for the help: the backend, what it does.
_BROUGHT = {
    "aot": ("triton", "compile kernels ahead of time, for GPUs that need not be here"),
    "tune": ("triton", "measure tile sizes on this GPU and write a tuning table"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program name; default: those of the process. Without a command,
        ``backends`` runs.
    """
    arguments = list(sys.argv[1:] if argv is None else argv) or ["backends"]
    try:
        if arguments[0] == "demo":
            return _demo(arguments[1:])
        if arguments[0] in _BROUGHT:
            return _brought(arguments[0], arguments[1:])
        options = _parser().parse_args(arguments)
        module, _ = _COMMANDS[options.command]
        status: int = module.run(options)
        return status
    except MLAError as exc:
        print(f"mla: {exc}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mla", description="Multi-head Latent Attention kernels: which, why, how fast."
    )
    parser.add_argument("--version", action="version", version=f"mla-core {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (module, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
    # Listed for the help; `main` hands its arguments over before they are parsed here.
    summary = "decode real text with a small model from a paged latent cache, every step checked"
    commands.add_parser("demo", help=summary, add_help=False)
    for name, (_, summary) in _BROUGHT.items():
        commands.add_parser(name, help=summary, add_help=False)
    return parser


def _brought(name: str, arguments: Sequence[str]) -> int:
    """Hand over to the command of a backend, whose module parses its own options."""
    backend = _BROUGHT[name][0]
    try:
        where = registry.record(backend).require().commands[name]
        module = importlib.import_module(where)
    except (BackendUnavailableError, KeyError, ImportError) as exc:
        reason = f"brings no command {name!r}" if isinstance(exc, KeyError) else str(exc)
        raise BackendUnavailableError(
            f"{name}: the backend {backend!r} must be installed, got: {reason}; "
            f'pip install "mla-triton[triton]"'
        ) from exc
    parser = argparse.ArgumentParser(
        prog=f"mla {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    status: int = module.run(parser.parse_args(arguments))
    return status


def _demo(arguments: Sequence[str]) -> int:
    """Hand over to the demo, which parses its own options and imports transformers."""
    try:
        from mla_core.demo.command import main as demo
    except ImportError as exc:
        raise BackendUnavailableError(
            f'the demo needs more packages ({exc}); pip install "mla-core[demo]"'
        ) from exc
    return demo(arguments)
