"""The settings of a run that trains a registration network. This module needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from monai_drdm.training.settings import RunConfig, setting

KINDS = ("pyramid", "voxelmorph", "aligner", "regunet", "localnet")
"""The kinds of registration networks."""


@dataclass(frozen=True)
class RegistrationConfig(RunConfig):
    """Settings of a run that trains a registration network.

    Raises:
        TypeError: a setting has a wrong type.
        ValueError: a setting is out of its range; both or neither of ``pairs`` and ``images`` are set.
    """

    pairs: str = setting("", "folder of monai-drdm pairs, or its datalist: trains on their known fields")
    images: str = setting("", "folder or datalist of images: trains to make them resemble each other")
    labels: str = setting("", "folder of label maps with the file names of the images")
    section: str = setting("training", "section of the datalist")
    drawn_level: float = setting(
        0.0,
        "with images: draw pairs with known fields in every step, by random fields of this level at most; 0: register "
        "images with each other",
        low=0,
        high=1,
    )
    affine: bool = setting(
        False,
        "with images: bring moving images into the pose of the fixed ones first, by an affine map of each image to the "
        "first of its group, for networks that register(affine=True) uses",
    )
    spatial_dims: int = setting(3, "2 or 3", choices=(2, 3))
    network: str = setting(
        "voxelmorph", "kind of network: pyramid, voxelmorph, aligner, regunet or localnet", choices=KINDS
    )
    channels: int = setting(16, "features on the finest grid of the network", low=2, high=256)
    depth: int = setting(3, "how often the grid is halved", low=1, high=6)
    diffeomorphic: bool = setting(True, "the network predicts a velocity, whose flow is the field")
    stride: int = setting(2, "the network works on a grid this many times coarser", low=1, high=4)
    forces: bool = setting(True, "the network also sees where demons would push")
    pool_sizes: tuple[int, ...] = setting(
        (2, 2, 2, 2, 1), "of the levels of network aligner, coarse to fine; [16,8,4,2,1] is a classical pyramid", low=1
    )
    dilations: tuple[int, ...] = setting((8, 4, 2, 1, 1), "of the levels of network aligner, coarse to fine", low=1)
    working_size: int = setting(
        0,
        "larger images are registered on a coarser grid with so many voxels along the longest side; 0: on their own",
        low=0,
    )
    init: str = setting("", "network.safetensors of an earlier run to go on from, whose structure it takes")
    error_weight: float = setting(1.0, "of the distance to the known field in voxels; with pairs", low=0)
    relative_error: bool = setting(False, "divide that distance by the mean length of the known field")
    similarity_weight: float = setting(1.0, "of local normalised cross-correlation; with images", low=0)
    similarity_window: int = setting(9, "voxels along each side of the windows in which images are correlated", low=3)
    similarity_scales: tuple[int, ...] = setting(
        (1,),
        "on which grids images are compared, so many times coarser; [1,2,4] also lets what is far apart meet",
        low=1,
    )
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
        if self.drawn_level and not self.images:
            raise ValueError("drawn_level goes with images, of which pairs are drawn; pairs bring their own fields.")
        if self.affine and (not self.images or self.drawn_level):
            raise ValueError(
                "affine goes with images that are registered with each other; the fields of other pairs are known."
            )
        if self.similarity_window % 2 == 0:
            raise ValueError(f"similarity_window must be odd, got {self.similarity_window}.")
        if not self.similarity_scales:
            raise ValueError("similarity_scales must name a grid or more, got none; (1,) is that of the images.")
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", 1e-3)
        if self.optimizer is None:
            object.__setattr__(self, "optimizer", "adamw")
