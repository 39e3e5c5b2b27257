"""The settings of a draw. They are defined here once, for the transforms, the bank and ``FieldDrawer``.

A setting is one entry of a typed dictionary below: its name, its type, its default and its documentation.
``with_options`` writes the entries into the signature and the docstring of whatever takes them.
"""

from __future__ import annotations

import functools
import inspect
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, get_args, get_type_hints, NamedTuple, TypedDict, TypeVar

import torch

from monai_drdm.networks import RecoveryNetwork

NetworkLike = str | os.PathLike[str] | RecoveryNetwork
"""A registry name, the path of a safetensors file, a loaded network, or ``"auto"``."""


class Option(NamedTuple):
    """Default and documentation of a setting."""

    default: Any
    doc: str


class SharedDrawOptions(TypedDict, total=False):
    """Settings of every draw, whatever its level."""

    sampler: Annotated[
        str,
        Option("auto", '``"reference"``, ``"fast"``, ``"velocity"``, or ``"auto"`` for that of the network\'s card.'),
    ]
    steps: Annotated[int | None, Option(None, "number of recovery steps; None: that of the network's card.")]
    recovery: Annotated[
        float,
        Option(
            1.0,
            "factor on every recovery step, in [0, 1]. A smaller one leaves more of the random field, so that shapes "
            "differ more and are less plausible. Values below 1 need the sampler ``velocity``.",
        ),
    ]
    symmetry: Annotated[
        float,
        Option(
            1.0,
            "how far the halves of a symmetric anatomy are kept alike, in [0, 1]; 0: not at all. It changes nothing in "
            "images that do not agree with their mirror image. Less ``recovery`` keeps less. The published samplers "
            "do not do it.",
        ),
    ]
    image_channel: Annotated[
        int | None, Option(None, "number of the channel that the network sees; None: the mean over channels.")
    ]
    max_displacement_mm: Annotated[
        float | None, Option(None, "largest displacement in mm; a larger field is scaled down to it. None: no limit.")
    ]
    on_fold: Annotated[
        str,
        Option(
            "rescale",
            "what to do if more cells fold than ``max_fold_fraction`` allows: ``rescale`` (shrink the field until they "
            "do not), ``resample`` (draw again at most 4 times, then shrink the least folded field), ``skip`` (leave "
            "the data alone), ``keep`` or ``raise``.",
        ),
    ]
    max_fold_fraction: Annotated[
        float, Option(1e-4, "fraction of cells that may fold at full resolution, by the corner measure.")
    ]
    slice_axis: Annotated[
        int | None,
        Option(
            None,
            "lets a 2D network deform volumes: one in-plane field, drawn on the middle slice across this spatial axis, "
            "moves the whole stack.",
        ),
    ]
    device: Annotated[torch.device | str | None, Option(None, "where the network runs; None: where the image is.")]


class DrawOptions(SharedDrawOptions, total=False):
    """Settings of a draw."""

    deformation_level: Annotated[
        float | Sequence[float],
        Option(
            (0.3, 0.8),
            "how strong the random field is before the network takes most of it back: a number in (0, 1], or a range "
            "from which it is drawn uniformly. It is T'/T of the paper.",
        ),
    ]


class PrecisionOptions(TypedDict, total=False):
    """How the network computes."""

    precision: Annotated[
        str,
        Option(
            "float32",
            "``float32`` or ``bfloat16``, in which the convolutions of the network are computed. ``bfloat16`` is "
            "faster on hardware that supports it. Fields and coordinates stay float32. Records hold the choice.",
        ),
    ]
    compiled: Annotated[
        bool,
        Option(
            False,
            "compile the network with ``torch.compile``, with CUDA graphs on a GPU. The first images of each shape "
            "then take a minute.",
        ),
    ]


class PixdimOptions(TypedDict, total=False):
    """What cannot be known of images that carry no affine."""

    pixdim: Annotated[Sequence[float] | None, Option(None, "spacing in mm of data without an affine; None: 1 mm.")]


class AllDrawOptions(DrawOptions, PrecisionOptions, total=False):
    """Everything that can be chosen about a draw."""


Kind = TypeVar("Kind", bound=Mapping[str, Any])
Target = TypeVar("Target", bound=Callable[..., Any])
_WIDTH = 120


def options_of(kind: type) -> dict[str, Option]:
    """Default and documentation of every entry of a typed dictionary of settings."""
    return {name: _option(hint) for name, hint in _hints(kind).items()}


def choose(kind: type[Kind], options: Mapping[str, object]) -> Kind:
    """Of some settings, those that are entries of a typed dictionary."""
    known = _hints(kind)
    return {name: value for name, value in options.items() if name in known}  # type: ignore[return-value]


def with_options(kind: type) -> Callable[[Target], Target]:
    """Spell out the settings that a class or function takes as ``**options``.

    Its signature then has them as keyword arguments, with types and defaults. Its docstring has their documentation in
    place of the line that begins with ``options:``. It is always called with all of them, with defaults filled in. An
    unknown name is a ``TypeError``, as for any Python function.
    """

    def expand(target: Target) -> Target:
        target.__doc__ = _documented(target.__doc__, kind)
        if isinstance(target, type):
            target.__init__ = _spelled_out(target.__init__, kind)  # type: ignore[misc]  # a class's own constructor
            return target
        return _spelled_out(target, kind)  # type: ignore[return-value]

    return expand


def _spelled_out(function: Callable[..., Any], kind: type) -> Callable[..., Any]:
    given = inspect.signature(function)
    parameters = [one for one in given.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    hints = _hints(kind)
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_option(hint).default, annotation=_type(hint))
        for name, hint in hints.items()
    ]
    signature = given.replace(parameters=parameters)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{function.__qualname__}() {error}") from None
        bound.apply_defaults()
        return function(*bound.args, **bound.kwargs)

    call.__signature__ = signature  # type: ignore[attr-defined]  # inspect and help() look for it
    return call


def _documented(doc: str | None, kind: type) -> str | None:
    """The docstring with a paragraph for each setting where it says ``options:``."""
    lines: list[str] = []
    for line in (doc or "").splitlines():
        if line.strip().startswith("options:"):
            margin = " " * (len(line) - len(line.lstrip()))
            for name, option in options_of(kind).items():
                lines += _wrapped(f"{name}: {option.doc}", margin)
        else:
            lines.append(line)
    return "\n".join(lines) if doc else doc


def _wrapped(text: str, margin: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=margin, subsequent_indent=margin + "    ")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _option(hint: Any) -> Option:
    return next(one for one in get_args(hint) if isinstance(one, Option))


def _type(hint: Any) -> Any:
    return get_args(hint)[0]
