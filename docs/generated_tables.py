"""Directives of the site that are filled from the code, so that they cannot disagree with it.

``settings`` is a table of the settings of a dataclass or of a typed dictionary, ``command-help`` what a command prints
for ``--help``, ``shipped-networks`` a table of the registry.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from typing import Any, get_type_hints

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from monai_drdm.cli import main
from monai_drdm.deformation.options import options_of
from monai_drdm.networks import list_networks, network_card
from monai_drdm.training.settings import RunConfig

_WIDTH = "86"
"""Columns of a command's help."""


class _Generated(SphinxDirective):
    """A directive whose argument is made into Markdown."""

    required_arguments = 0
    optional_arguments = 8
    has_content = False
    make: Callable[..., str]

    def run(self) -> list[nodes.Node]:
        """Parse the Markdown that the arguments stand for."""
        return self.parse_text_to_nodes(type(self).make(*self.arguments))


def settings_table(name: str, part: str = "all") -> str:
    """A table of the settings of a class.

    Args:
        name: dotted name of a dataclass of a training run, or of a typed dictionary of options.
        part: ``own`` leaves out the settings that all training runs share.
    """
    module, _, attribute = name.rpartition(".")
    kind = getattr(importlib.import_module(module), attribute)
    rows = list(_config_rows(kind, part) if dataclasses.is_dataclass(kind) else _option_rows(kind))
    return _table(("setting", "type and default", "meaning"), rows)


def _option_rows(kind: type) -> Iterator[tuple[str, ...]]:
    hints = get_type_hints(kind)
    for name, option in options_of(kind).items():
        yield f"`{name}`", f"`{_type_name(hints[name])} = {option.default!r}`", _markdown(option.doc)


def _config_rows(kind: Any, part: str) -> Iterator[tuple[str, ...]]:
    shared = {one.name for one in dataclasses.fields(RunConfig)} if part == "own" else set()
    hints = get_type_hints(kind)
    for one in dataclasses.fields(kind):
        if one.name in shared:
            continue
        meaning = _markdown(one.metadata["help"]) + _range(**{k: one.metadata[k] for k in ("low", "high", "choices")})
        yield f"`{one.name}`", f"`{_type_name(hints[one.name])} = {one.default!r}`", meaning


def _range(low: float, high: float, choices: tuple[Any, ...]) -> str:
    if choices:
        return "; one of " + ", ".join(f"`{one!r}`" for one in choices)
    if (low, high) == (-math.inf, math.inf):
        return ""
    if high == math.inf:
        return f"; {low:g} or more"
    return f"; from {low:g} to {high:,g}"


def _type_name(hint: Any) -> str:
    name = hint.__name__ if isinstance(hint, type) and not hasattr(hint, "__args__") else str(hint)
    return re.sub(r"(?:\w+\.)+(\w+)", r"\1", name)


def _markdown(text: str) -> str:
    return text.replace("``", "`")


def shipped_networks() -> str:
    """A table of the networks that are known by name."""
    rows = []
    for name in list_networks():
        card = network_card(name)
        samplers = f"`{card.sampler}`, {card.steps} steps"
        rows.append((f"`{name}`", f"{card.spatial_dims}D", f"`{card.kind}`", str(card.working_size), samplers))
    return _table(("name", "images", "kind", "working size", "default sampler"), rows)


def command_help(*words: str) -> str:
    """What a command prints for ``--help``, as a block of text."""
    os.environ["COLUMNS"], os.environ["NO_COLOR"] = _WIDTH, "1"
    printed = io.StringIO()
    with redirect_stdout(printed):
        try:
            main([*words, "--help"])
        except SystemExit as end:
            if end.code:
                raise
    return f"```text\n{printed.getvalue().rstrip()}\n```"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives."""
    for name, function in (
        ("settings", settings_table),
        ("command-help", command_help),
        ("shipped-networks", shipped_networks),
    ):
        app.add_directive(name, type(f"Generated_{name}", (_Generated,), {"make": staticmethod(function)}))
    return {"parallel_read_safe": True}
