"""Seeds that are computed from the value of a key, such as the name of a sample."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import torch
from torch import Tensor


def stable_hash(value: object) -> int:
    """A hash below 2³² of a string, path, number, bytes, array or a sequence of them, the same in every process.

    Raises:
        TypeError: something else.
    """
    return int.from_bytes(hashlib.sha256(_canonical(value)).digest()[:4], "big")


def _canonical(value: object) -> bytes:
    if isinstance(value, (np.ndarray, Tensor)) and value.ndim > 0:
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        array = np.ascontiguousarray(value)
        if array.dtype.kind not in "biuf":
            return _canonical(array.tolist())
        return (
            f"array {array.dtype.str[1:]} {array.shape} ".encode()
            + array.astype(array.dtype.newbyteorder("<")).tobytes()
        )
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        value = value.item()
    if isinstance(value, (str, os.PathLike)):
        text = os.fspath(value)
        return b"text " + (text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    if isinstance(value, bytes):
        return b"bytes " + value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (int, float)):
        return f"number {value + 0!r}".encode()  # True is 1
    if isinstance(value, (tuple, list)):
        parts = [_canonical(one) for one in value]
        return b"sequence " + b"".join(f"{len(part)} ".encode() + part for part in parts)
    raise TypeError(
        "the value at seed_key must be a string, path, number, bytes, array, or a sequence of them, got "
        f"{type(value).__name__}."
    )
