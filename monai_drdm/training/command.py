"""The command line of a training run, whatever it trains."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

from monai_drdm.training.settings import closest_settings, Config, config_file, describe_settings, read_config

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class TrainingCommand(Generic[Config]):
    """A command that trains one kind of network.

    Every command has the flags ``--out``, ``--config``, ``--set``, ``--max-minutes`` and ``--resume``. Its module and
    this one need no torch, so that ``--help`` and wrong arguments are answered at once.
    """

    name: str
    """The module that ``python -m`` runs."""
    description: str
    """What it trains, for its help."""
    config_class: type[Config]
    """The dataclass of its settings."""
    flags: Mapping[str, str]
    """Settings that have a flag of their own, and the help of each."""
    load_fit: Callable[[], Callable[..., Path | None]]
    """Imports the function that trains; see ``monai_drdm.train.fit``."""

    def run(self, arguments: Sequence[str] | None = None, program: str | None = None) -> int:
        """Run a command line and return its exit code.

        0: done. 1: an error, which is printed. 2: wrong arguments. 128 + the number of a signal that ended the run:
        130 after Ctrl-C, 143 after SIGTERM. Once it trains, the run is saved then, and ``--resume`` continues it.

        Args:
            arguments: of the command line; None: those of this process.
            program: what the user has typed before them; None: ``python -m`` and the name.
        """
        return self._train(self._options(arguments, program or f"python -m {self.name}"))

    def _train(self, options: argparse.Namespace) -> int:
        try:
            config = self._config(options)
            return self._fit(self.load_fit(), config, options.out, options.resume)
        except (OSError, TypeError, ValueError, FloatingPointError) as error:
            print(f"{self.name}: {error}", file=sys.stderr)
            return 1

    def _fit(self, fit: Callable[..., Path | None], config: Config, out: Path, resume: bool) -> int:
        resume_hint = f"go on with --resume --out {out}"
        with _signals_received() as received:
            try:
                weights = fit(config, out, resume=resume, progress=True, should_stop=lambda: bool(received))
            except KeyboardInterrupt:
                begun = config_file(out).is_file()
                print(f"stopped at once{f'; {resume_hint}' if begun else ''}", file=sys.stderr)
                return 128 + (received[-1] if received else signal.SIGINT)
        if weights is None:
            print(f"stopped; {resume_hint}", file=sys.stderr)
            return 128 + (received[0] if received else signal.SIGTERM)  # another process may have got the signal
        print(weights)
        return 0

    def _config(self, options: argparse.Namespace) -> Config:
        """The settings: of the file, or of the run that is resumed, then of the flags."""
        saved = config_file(options.out)
        of_run = options.resume and options.config is None and saved.is_file()
        flags = {name: getattr(options, name) for name in (*self.flags, "max_minutes")}
        return read_config(self.config_class, saved if of_run else options.config, options.set, of_run, **flags)

    def _options(self, arguments: Sequence[str] | None, program: str) -> argparse.Namespace:
        parser = self._parser(program)
        options, unknown = parser.parse_known_args(arguments)
        if unknown:
            flags = [word.partition("=")[0].lstrip("-") for word in unknown if word.startswith("--")]
            close = closest_settings(self.config_class, flags)
            meant = f"; did you mean --set {close[0]}=VALUE?" if close else ""
            parser.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return options

    def _parser(self, program: str) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(
            prog=program,
            description=self.description,
            epilog="settings for --set and --config:\n" + describe_settings(self.config_class),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for name, text in self.flags.items():
            parser.add_argument(f"--{name.replace('_', '-')}", type=_given, help=text)
        parser.add_argument("--out", type=_path, required=True, help="new folder for the run, or with --resume its own")
        parser.add_argument("--config", type=_path, help="YAML or JSON file of settings (default: none)")
        parser.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="one setting; may be repeated (default: those of the list below)",
        )
        parser.add_argument(
            "--max-minutes",
            type=float,
            help="minutes of training at most; warm-up and validations follow them (default: no limit)",
        )
        parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
        return parser


def _given(text: str) -> str:
    """A text of the command line. An empty one, as of a shell variable that is not set, is not the default."""
    if not text:
        raise argparse.ArgumentTypeError("expected a name or path, got an empty text")
    return text


def _path(text: str) -> Path:
    return Path(_given(text))


@contextmanager
def _signals_received() -> Iterator[list[int]]:
    """The numbers of SIGINT and SIGTERM as they arrive; a second one of the same kind raises ``KeyboardInterrupt``."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        received.append(number)
        signal.signal(number, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
