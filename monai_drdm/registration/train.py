"""The command ``python -m monai_drdm.registration.train``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from monai_drdm.registration.task import fit, RegistrationConfig
from monai_drdm.train.__main__ import run_command
from monai_drdm.training.settings import describe_settings, read_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; codes are those of ``python -m monai_drdm.train``."""
    options = _parser().parse_args(arguments)

    def config(file: Path | None) -> RegistrationConfig:
        names = ("pairs", "images", "labels", "init", "max_minutes")
        return read_config(RegistrationConfig, file, options.set, **{name: getattr(options, name) for name in names})

    return run_command("monai_drdm.registration.train", options, config, fit)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m monai_drdm.registration.train",
        description="Train a registration network on pairs with known fields, or on images to be made alike.",
        epilog="settings for --set and --config:\n" + describe_settings(RegistrationConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pairs", help="folder of monai-drdm pairs, or its datalist")
    parser.add_argument("--images", help="folder or datalist of images to register with each other")
    parser.add_argument("--labels", help="folder of label maps with the file names of the images")
    parser.add_argument("--init", help="network.safetensors of an earlier run to go on from")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the run")
    parser.add_argument("--config", type=Path, help="YAML or JSON file of settings")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting; may be repeated")
    parser.add_argument("--max-minutes", type=float, help="minutes at most")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    return parser


if __name__ == "__main__":
    sys.exit(main())
