"""The command ``monai-drdm``, also ``python -m monai_drdm.cli``: the table of its commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from monai_drdm.interrupts import ends_at_once, INTERRUPTED

if TYPE_CHECKING:
    import argparse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    0: done. 1: an error, which is explained. 2: a wrong call. 3: done, but some cases were skipped. 130: interrupted.
    The training commands return their own codes; see ``monai_drdm.training.command.TrainingCommand.run``.
    """
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except ImportError as error:  # a package of an extra is missing; the error says what to install
        return _explained(error)


def _run(arguments: Sequence[str]) -> int:
    with ends_at_once("monai-drdm"):
        from monai_drdm.commands import register, train

        command, words = (arguments[0], arguments[1:]) if arguments else ("", ())
        if command == "train":
            return train.main(words)
        if command == "register" and register.trains(words):
            return register.train(words)
        options = _parser().parse_args(arguments)
        _import_modules(options)
    try:
        code: int = options.run(options)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        return _explained(error)
    except KeyboardInterrupt:
        print("monai-drdm: interrupted", file=sys.stderr)
        return INTERRUPTED
    return code


def _explained(error: Exception) -> int:
    print(f"monai-drdm: {error}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    """All commands. Each adds its arguments, and the function that runs it.

    Training has parsers of its own, which take all arguments after the name.
    """
    import argparse

    from monai_drdm._version import __version__
    from monai_drdm.commands import augment, bank, demo, pairs, register, train, weights

    parser = argparse.ArgumentParser(prog="monai-drdm", description="Plausible random anatomy by deformation recovery.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (demo, augment, pairs, bank, weights, register):
        command.add_parser(commands)
    commands.add_parser("train", help=train.HELP, add_help=False)
    return parser


def _import_modules(options: argparse.Namespace) -> None:
    """Import what a command needs before it begins, while Ctrl-C can still end it at once."""
    import importlib

    for name in getattr(options, "needs", ()):
        importlib.import_module(name)


if __name__ == "__main__":
    sys.exit(main())
