"""The command ``python -m monai_drdm.train``."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from monai_drdm.train import build_config, fit, TrainConfig
from monai_drdm.training.settings import Config, describe_settings

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    0 done, 1 an error that is explained, 2 a wrong call, 128 + the signal's number if one ended the run: 130 after
    Ctrl-C, 143 after SIGTERM. The run then is saved, and ``--resume`` goes on from there.
    """
    options = _parser().parse_args(arguments)

    def config(file: Path | None) -> TrainConfig:
        return build_config(file, options.set, data=options.data, max_minutes=options.max_minutes, init=options.init)

    return run_command("monai_drdm.train", options, config, fit, _verdict)


def run_command(
    name: str,
    options: argparse.Namespace,
    config: Callable[[Path | None], Config],
    fit: Callable[..., Path | None],
    verdict: Callable[[Path], str] | None = None,
) -> int:
    """Train as a command line says; its exit code.

    Args:
        name: of the command, before its errors.
        options: with ``out``, ``config`` and ``resume``.
        config: makes the settings, given a file of them.
        fit: trains.
        verdict: what to say of the weights.
    """
    caught: list[int] = []

    def note(number: int, _: object) -> None:
        caught.append(number)
        signal.signal(number, signal.default_int_handler)  # a second one does not wait for the step

    before = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        before_it = options.out / "config.json"
        file = before_it if options.resume and options.config is None and before_it.is_file() else options.config
        weights = fit(config(file), options.out, resume=options.resume, progress=True, should_stop=lambda: bool(caught))
    except (OSError, TypeError, ValueError, FloatingPointError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        begun = (options.out / "config.json").is_file()
        print(f"stopped at once{f'; go on with --resume --out {options.out}' if begun else ''}", file=sys.stderr)
        return 128 + (caught[-1] if caught else signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if weights is None:
        print(f"stopped; go on with --resume --out {options.out}", file=sys.stderr)
        return 128 + (caught[0] if caught else signal.SIGTERM)  # another process may have been told
    if verdict is not None:
        print(verdict(weights), file=sys.stderr)
    print(weights)
    return 0


def _verdict(weights: Path) -> str:
    """What validation says of a network, from its card."""
    loss = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))["gates"]["validation_loss"]
    return f"validation loss {loss:.2f} (1 is doing nothing)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m monai_drdm.train",
        description="Train a deformation-recovery network on unlabelled scans.",
        epilog="settings for --set and --config:\n" + describe_settings(TrainConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", help="folder of scans, MONAI datalist, or 'synthetic'")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the run")
    parser.add_argument("--config", type=Path, help="YAML or JSON file of settings")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting; may be repeated")
    parser.add_argument("--max-minutes", type=float, help="minutes at most")
    parser.add_argument("--init", help="network to start from: a name or a .safetensors file")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    return parser


if __name__ == "__main__":
    sys.exit(main())
