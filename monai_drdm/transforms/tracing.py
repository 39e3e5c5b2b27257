"""Records on the data of what was applied to them, and how a transform finds its own records."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, ExitStack
from typing import Any, TypeVar

import torch
from monai.config import NdarrayOrTensor
from monai.data import get_track_meta, MetaTensor
from monai.transforms import BorderPad, InvertibleTransform
from monai.utils import TraceKeys

from monai_drdm.deformation import ComposedField, StoredField
from monai_drdm.samples import with_metadata_of

_OWNER = "owner"

# caches on disk are read with weights_only=True; MONAI's own names for the parts of a record are an enumeration
torch.serialization.add_safe_globals([StoredField, ComposedField, TraceKeys])


class TracedTransform(InvertibleTransform):
    """Writes records to ``applied_operations``, and inverts only its own records.

    MONAI recognises the record of a transform by ``id()``, which changes when the transform is sent to another process.
    Caches on disk erase that id, and MONAI then lets any transform take the record. Here every transform has a unique
    identity that survives pickling and copying. The record holds it twice: in place of MONAI's id, and in an entry of
    its own, which caches do not erase.
    """

    def __init__(self) -> None:
        self.owner = uuid.uuid4().hex

    def get_transform_info(self) -> dict[str, Any]:
        """MONAI's description of this transform, with an identity that survives pickling."""
        info: dict[str, Any] = super().get_transform_info()
        return {**info, TraceKeys.ID: self.owner}

    def record(self, output: torch.Tensor, fired: bool, extra_info: Mapping[str, Any]) -> torch.Tensor:
        """Put a record on an output that is this transform's own, where metadata and transforms are tracked."""
        if not isinstance(output, MetaTensor):
            return output
        info = {**self.get_transform_info(), TraceKeys.DO_TRANSFORM: fired}
        if get_track_meta() and info[TraceKeys.TRACING]:
            info |= {TraceKeys.ORIG_SIZE: tuple(output.shape[1:]), TraceKeys.LAZY: False}
            output.push_applied_operation({**info, TraceKeys.EXTRA_INFO: {_OWNER: self.owner, **extra_info}})
        return output

    def take_record(self, data: NdarrayOrTensor, name: str) -> tuple[MetaTensor, dict[str, Any], int]:
        """Remove this transform's latest record: the data without it, the record, and how many records came after it.

        The argument is left as it is.

        Raises:
            TypeError: data that carry no records.
            ValueError: there is no record of this transform, or lazy operations are pending.
        """
        kind = type(self).__name__
        if not isinstance(data, MetaTensor):
            raise TypeError(
                f"{kind}.inverse: {name} must be a MetaTensor, which carries the record of what was applied, got "
                f"{type(data).__name__}. Keep metadata tracked (monai.data.set_track_meta(True))."
            )
        if data.has_pending_operations:
            raise ValueError(f"{kind}.inverse: {name} has pending lazy operations. Apply them or invert them first.")
        if data.is_batch:
            raise ValueError(f"{kind}.inverse: {name} is a batch. Take it apart first (monai.data.decollate_batch).")
        operations = list(data.applied_operations)
        index = self._find(operations)
        if index is None:
            present = [operation.get(TraceKeys.CLASS_NAME) for operation in operations]
            raise ValueError(
                f"{kind}.inverse: {name} carries no record of this transform (it has {present}). It was made by "
                "another transform, with invertible=False, with tracing off, or is inverted already."
            )
        record = operations.pop(index)
        rest = with_metadata_of(data, data.as_tensor())
        assert isinstance(rest, MetaTensor)
        rest.applied_operations = operations
        return rest, record, len(operations) - index

    def latest_record(self, data: NdarrayOrTensor) -> dict[str, Any] | None:
        """The latest record of this transform that data carry."""
        operations = list(data.applied_operations) if isinstance(data, MetaTensor) else []
        index = self._find(operations)
        return None if index is None else operations[index]

    def _find(self, operations: list[dict[str, Any]]) -> int | None:
        """Index of this transform's latest record or, where a cache has erased the ids, of a record of its class."""
        mine = [i for i, one in enumerate(operations) if one.get(TraceKeys.CLASS_NAME) == type(self).__name__]
        for index in reversed(mine):
            if operations[index].get(TraceKeys.EXTRA_INFO, {}).get(_OWNER) == self.owner:
                return index
        erased = [i for i in mine if operations[i].get(TraceKeys.ID) == TraceKeys.NONE]
        return erased[-1] if erased else None


def put_back_crops(data: MetaTensor, later: int) -> MetaTensor:
    """Undo random crops that MONAI cannot invert: put the data back where they were cut from, with zeros around.

    Random crops that return several samples have no inverse in MONAI, so ``Compose.inverse`` skips them. Their records
    hold how much was cut off at every side. If other operations came later too, the data are returned as they are.

    Args:
        data: ``(C, *S)``; they are left as they are.
        later: how many of the latest records belong to operations that came after this transform.
    """
    operations = list(data.applied_operations)
    sides = [_cut_off(one) for one in reversed(operations[len(operations) - later :])]
    if not sides or None in sides:
        return data
    for cut in sides:
        pad = BorderPad(cut)  # type: ignore[arg-type]  # not None
        with pad.trace_transform(False):
            data = pad(data)  # type: ignore[assignment]  # of a MetaTensor a MetaTensor
    data.applied_operations = operations[: len(operations) - later]
    return data


def _cut_off(operation: Mapping[str, Any]) -> Sequence[int] | None:
    """How many voxels such a crop cut off at the start and end of every axis; None for other operations."""
    inner = operation.get(TraceKeys.EXTRA_INFO, {})
    several = TraceKeys.CLASS_NAME in inner and "Crop" in str(operation.get(TraceKeys.CLASS_NAME))
    cut: Sequence[int] | None = inner.get(TraceKeys.EXTRA_INFO, {}).get("cropped") if several else None
    return cut


_Function = TypeVar("_Function", bound=Callable[..., Any])


def in_plain_mode(function: _Function) -> _Function:
    """Run without autocast and inference mode: fields need full precision, outputs must be ordinary tensors."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _plain_mode():
            return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]  # wraps keeps the signature


@contextmanager
def _plain_mode() -> Iterator[None]:
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())  # leaving inference mode would turn gradients on
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
