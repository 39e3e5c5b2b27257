"""The command ``monai-drdm``, also ``python -m monai_drdm.cli``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from monai_drdm._version import __version__

_INTERRUPTED = 130

_COMMANDS = {
    "demo": "deform one real scan and show what happened",
    "augment": "deform a data set on disk",
    "pairs": "make registration pairs",
    "bank": "draw fields ahead of training",
    "weights": "list, pull, convert and verify network weights",
}
"""Modules of ``monai_drdm.commands`` and what they do."""

_TRAININGS = {
    "train": ("monai_drdm.train.__main__", "train a recovery network on unlabelled scans"),
    "register": ("monai_drdm.registration.train", "train a registration network"),
}
"""Commands that are command lines of their own, also as ``python -m``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    0 done, 1 an error that is explained, 2 a wrong call, 3 done but for some cases, 130 interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given and given[0] in _TRAININGS:
            code: int = importlib.import_module(_TRAININGS[given[0]][0]).main(given[1:])
        else:
            options = _parser(given).parse_args(given)
            code = options.run(options)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"monai-drdm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("monai-drdm: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return code


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of a command line. Only the command that is called is imported, so that help comes at once."""
    parser = argparse.ArgumentParser(prog="monai-drdm", description="Plausible random anatomy by deformation recovery.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in _COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name in given:
            importlib.import_module(f"monai_drdm.commands.{name}").configure(command)
    for name, (_, text) in _TRAININGS.items():
        commands.add_parser(name, help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main())
