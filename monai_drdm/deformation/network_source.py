"""The network of a transform, which is loaded at the first draw, once per process."""

from __future__ import annotations

import copy
import multiprocessing
import multiprocessing.context
import os
import threading
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch

from monai_drdm.deformation.options import NetworkLike
from monai_drdm.networks import auto_network, load_network, network_card, RecoveryNetwork, weights_folder


class NetworkSource:
    """A network by name, path or object, on whatever device it is asked for.

    Args:
        network: registry name, path of a safetensors file, loaded network, or ``"auto"``.

    Raises:
        TypeError: something else.
        ValueError: an unknown name.
    """

    def __init__(self, network: NetworkLike) -> None:
        if not isinstance(network, (str, os.PathLike, RecoveryNetwork)):
            raise TypeError(f"network must be a name, a path or a loaded network, got {type(network).__name__}.")
        if not isinstance(network, RecoveryNetwork):
            name = os.fspath(network)
            if name != "auto" and not name.endswith(".safetensors"):
                network_card(name)
        self.network = network
        self._moved: dict[torch.device, tuple[object, RecoveryNetwork]] = {}

    def __getstate__(self) -> dict[str, object]:
        """The state without the copies on other devices."""
        return {**self.__dict__, "_moved": {}}

    def load(self, dims: int, device: torch.device) -> RecoveryNetwork:
        """The network for images of ``dims`` spatial axes, on a device.

        Raises:
            RuntimeError: CUDA was asked for in a forked process.
            ValueError: a network of other dimensions or channels.
        """
        if device.type == "cuda":
            _refuse_forked_cuda()
        device = torch.empty(0, device=device).device  # an empty tensor knows the index that "cuda" stands for
        network = self._on_device(device) if isinstance(self.network, RecoveryNetwork) else self._by_name(dims, device)
        _check_dims(network, dims)
        return network

    def _by_name(self, dims: int, device: torch.device) -> RecoveryNetwork:
        assert not isinstance(self.network, RecoveryNetwork)
        name = auto_network(dims) if self.network == "auto" else os.fspath(self.network)
        with _LOCK:  # several threads that fire at once would otherwise load it twice
            return _shared_network(name, str(device), *_whereabouts(name))

    def _on_device(self, device: torch.device) -> RecoveryNetwork:
        """The given network, or a copy of it on another device. The network of the caller is not moved."""
        assert isinstance(self.network, RecoveryNetwork)
        if next(self.network.parameters()).device == device:
            return self.network
        # what counts the changes of each tensor, so that weights that are trained on or loaded later are moved again
        tensors = self.network.state_dict().values()
        state = tuple((one.data_ptr(), 0 if one.is_inference() else one._version) for one in tensors)
        if device not in self._moved or self._moved[device][0] != state:
            self._moved[device] = state, copy.deepcopy(self.network).to(device)
        return self._moved[device][1]


_LOCK = threading.Lock()
_SEEN: dict[Path, tuple[object, ...]] = {}
"""The latest state of every file that was asked for."""


def _unlock_in_child() -> None:
    """Replace the lock after a fork: if another thread held it at that moment, nobody would ever release the copy."""
    global _LOCK
    _LOCK = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_in_child)


@lru_cache(maxsize=8)
def _shared_network(name: str, device: str, *whereabouts: object) -> RecoveryNetwork:
    """Load a network once per process, name, device and location."""
    return load_network(name, device)


def _whereabouts(name: str) -> tuple[object, ...]:
    """Distinguishes networks of the same name: by the weights folder, or by the file and its latest change."""
    if not name.endswith(".safetensors"):
        return (str(weights_folder()),)
    path = Path(name).resolve()
    with suppress(OSError):  # the file may have been deleted after it was loaded
        state = path.stat()
        _SEEN[path] = (str(path), state.st_mtime_ns, state.st_size, state.st_ino)
    return _SEEN.get(path, (str(path),))


def _refuse_forked_cuda() -> None:
    """Raise ``RuntimeError`` if CUDA would be used in a forked process, where it cannot work."""
    fork = getattr(multiprocessing.context, "ForkProcess", None)  # there is none on Windows
    if fork is not None and isinstance(multiprocessing.current_process(), fork):
        raise RuntimeError(
            "RandDRDMDeform was asked for CUDA in a forked worker process, where CUDA cannot be used. Start the "
            "DataLoader's workers with multiprocessing_context='spawn' or 'forkserver', use num_workers=0, or leave "
            "the network on the CPU (device='cpu', images on the CPU)."
        )


def _check_dims(network: RecoveryNetwork, dims: int) -> None:
    card = network.card
    if card.spatial_dims != dims:
        raise ValueError(
            f"network {card.name!r} deforms {card.spatial_dims}D images, got an image of {dims} spatial dimensions. "
            + (
                "Pass slice_axis= to move a whole stack by one in-plane field, deform 2D slices, or pass a 3D network."
                if dims == 3
                else "Pass a 2D network."
            )
        )
    if card.in_channels != 1:
        raise ValueError(f"network {card.name!r} must have one input channel, got {card.in_channels}.")
