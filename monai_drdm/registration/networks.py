"""Registration networks behind one face: two images in, a displacement field out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from monai.networks.nets import LocalNet, RegUNet, VoxelMorphUNet
from safetensors import safe_open, SafetensorError
from safetensors.torch import save_file
from torch import nn, Tensor

from monai_drdm.documents import Document
from monai_drdm.fields import crop, exp_svf, resize_ddf, resize_image
from monai_drdm.io.files import atomically
from monai_drdm.networks.convolution import quicken_convolutions
from monai_drdm.networks.weights import read_weights
from monai_drdm.registration.aligner import check_levels, ResidualAlignerNet, SEPARABLE_STRUCTURES
from monai_drdm.registration.forces import demons_forces, GAIN, WIDTHS
from monai_drdm.registration.pyramid import PyramidNet
from monai_drdm.registration.registry import list_registrations, registration_card, registration_file

_NETWORK = Document("a registration network", "Give it the network.safetensors of a registration run.")
_META = "monai_drdm_registration"
_SQUARINGS = 6


@dataclass(frozen=True)
class Structure:
    """What a registration network is built of.

    Raises:
        TypeError: values of other types.
        ValueError: an unknown kind, or numbers out of range.
    """

    kind: str = "voxelmorph"
    """``pyramid``, ``voxelmorph``, ``aligner``, or ``regunet`` or ``localnet``, which normalise by batches and need
    larger ones."""
    spatial_dims: int = 3
    channels: int = 16
    """Features on the finest grid."""
    depth: int = 3
    """How often the grid is halved."""
    diffeomorphic: bool = True
    """Whether the network predicts a velocity, whose flow is the field; otherwise it predicts the field."""
    stride: int = 2
    """Network and flow work on a grid this many times coarser, with the voxels of each block as channels. It is faster;
    only the finest details of fields are lost."""
    forces: bool = True
    """Whether the network also gets the forces of demons as input, kind ``pyramid`` on every of its grids."""
    pool_sizes: tuple[int, ...] = SEPARABLE_STRUCTURES[3][0]
    """Of kind ``aligner``, coarse to fine; see ``ResidualAlignerNet``. Other kinds have none."""
    dilations: tuple[int, ...] = SEPARABLE_STRUCTURES[3][1]
    """Of kind ``aligner``, coarse to fine."""
    working_size: int = 0
    """Images with more voxels than that along their longest side are registered on a coarser grid, on which they have
    so many, and the field is brought to their own; 0: no images. A network knows the size of what it was trained on."""

    def __post_init__(self) -> None:
        for name in ("spatial_dims", "channels", "depth", "stride", "working_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be a whole number, got {value!r}.")
        for name in ("diffeomorphic", "forces"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        if self.kind not in _BACKBONES:
            raise ValueError(f"kind must be one of {tuple(_BACKBONES)}, got {self.kind!r}.")
        if self.spatial_dims not in (2, 3) or self.channels < 2 or self.depth < 1 or self.stride < 1:
            raise ValueError(
                "a registration network needs spatial_dims 2 or 3, channels of 2 or more, and depth and stride of 1 or "
                f"more, got {self.spatial_dims}, {self.channels}, {self.depth} and {self.stride}."
            )
        if self.working_size < 0:
            raise ValueError(f"working_size must be 0 or more, got {self.working_size}.")
        for name in ("pool_sizes", "dilations"):  # JSON has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_levels(self.pool_sizes, self.dilations)

    @property
    def in_channels(self) -> int:
        """Input channels of the backbone: the voxels of a block of both images, and the forces."""
        return int(2 * self.stride**self.spatial_dims) + self.force_channels

    @property
    def force_channels(self) -> int:
        """Input channels that hold forces; kind ``pyramid`` makes its own."""
        return len(WIDTHS) * self.spatial_dims if self.forces and self.kind != "pyramid" else 0

    @property
    def multiple(self) -> int:
        """What the size of images is padded to be a multiple of.

        The backbone of kind ``aligner`` pads by itself, but forces are differences of neighbours.
        """
        return self.stride * (1 + self.forces if self.kind == "aligner" else 2**self.depth)

    @property
    def smallest(self) -> int:
        """What the size of images is padded to at least: kind ``pyramid`` makes forces on its coarsest grid, too."""
        return self.multiple * (1 + (self.forces and self.kind == "pyramid"))


def _regunet(structure: Structure) -> nn.Module:
    dims, depth = structure.spatial_dims, structure.depth
    return RegUNet(
        dims, structure.in_channels, structure.channels, depth, out_kernel_initializer="zeros", out_channels=dims
    )


def _localnet(structure: Structure) -> nn.Module:
    dims, levels = structure.spatial_dims, tuple(range(structure.depth + 1))
    return LocalNet(
        dims,
        structure.in_channels,
        structure.channels,
        levels,  # type: ignore[arg-type]  # MONAI declares one level and takes several
        out_kernel_initializer="zeros",
        out_channels=dims,
    )


def _voxelmorph(structure: Structure) -> nn.Module:
    dims, wide = structure.spatial_dims, 2 * structure.channels
    channels = (structure.channels, *(wide,) * (2 * structure.depth - 1))
    network = VoxelMorphUNet(dims, structure.in_channels, dims, channels, (structure.channels, structure.channels))
    last = [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d))][-1]
    nn.init.zeros_(last.weight)
    assert last.bias is not None
    nn.init.zeros_(last.bias)
    return network


def _aligner(structure: Structure) -> nn.Module:
    return ResidualAlignerNet(
        structure.spatial_dims,
        structure.pool_sizes,
        structure.dilations,
        in_channels=structure.stride**structure.spatial_dims,
        pair_channels=structure.force_channels,
        channels=structure.channels,
        depth=structure.depth,
    )


def _pyramid(structure: Structure) -> nn.Module:
    dims, block = structure.spatial_dims, structure.stride**structure.spatial_dims
    return PyramidNet(dims, block, structure.channels, structure.depth, structure.diffeomorphic, structure.forces)


_BACKBONES: dict[str, Callable[[Structure], nn.Module]] = {
    "regunet": _regunet,
    "localnet": _localnet,
    "voxelmorph": _voxelmorph,
    "aligner": _aligner,
    "pyramid": _pyramid,
}


class RegistrationNetwork(nn.Module):
    """A registration network that takes images of any size and, untrained, predicts the identity.

    Args:
        structure: kind and size of the network.
    """

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self.structure = structure
        self.backbone = _BACKBONES[structure.kind](structure)
        quicken_convolutions(self.backbone)

    def forward(self, images: Tensor) -> Tensor:
        """The field that warps the moving image onto the fixed one.

        Args:
            images: ``(B, 2, *S)``: moving and fixed image in [0, 1].

        Returns:
            ``(B, D, *S)`` displacement in voxels: ``warp(moving, ddf)`` resembles ``fixed``.

        Raises:
            ValueError: the images have a wrong shape.
        """
        dims, shape = self.structure.spatial_dims, images.shape[2:]
        if images.ndim != dims + 2 or images.shape[1] != 2:
            raise ValueError(f"images must have shape (B, 2, *S) with {dims} spatial axes, got {tuple(images.shape)}.")
        return resize_ddf(self._register(resize_image(images, self._seen(shape))), shape)

    def _seen(self, shape: Sequence[int]) -> list[int]:
        """The grid on which images of a shape are registered."""
        longest, size = max(shape), self.structure.working_size
        return [max(1, round(n * size / longest)) for n in shape] if 0 < size < longest else list(shape)

    def _register(self, images: Tensor) -> Tensor:
        """The field ``(B, D, *S)`` between images ``(B, 2, *S)`` on their own grid."""
        stride = self.structure.stride
        inputs = _blocks_as_channels(_padded(images, self.structure.multiple, self.structure.smallest), stride)
        with torch.autocast(inputs.device.type, enabled=False):
            if self.structure.force_channels:
                moving, fixed = reduce(inputs.float(), "b (image c) ... -> image b 1 ...", "mean", image=2)
                inputs = torch.cat([inputs, GAIN * demons_forces(moving, fixed)], dim=1)
        predicted = self.backbone(inputs).float()
        with torch.autocast(predicted.device.type, enabled=False):
            ddf = exp_svf(predicted, _SQUARINGS) if self.structure.diffeomorphic else predicted
            return crop(_at_voxels(ddf, stride), images.shape[2:])


def _blocks_as_channels(images: Tensor, stride: int) -> Tensor:
    """``(B, C, *S)`` to ``(B, C stride^D, *S / stride)``."""
    if images.ndim == 4:
        return rearrange(images, "b c (h hs) (w ws) -> b (c hs ws) h w", hs=stride, ws=stride)
    return rearrange(images, "b c (h hs) (w ws) (d ds) -> b (c hs ws ds) h w d", hs=stride, ws=stride, ds=stride)


def _at_voxels(ddf: Tensor, stride: int) -> Tensor:
    """Resample a field with one vector at the centre of each block to the voxels, ``stride`` times finer."""
    if stride == 1:
        return ddf
    mode = "bilinear" if ddf.ndim == 4 else "trilinear"
    finer: Tensor = F.interpolate(stride * ddf, scale_factor=float(stride), mode=mode, align_corners=False)
    return finer


def _padded(images: Tensor, multiple: int, smallest: int) -> Tensor:
    room = [max(-n % multiple, smallest - n) for n in images.shape[2:]]
    return F.pad(images, [p for r in reversed(room) for p in (0, r)], "replicate")


def save_registration(network: RegistrationNetwork, path: str | os.PathLike[str]) -> None:
    """Write weights and structure as safetensors, whole or not at all."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    metadata = {_META: json.dumps(asdict(network.structure), sort_keys=True)}
    atomically(Path(path), lambda part: save_file(tensors, part, metadata))


