"""Warnings about data that look like a mistake. The data are computed all the same, and each warning is given once.

Only the first calls of a transform are checked, so that later calls lose no time.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import uuid
import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.utils import TraceKeys
from torch import Tensor

from monai_drdm.fields.sampling import Mode

_CALLS = 64
_LONG_AXIS = 16  # voxels: what is shorter may well be channels
_COLOURS = (1, 3, 4)  # channels of images whose channels come last
_PATCHES_IN_A_ROW = 3
_SMALLER_BY = 4  # patches, than what they were cut from
_ROWS_PER_AXIS, _OF_BATCH = 16, 4
_FEW_VALUES, _SOME_VALUES = 16, 64
_ALIKE, _MOSTLY_ALIKE = 0.5, 0.8
_SAID = mmap.mmap(-1, 1 << 22)
"""A byte for each warning that was given. Forked workers share this memory, for every epoch may have new ones."""


class Notices:
    """The warnings of one transform.

    Args:
        owner: name of the transform's class.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self._identity = uuid.uuid4().hex
        self._calls = 0
        self._settled: set[Hashable] = set()
        """What was said, and keys about which nothing need be said."""
        self._patches = 0

    def begin(self) -> bool:
        """Whether to check this call. Of the workers of a loader, only the first one checks."""
        if self._calls >= _CALLS:
            return False
        self._calls += 1
        worker = torch.utils.data.get_worker_info()
        return worker is None or worker.id == 0

    def look_at_layout(self, data: Any, shape: Sequence[int], name: str, *, batched: bool) -> None:
        """Warn if the axes of an image, or of the first image of a batch, do not seem to be ``(C, *S)``."""
        if "layout" not in self._settled and (found := layout_problem(data, tuple(shape), batched=batched)) is not None:
            self._say("layout", f"{name} of shape {found}")

    def look_at_patches(self, data: Any, shape: Sequence[int], name: str) -> None:
        """Warn if the transform is called with random crops of larger scans again and again."""
        if "patches" in self._settled:
            return
        scan = _cut_from(data)
        smaller = scan is not None and math.prod(shape) * _SMALLER_BY <= math.prod(scan)
        self._patches = self._patches + 1 if smaller else 0
        if self._patches == _PATCHES_IN_A_ROW:
            self._say(
                "patches",
                f"{name} was a random crop in {_PATCHES_IN_A_ROW} calls in a row, the last one of {tuple(shape)} "
                f"voxels out of {scan}. The field of a patch takes as long as that of the whole scan, because the "
                "network's grid is the same, and on a patch the network sees no whole anatomy. Put this transform "
                "before random crops; where volumes take too long, draw their fields ahead (DeformationBank).",
            )

    def look_at_label(self, data: Any, values: Tensor, key: Hashable, mode: Mode) -> None:
        """Warn if a key other than the image seems to hold labels whose ids are, or will become, fractions.

        Args:
            data: what the sample holds at the key.
            values: its values, ``(B, C, *S)``.
            key: the key.
            mode: how it is interpolated.
        """
        if key in self._settled:
            return
        if mode in ("nearest", "label"):
            self._settled.add(key)
            lazily = _lazy_operations(data)
            if lazily and holds_fractions_of_labels(values):
                self._say(
                    key,
                    f"{key!r} is moved by mode={mode!r} but holds fractions between whole numbers already, and "
                    f"{', '.join(lazily)} moved it lazily before. MONAI 1.6.1 interpolates labels when it resamples "
                    "lazily, whatever their mode. Use Compose(lazy=False), or set lazy=False on these transforms.",
                )
        elif (labels := looks_like_labels(values)) is not None:
            self._settled.add(key)
            if labels:
                self._say(
                    key,
                    f"{key!r} seems to hold labels, and mode={mode!r} makes fractions of their ids. Give one mode for "
                    "each key, such as mode=['bilinear', 'nearest'] for keys=['image', 'label']; for an image all is "
                    "well as it is.",
                )

    def _say(self, what: Hashable, message: str) -> None:
        self._settled.add(what)
        if torch.utils.data.get_worker_info() is not None:
            digest = hashlib.sha256(f"{self._identity}/{what!r}".encode()).digest()
            place = int.from_bytes(digest[:8], "big") % len(_SAID)
            if _SAID[place]:
                return
            _SAID[place] = 1
        warnings.warn(f"{self.owner}: {message}", UserWarning, stacklevel=2)


