"""The networks that the paper's authors released: their ``.pth`` files are downloaded and converted to safetensors."""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import pickle
import urllib.request
from pathlib import Path

import torch

from monai_drdm.networks.card import NetworkCard
from monai_drdm.networks.registry import (
    list_published,
    network_card,
    published_file,
    PublishedFile,
    weights_folder,
)
from monai_drdm.networks.weights import build_network, fill_network, save_network

_MAX_BYTES = 64 << 20
_TIMEOUT_S = 30


def convert_published(path: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None) -> Path:
    """Convert a published ``.pth`` into ``<name>.safetensors``.

    The file is recognised by its hash before anything is parsed, then read on the CPU with ``weights_only=True``.

    Args:
        path: the ``.pth`` file.
        folder: where to write; None is ``weights_folder()``.

    Returns:
        The safetensors file. If it exists already with the same content, it is left as it is.

    Raises:
        FileNotFoundError: no such file.
        FileExistsError: the target exists with other content.
        ValueError: not a published file, or not the tensors it should hold.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights convert: no file {path}.")
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise ValueError(
            f"weights convert: {path} must be a published file of at most {_MAX_BYTES >> 20} MiB, got {size} bytes."
        )
    return _convert(path.read_bytes(), str(path), folder)


def pull_network(name: str, folder: str | os.PathLike[str] | None = None, *, url: str | None = None) -> Path:
    """Download a published file at a pinned commit, check its sha256, and convert it.

    Args:
        name: registry name.
        folder: where to write; None is ``weights_folder()``.
        url: address to download from instead of the authors' repository; the hash is checked in any case.

    Returns:
        The safetensors file.

    Raises:
        ValueError: unknown name, no verified hash, or a download whose hash differs.
        FileNotFoundError: the repository cannot be reached; the message says what to do.
    """
    published = published_file(name)
    if not published.sha256:
        raise ValueError(f"weights pull: no verified sha256 of {name!r} is known yet, so it is not downloaded.")
    target = Path(folder) if folder is not None else weights_folder()
    address = url or published.url
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as response:  # noqa: S310  # hash checked below
            data = response.read(_MAX_BYTES + 1)
    except (http.client.HTTPException, OSError) as error:
        raise FileNotFoundError(
            f"The weights of {name!r} are not in {target} and {address} cannot be reached ({error}). Either run "
            f"'monai-drdm weights pull {name}' where there is a connection, or download that address by hand and run "
            "'monai-drdm weights convert FILE.pth'; then copy the resulting .safetensors into that folder, or point "
            "MONAI_DRDM_WEIGHTS at the folder that has it."
        ) from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != published.sha256:
        raise ValueError(f"weights pull: {address} has sha256 {digest}, expected {published.sha256}. Nothing was kept.")
    return _convert(data, address, folder)


def _convert(data: bytes, origin: str, folder: str | os.PathLike[str] | None) -> Path:
    """Convert the content of a ``.pth`` file that came from ``origin``, a path or an address."""
    name = _recognise(data)
    if name is None:
        raise ValueError(
            f"weights convert: {origin} (sha256 {hashlib.sha256(data).hexdigest()}) is none of the published files "
            f"{', '.join(list_published())}. Only those are read from .pth; save your own networks with save_network."
        )
    try:
        tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(f"weights convert: {origin} cannot be read with weights_only=True ({error}).") from None
    network = build_network(_file_card(network_card(name)))
    fill_network(network, dict(tensors), origin)
    path = (Path(folder) if folder is not None else weights_folder()) / f"{name}.safetensors"
    save_network(network, path)
    return path


def _file_card(card: NetworkCard) -> NetworkCard:
    """The card inside the converted file.

    It holds only what is needed to build the network, so that the hash of the file does not change when texts of the
    registry do.
    """
    return NetworkCard(
        card.name, card.kind, card.spatial_dims, card.working_size, sampler="fast", steps=12, level=(0.3, 0.8)
    )


def _recognise(data: bytes) -> str | None:
    """Name of the published network whose file has this content; None if there is none."""
    return next((name for name in list_published() if _is_published(data, published_file(name))), None)


def _is_published(data: bytes, published: PublishedFile) -> bool:
    if published.sha256:
        return hashlib.sha256(data).hexdigest() == published.sha256
    blob = hashlib.sha1(b"blob %d\x00" % len(data) + data, usedforsecurity=False)  # how git computes the id of a file
    return blob.hexdigest() == published.git_blob
