"""How a registration network is trained: on pairs with known fields, or on images that are to resemble each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from monai.losses import DiceLoss, DiffusionLoss, LocalNormalizedCrossCorrelationLoss
from torch import nn, Tensor

from monai_drdm.fields import warp
from monai_drdm.registration.augmentation import mirrored, posed, repainted
from monai_drdm.registration.data import ImageBank, load_images, load_pairs, PairBank, RegistrationBatch
from monai_drdm.registration.networks import kinds, load_registration, RegistrationNetwork, save_registration, Structure
from monai_drdm.train.data import digest_of
from monai_drdm.train.losses import folding_loss
from monai_drdm.training.loop import Predict, run_task, Task
from monai_drdm.training.settings import RunConfig, setting
from monai_drdm.viz import contact_sheet, Figure, middle_plane, SheetEntry

_SHEET = 6
_WINDOW = 9


@dataclass(frozen=True)
class RegistrationConfig(RunConfig):
    """Settings of a run that trains a registration network.

    Raises:
        TypeError: an entry of a wrong type.
        ValueError: an entry out of its range; both or neither of ``pairs`` and ``images``.
    """

    pairs: str = setting("", "folder of monai-drdm pairs, or its datalist: trains on their known fields")
    images: str = setting("", "folder or datalist of images: trains to make them resemble each other")
    labels: str = setting("", "folder of label maps with the file names of the images")
    section: str = setting("training", "section of the datalist")
    spatial_dims: int = setting(3, "2 or 3", choices=(2, 3))
    network: str = setting("voxelmorph", "kind of network", choices=("voxelmorph", "regunet", "localnet"))
    channels: int = setting(16, "features on the finest grid of the network", low=2, high=256)
    depth: int = setting(3, "how often the grid is halved", low=1, high=6)
    diffeomorphic: bool = setting(True, "the network predicts a velocity, whose flow is the field")
    stride: int = setting(2, "the network works on a grid this many times coarser", low=1, high=4)
    forces: bool = setting(True, "the network also sees where demons would push")
    init: str = setting("", "network.safetensors of an earlier run to go on from, whose structure it takes")
    error_weight: float = setting(1.0, "of the distance to the known field in voxels; with pairs", low=0)
    similarity_weight: float = setting(1.0, "of local normalised cross-correlation; with images", low=0)
    label_weight: float = setting(0.0, "of the overlap of labels (Dice), where there are labels", low=0)
    smoothness_weight: float = setting(0.1, "of squared differences of the field between neighbours", low=0)
    folding_weight: float = setting(1.0, "of the folding penalty", low=0)
    mirror: bool = setting(True, "mirror pairs along every axis at random, the field with them")
    pose: float = setting(
        0.02, "how far fixed images with known fields are turned, stretched and shifted", low=0, high=1
    )
    repaint: float = setting(0.1, "how differently bright the two images are made, each on its own", low=0, high=1)
    validation_share: float = setting(0.1, "share of the pairs or images kept for validation", low=0, high=0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.pairs) == bool(self.images):
            raise ValueError("set either pairs (known fields) or images (to resemble each other), not both or neither.")
        if self.labels and not self.images:
            raise ValueError("labels goes with images; pairs bring their own.")
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", 1e-3)
        assert self.network in kinds()


class RegistrationTask(Task):
    """For the engine of ``monai_drdm.train``."""

    config: RegistrationConfig

    def __init__(self, config: RegistrationConfig) -> None:
        self.start = load_registration(config.init) if config.init else None
        if self.start is not None:  # what is written down is what is trained
            built = asdict(self.start.structure)
            if built.pop("spatial_dims") != config.spatial_dims:
                raise ValueError(
                    f"init must be a {config.spatial_dims}D network, got {self.start.structure.spatial_dims}D."
                )
            config = replace(config, network=built.pop("kind"), **built)
        self.config = config
        self.training: PairBank | ImageBank | None = None
        self.validation: PairBank | ImageBank | None = None
        self.similarity = LocalNormalizedCrossCorrelationLoss(config.spatial_dims, _WINDOW, reduction="mean")
        self.smoothness = DiffusionLoss()
        self.overlap = DiceLoss()

    def prepare(self, progress: bool) -> str:
        """Read the pairs or images."""
        config = self.config
        bank: PairBank | ImageBank
        if config.pairs:
            bank = load_pairs(config.pairs, spatial_dims=config.spatial_dims, section=config.section, progress=progress)
        else:
            bank = load_images(
                config.images,
                config.labels or None,
                spatial_dims=config.spatial_dims,
                section=config.section,
                progress=progress,
            )
        labelled = bank.labels is not None if isinstance(bank, ImageBank) else bank.pairs.fixed_label is not None
        if config.label_weight > 0 and not labelled:
            raise ValueError("label_weight needs labels of all images, got none; give labels or set it to 0.")
        self.training, self.validation = bank.split(config.validation_share)
        return ""

    def fingerprint(self) -> str:
        """Of the pairs or images of both parts."""
        tensors: list[Tensor | None] = []
        for bank in (self.training, self.validation):
            assert bank is not None
            tensors += [bank.images, bank.labels] if isinstance(bank, ImageBank) else vars(bank.pairs).values()
        return digest_of(tensor for tensor in tensors if tensor is not None)

    def network(self) -> nn.Module:
        """A new network, or the one to go on from."""
        config, network = self.config, self.start
        if network is None:
            network = RegistrationNetwork(
                Structure(
                    config.network,
                    config.spatial_dims,
                    config.channels,
                    config.depth,
                    config.diffeomorphic,
                    config.stride,
                    config.forces,
                )
            )
        return network.train().requires_grad_(True)

    def batch(
        self, network: Predict, generator: torch.Generator, *, validate: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...], RegistrationBatch]:
        """Moving and fixed images as two channels, repainted in training, and the pairs they are of."""
        bank = self.validation if validate else self.training
        assert bank is not None
        pairs = bank.draw(self.config.batch_size, generator)
        seen = [pairs.moving, pairs.fixed]
        if not validate:
            pairs = mirrored(pairs, generator) if self.config.mirror else pairs
            pairs = posed(pairs, self.config.pose, generator)
            seen = [repainted(one, self.config.repaint, generator) for one in (pairs.moving, pairs.fixed)]
        return torch.cat(seen, dim=1), (), pairs

    def error(self, predicted: Tensor, target: RegistrationBatch) -> Tensor:
        """With known fields the mean distance to them in voxels; else dissimilarity."""
        config = self.config
        if target.ddf is not None:
            apart = (predicted - target.ddf).norm(dim=1, keepdim=True)
            inside = target.inside.sum().clamp(min=1)  # strong poses may turn all of a small image out of sight
            known: Tensor = config.error_weight * (apart * target.inside).sum() / inside
            return known
        loss: Tensor = config.similarity_weight * (1 + self.similarity(warp(target.moving, predicted), target.fixed))
        return loss if config.label_weight == 0 else loss + config.label_weight * self._overlap(predicted, target)

    def loss(self, predicted: Tensor, target: RegistrationBatch) -> Tensor:
        """The error and what keeps fields smooth."""
        config = self.config
        loss = self.error(predicted, target)
        if target.ddf is not None and config.label_weight > 0:
            loss = loss + config.label_weight * self._overlap(predicted, target)
        if config.smoothness_weight > 0:
            loss = loss + config.smoothness_weight * self.smoothness(predicted)
        if config.folding_weight > 0:
            loss = loss + config.folding_weight * folding_loss(predicted)
        return loss

    def _overlap(self, predicted: Tensor, target: RegistrationBatch) -> Tensor:
        """Dice loss over the structures that the batch holds, background aside."""
        assert target.moving_label is not None
        assert target.fixed_label is not None
        there = torch.unique(torch.cat([target.moving_label, target.fixed_label]))
        ids = there[there > 0].view(1, -1, *(1,) * (predicted.ndim - 2))
        if not ids.numel():
            return predicted.new_zeros(())
        moving, fixed = ((one == ids).float() for one in (target.moving_label, target.fixed_label))
        overlap: Tensor = self.overlap(warp(moving, predicted), fixed)
        return overlap

    @torch.no_grad()
    def sheet(self, network: nn.Module, generator: torch.Generator) -> Figure:
        """Fixed images above the moving ones as the network warps them, outlines of labels where there are any."""
        images, _, pairs = self.batch(network, generator, validate=True)
        training = network.training
        ddf = network.eval()(images).float()
        network.train(training)
        warped = warp(pairs.moving, ddf)
        labels: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(warped)
        if pairs.moving_label is not None and pairs.fixed_label is not None:
            moved = warp(pairs.moving_label, ddf, "nearest")
            labels = [(middle_plane(a), middle_plane(b)) for a, b in zip(pairs.fixed_label, moved)]
        entries = [
            SheetEntry(f"fixed {i}", middle_plane(fixed), middle_plane(made), *marks, after_name="moving, warped")
            for i, (fixed, made, marks) in enumerate(zip(pairs.fixed, warped, labels))
        ]
        return contact_sheet(entries[:_SHEET])

    def write(self, network: nn.Module, weights: Path, gates: Mapping[str, float]) -> None:
        """Weights and structure."""
        assert isinstance(network, RegistrationNetwork)
        save_registration(network, weights)


def fit(
    config: RegistrationConfig,
    out: str | Path,
    *,
    resume: bool = False,
    progress: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Train a registration network, on known fields (paper, Algorithm 4) or unsupervised; see ``monai_drdm.train.fit``.

    Args:
        config: the settings.
        out: a new or empty folder or, with ``resume``, that of a run with the same settings.
        resume: go on from the latest intact checkpoint.
        progress: show a progress bar.
        should_stop: asked after every step; once it says yes, the run saves and returns.

    Returns:
        The weights file, or None if the run was told to stop before its end.

    Raises:
        FileExistsError: the folder is in use, or holds something and not ``resume``.
        ValueError: ``resume`` with other settings, or data that do not fit.
        FloatingPointError: a loss that is not finite; names the batch.
    """
    return run_task(RegistrationTask(config), Path(out), resume=resume, progress=progress, should_stop=should_stop)