def load_registration(name: str | os.PathLike[str], device: torch.device | str = "cpu") -> RegistrationNetwork:
    """Read a network of this package, or a file of ``save_registration``.

    Args:
        name: one of ``list_registrations()``, or a ``.safetensors`` file.
        device: where the network is to run.

    Raises:
        FileNotFoundError: no such network or file.
        ValueError: not such a file, or a damaged one.
    """
    path, known = registration_file(name), os.fspath(name)
    pinned = registration_card(known).sha256 if known in list_registrations() else None
    tensors, described, _ = read_weights(path, _NETWORK, _META, pinned)
    with _NETWORK.reading(path, RuntimeError):
        structure = Structure(**_NETWORK.parse_json(described, path))
        with torch.device("meta"):  # which takes no memory, however large a damaged file says the network is
            network = RegistrationNetwork(structure)
        network.load_state_dict(tensors, assign=True)
    if not all(bool(torch.isfinite(value).all()) for value in tensors.values()):
        raise ValueError(f"{path} holds weights that are NaN or infinite.")
    return network.eval().to(device)


def is_registration(path: str | os.PathLike[str]) -> bool:
    """Whether a safetensors file says of itself that it is a registration network; False if it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return _META in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def kinds() -> Sequence[str]:
    """Known kinds of networks."""
    return tuple(_BACKBONES)
