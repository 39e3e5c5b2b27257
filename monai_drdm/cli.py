"""The command ``monai-drdm``, also ``python -m monai_drdm.cli``: the table of its commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from monai_drdm._version import __version__
from monai_drdm.commands import augment, bank, demo, pairs, register, train, weights

_COMMANDS = (demo, augment, pairs, bank, weights)
"""Each adds its arguments to the parser, and the function that runs it."""
_TRAINING_COMMANDS = {"train": train, "register": register}
"""Each has a parser of its own, which takes all arguments after its name."""
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    0 done, 1 an error that is explained, 2 a wrong call, 3 done but for some cases, 130 interrupted. The training
    commands return their own codes; see ``monai_drdm.training.command.TrainingCommand.run``.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in _TRAINING_COMMANDS:
        training_code: int = _TRAINING_COMMANDS[arguments[0]].main(arguments[1:])
        return training_code
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"monai-drdm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("monai-drdm: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="monai-drdm", description="Plausible random anatomy by deformation recovery.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    for name, training_command in _TRAINING_COMMANDS.items():
        commands.add_parser(name, help=training_command.HELP, add_help=False)
    return parser


if __name__ == "__main__":
    sys.exit(main())
