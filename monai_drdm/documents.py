"""Reading JSON and YAML: settings, datalists, network cards, records and everything else that is kept as text.

Whatever is wrong with a text (it is nested too deeply, has another encoding, lacks an entry), the result is one
``ValueError`` that names the file, what was expected, what is wrong and what to do.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MAX_BYTES = 1 << 28
_LONGEST = 400
"""Characters of a reason; those of parsers may quote the whole text."""
_FAULTS = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)
"""Exceptions that Python raises when content is not as expected."""

Origin = str | os.PathLike[str]
"""The file that a text comes from, or another description that the user knows."""
NO_BETTER = "no better than doing nothing on its validation data"
"""What training writes into the source of such a network."""


class DocumentError(ValueError):
    """An explained error of content that cannot be read. An outer ``reading`` passes it on unchanged."""


@dataclass(frozen=True)
class Document:
    """One kind of text that is read."""

    what: str
    """What the text should be; it continues the words "cannot be read as"."""
    advice: str
    """A sentence that says what to do if the text cannot be read."""

    @contextmanager
    def reading(self, origin: Origin, *more: type[Exception]) -> Iterator[None]:
        """Explain errors that occur while the block interprets the content.

        Args:
            origin: named in the error.
            more: other exceptions that mean wrong content, in addition to those that Python itself raises.

        Raises:
            DocumentError: the block has raised an exception that means wrong content. It is a ``ValueError``.
        """
        faults: tuple[type[Exception], ...] = (*_FAULTS, *more)
        try:
            yield
        except DocumentError:
            raise
        except faults as error:
            raise DocumentError(
                f"{os.fspath(origin)} cannot be read as {self.what}: {reason_of(error)}. {self.advice}"
            ) from error

    def read_json(self, path: Path) -> dict[str, Any]:
        """The mapping that a JSON file holds.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it holds something else.
        """
        return self.parse_json(self.read_text(path), path)

    def parse_json(self, text: str | bytes, origin: Origin) -> dict[str, Any]:
        """The mapping that a JSON text holds.

        Raises:
            ValueError: it holds something else.
        """
        with self.reading(origin):
            return _mapping(json.loads(text))

    def read_yaml(self, path: Path) -> dict[str, Any]:
        """The mapping that a YAML file holds; JSON is YAML too.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it holds something else.
        """
        values = self.parse_yaml(self.read_text(path), path)
        with self.reading(path):
            return _mapping(values)

    def parse_yaml(self, text: str, origin: Origin) -> Any:
        """The value of a YAML text.

        Raises:
            ValueError: it is no YAML.
        """
        import yaml  # an extra that only training needs

        with self.reading(origin, yaml.YAMLError):
            return yaml.safe_load(text)

    def read_text(self, path: Path) -> str:
        """A text in UTF-8.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is no file of text in UTF-8, or larger than any of this package.
        """
        with self.reading(path):
            try:
                state = path.stat()
            except FileNotFoundError:
                raise FileNotFoundError(f"no file {path}, expected {self.what}.") from None
            if not stat.S_ISREG(state.st_mode):
                raise ValueError("it is not a file")
            if state.st_size > _MAX_BYTES:
                raise ValueError(f"it has {state.st_size} bytes, and none has more than {_MAX_BYTES >> 20} MiB")
            return path.read_text(encoding="utf-8-sig")  # editors on Windows begin UTF-8 with a mark


def reason_of(error: BaseException) -> str:
    """The message of an exception about wrong content, in one line without a full stop."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    if isinstance(error, UnicodeDecodeError):
        return "it is not text in UTF-8"
    if isinstance(error, KeyError):
        return f"there is no entry {error}"
    reason = (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
    return reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST]} …"


def _mapping(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise TypeError(f"expected a mapping of names to values, got {type(values).__name__}")
    return values
