"""Weights files: safetensors only, and hashed before they are parsed."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from monai_drdm.documents import Document
from monai_drdm.networks.base import RecoveryNetwork
from monai_drdm.networks.card import NetworkCard
from monai_drdm.networks.recresacnet import RecResACNet
from monai_drdm.networks.velocity_unet import VelocityUNet

_WEIGHTS = Document(
    "an intact safetensors file of weights", "Copy or convert the weights again; save_network writes those of your own."
)
_METADATA_KEY = "monai_drdm"
_MAX_BYTES = 1 << 30
_PICKLE_PROTOCOL = 5
_KINDS: dict[str, Callable[[NetworkCard], RecoveryNetwork]] = {
    "recresacnet": lambda card: RecResACNet(card.spatial_dims, card.in_channels),
    "velocity_unet": lambda card: VelocityUNet(card.spatial_dims, card.in_channels, card.channels),
}


_HASHES: WeakKeyDictionary[RecoveryNetwork, tuple[object, str]] = WeakKeyDictionary()
"""For networks that were never in a file: a checksum of their weights, and the hash that belongs to it."""


def read_network(path: Path, sha256: str | None = None) -> RecoveryNetwork:
    """Read a safetensors file of weights.

    Args:
        path: the file.
        sha256: the hash that the file must have; it is compared before anything is parsed. None accepts any hash.

    Returns:
        The network in evaluation mode, without gradients; its card holds the hash of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a wrong hash, or not intact weights of a known network.
    """
    tensors, card, digest = read_weights(path, _WEIGHTS, _METADATA_KEY, sha256)
    with _WEIGHTS.reading(path):
        network = build_network(NetworkCard.from_json(card, digest, path))
    fill_network(network, tensors, str(path))
    return network.eval().requires_grad_(False)


def read_weights(path: Path, kind: Document, key: str, sha256: str | None) -> tuple[dict[str, Tensor], str, str]:
    """Read a safetensors file, hashed before it is parsed.

    Args:
        path: the file.
        kind: what the file should be, for error messages.
        key: the single metadata key, under which it describes itself.
        sha256: the hash that the file must have, or None for any.

    Returns:
        Its tensors, its description and its hash.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a wrong hash, or not such a file.
    """
    data = _read_bytes(path)
    digest = hashlib.sha256(data).hexdigest()
    if sha256 is not None and digest != sha256:
        raise ValueError(
            f"{path} has sha256 {digest}, expected {sha256}. The file is damaged or not the one of that name. Delete "
            "it, then convert or pull published weights again; reinstall monai_drdm for its own."
        )
    # a safetensors file starts with the length of its header in 8 bytes, followed by the brace that opens the header
    if data[8:9] != b"{" and (data[:4] == b"PK\x03\x04" or (data[:1] == b"\x80" and data[1] <= _PICKLE_PROTOCOL)):
        raise ValueError(
            f"{path} is a pickle, expected safetensors. Published .pth files are read by 'monai-drdm weights convert "
            "FILE.pth' only."
        )
    with kind.reading(path, SafetensorError):
        tensors = parse_safetensors(data)
        header = kind.parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")], path)
        metadata = header.get("__metadata__", {})
        if set(metadata) != {key}:
            raise ValueError(f"it must describe itself under the single metadata key {key!r}, got {sorted(metadata)}")
        return tensors, str(metadata[key]), digest


def build_network(card: NetworkCard) -> RecoveryNetwork:
    """An untrained network of the architecture that a card names.

    Raises:
        ValueError: unknown kind.
    """
    if card.kind not in _KINDS:
        raise ValueError(f"network card {card.name!r}: kind must be one of {sorted(_KINDS)}, got {card.kind!r}.")
    network = _KINDS[card.kind](card).float()  # torch's default dtype may be another
    network.card = card
    return network


def save_network(network: RecoveryNetwork, path: str | os.PathLike[str]) -> str:
    """Write a network and its card as safetensors, never over an existing file.

    Args:
        network: any network of this package.
        path: a new ``.safetensors`` file.

    Returns:
        The file's sha256. The same weights and card always give the same hash.

    Raises:
        ValueError: another suffix, or weights of another data type than ``load_network`` reads.
        FileExistsError: the file is there already, with other content.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"save_network: path must end in .safetensors, got {path}.")
    tensors = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    other = next((v.dtype for v in tensors.values() if v.is_floating_point() and v.dtype != torch.float32), None)
    if other is not None:
        raise ValueError(f"save_network: weights must be float32, got {other}. Save network.float().")
    data = to_safetensors(tensors, {_METADATA_KEY: network.card.to_json()})
    write_once(path, data)
    return hashlib.sha256(data).hexdigest()


def network_sha256(network: RecoveryNetwork) -> str:
    """The hash by which records identify a network.

    It is the hash of the file that the network was read from. For a network that was never in a file, it is the hash of
    the file that ``save_network`` would write.
    """
    if network.card.sha256:
        return network.card.sha256
    tensors = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    # every draw asks for the hash, and a checksum of the weights takes a tenth of the time that writing them would
    content = (
        network.card.to_json(),
        [zlib.crc32(v.reshape(-1).view(torch.uint8).numpy().data) for v in tensors.values()],
    )
    known = _HASHES.get(network)
    if known is None or known[0] != content:
        digest = hashlib.sha256(to_safetensors(tensors, {_METADATA_KEY: network.card.to_json()})).hexdigest()
        known = _HASHES[network] = content, digest
    return known[1]


def write_once(path: Path, data: bytes) -> None:
    """Write a new file completely or not at all. If the file exists with the same content, nothing is done.

    Raises:
        FileExistsError: the file exists with other content.
    """
    if path.exists():
        if path.read_bytes() == data:
            return
        raise FileExistsError(f"{path} exists with other content. Move it away first; nothing was written.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}, expected safetensors.")
    size = path.stat().st_size
    if not 8 < size <= _MAX_BYTES:
        raise ValueError(f"{path} must be a safetensors file of at most 1 GiB, got {size} bytes.")
    return path.read_bytes()


def fill_network(network: RecoveryNetwork, tensors: dict[str, torch.Tensor], origin: str) -> None:
    """Load tensors into a network after checking their names, shapes, dtypes and values.

    Args:
        network: receives the tensors.
        tensors: the state dict.
        origin: where the tensors come from, for error messages.

    Raises:
        ValueError: tensors that are missing, unknown, of another shape or dtype, or not finite.
    """
    expected = network.state_dict()
    missing, foreign = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or foreign:
        raise ValueError(
            f"{origin}: expected the {len(expected)} tensors of {network.card.kind}, {len(missing)} missing "
            f"{missing[:3]}, {len(foreign)} foreign {foreign[:3]}."
        )
    for name, tensor in tensors.items():
        want = expected[name]
        if tensor.shape != want.shape or tensor.dtype != want.dtype:
            raise ValueError(
                f"{origin}: tensor {name!r} must be {want.dtype} {tuple(want.shape)}, got {tensor.dtype} "
                f"{tuple(tensor.shape)}."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{origin}: tensor {name!r} holds NaN or infinity. The weights are damaged.")
    network.load_state_dict(tensors)