def layout_problem(data: Any, shape: tuple[int, ...], *, batched: bool) -> str | None:
    """Say what is suspicious about the shape ``(C, *S)`` of an image, or of each image of a batch; None if nothing is.

    If the metadata of a loaded file say that its axes are ``S``, nothing is suspicious. Otherwise these are: at least
    16 channels of images that are 1, 3 or 4 voxels long along the last axis and at least 16 along the first; at least
    16 channels where the file has ``(C, *S)`` as its own axes; and, without metadata of a file, two or more channels of
    a sample one voxel thick along its first axis and at least 16 along the others. Thin volumes of one channel, images
    of one row, and images of many channels are therefore never suspicious.
    """
    channels, *sides = shape
    file_shape = _file_shape(data)
    if file_shape == tuple(sides):
        return None
    many = min(channels, sides[0]) >= _LONG_AXIS
    if many and file_shape == shape and batched and not data.is_batch:
        return f"{shape} is taken for a batch of 2D images. If it is one volume, RandDRDMDeformd deforms it."
    taken = f"{shape} is taken for {channels} channels of {' x '.join(map(str, sides))} voxels."
    if many and file_shape == shape:
        return f"{taken} Its file has these axes and none for channels: put EnsureChannelFirstd before this transform."
    if many and sides[-1] in _COLOURS:
        return f"{taken} If channels come last, put EnsureChannelFirstd(keys, channel_dim=-1) before this transform."
    one_slice = len(sides) == 3 and sides[0] == 1 and min(sides[1:]) >= _LONG_AXIS
    if one_slice and channels > 1 and not batched and file_shape is None:
        return f"{taken} If it is a batch of 2D images, BatchRandDRDMDeformd deforms it."
    return None


def looks_like_labels(values: Tensor) -> bool | None:
    """Whether values ``(B, C, *S)`` are whole numbers that are spread like labels; None if they are all equal.

    Labels have few values, or large areas of one value. Images of whole numbers, also of 8 bits, have neither.
    """
    rows = _some_rows(values)
    if rows.dtype == torch.bool:
        return True
    if rows.is_floating_point() and not bool((rows == rows.round()).all()):
        return False
    rows = rows.to(torch.float64)
    count = len(torch.unique(rows))
    if count == 1:
        return None
    left, right = rows[:, :-1], rows[:, 1:]
    lowest = rows.min()
    inhabited = (left != lowest) | (right != lowest)
    alike = float((left == right)[inhabited].double().mean())
    return count <= _FEW_VALUES or alike >= (_ALIKE if count <= _SOME_VALUES else _MOSTLY_ALIKE)


def holds_fractions_of_labels(values: Tensor) -> bool:
    """Whether most values ``(B, C, *S)`` are whole numbers, more than one of them, and some lie between."""
    rows = _some_rows(values)
    if not rows.is_floating_point():
        return False
    whole = rows == rows.round()
    return _MOSTLY_ALIKE <= float(whole.double().mean()) < 1.0 and len(torch.unique(rows[whole])) > 1


def _some_rows(values: Tensor) -> Tensor:
    """Rows along the longest axis of some samples and channels of ``(B, C, *S)``: ``(N, n)``."""
    longest = max(range(2, values.ndim), key=lambda axis: values.shape[axis])
    some = values.detach()[:_OF_BATCH, :_OF_BATCH].movedim(longest, -1)
    for axis in range(2, some.ndim - 1):
        step = max(1, some.shape[axis] // _ROWS_PER_AXIS)
        some = some[(slice(None),) * axis + (slice(step // 2, None, step),)]
    return some.reshape(-1, some.shape[-1])


def _file_shape(data: Any) -> tuple[int, ...] | None:
    """The shape of the file from which the data, or the first sample of a batch, were loaded."""
    known = data.meta.get("spatial_shape") if isinstance(data, MetaTensor) else None
    return _whole_numbers(known, first=isinstance(data, MetaTensor) and data.is_batch)


def _operations(data: Any) -> list[dict[str, Any]]:
    """The operations that were applied to the data, or to the first sample of a batch."""
    known: Any = data.applied_operations if isinstance(data, MetaTensor) else []
    if known and data.is_batch:
        known = known[0]
    return [one for one in known if isinstance(one, dict)]


def _cut_from(data: Any) -> tuple[int, ...] | None:
    """The spatial shape of the scan from which a random crop took the data; None if there was none."""
    for one in reversed(_operations(data)):
        name = str(one.get(TraceKeys.CLASS_NAME))
        if name.startswith("Rand") and "Crop" in name:
            return _whole_numbers(one.get(TraceKeys.ORIG_SIZE))
    return None


def _whole_numbers(values: Any, *, first: bool = False) -> tuple[int, ...] | None:
    """The shape in the metadata, or the first of several; None if they hold something else."""
    try:
        return tuple(int(n) for n in (values[0] if first else values))
    except (IndexError, KeyError, TypeError, ValueError):
        return None


def _lazy_operations(data: Any) -> list[str]:
    """Class names of the operations that were applied lazily."""
    return [str(one.get(TraceKeys.CLASS_NAME)) for one in _operations(data) if one.get(TraceKeys.LAZY)]
