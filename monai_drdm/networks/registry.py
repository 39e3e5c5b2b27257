"""The networks that are known by name, and where their weights are.

This module needs no torch, so that commands which only look up names start fast.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from monai_drdm.networks.card import NetworkCard

_REPOSITORY = "https://raw.githubusercontent.com/jianqingzheng/def_diff_rec"
_COMMIT = "1c70370f0e0159161daae726d96d6cf975cac5ef"
_SOURCE = "Zheng et al., Medical Image Analysis 110, 2026, 103987; github.com/jianqingzheng/def_diff_rec"


@dataclass(frozen=True)
class PublishedFile:
    """Where the authors publish a ``.pth`` file, and the hash by which it is recognised."""

    url: str
    sha256: str = ""
    """Empty as long as no hash has been verified; the file is then recognised by its git blob id."""
    git_blob: str = ""
    """The id under which git stores the file, as the authors' repository lists it."""


_OPEN_SCANS = (
    "random anatomy; IXI brains (brain-development.org, CC BY-SA 3.0); Medical Segmentation Decathlon hippocampus "
    "(Antonelli et al., Nature Communications 2022, CC BY-SA 4.0)"
)
_CHEST_XRAYS = "chest X-rays (U.S. National Library of Medicine; Jaeger et al. 2014, Candemir et al. 2014)"
_OURS = "trained with monai_drdm.train; docs/models.md has data, command and figures"

_CARDS = {
    card.name: card
    for card in (
        NetworkCard(
            name="anatomy-2d",
            kind="velocity_unet",
            spatial_dims=2,
            working_size=161,
            channels=(16, 32, 64, 96),
            sampler="velocity",
            steps=12,
            sha256="421e3627a80c0cc2d8ae47f314d4fd0fd1b2a79c88da853a953e93014e6c908c",
            source=_OURS,
            licence="Apache-2.0; the licences of the training data are with them",
            training_data=f"{_OPEN_SCANS}; {_CHEST_XRAYS}",
            gates={  # means over test images at level 0.6, 12 steps; benchmarks/plausibility/gates.py
                "acdc_px_without_affine_256": 6.29,
                "acdc_log_jacobian_std": 0.197,
                "acdc_diversity": 0.818,
                "acdc_fold_fraction": 0.0,
                "cxr_px_without_affine_256": 4.84,
                "cxr_log_jacobian_std": 0.145,
                "cxr_diversity": 0.957,
                "cxr_fold_fraction": 0.0,
                "ixi_px_without_affine_256": 5.29,
                "ixi_log_jacobian_std": 0.141,
                "ixi_diversity": 0.937,
                "ixi_fold_fraction": 0.0,
                "nuclei_px_without_affine_256": 7.89,
                "nuclei_log_jacobian_std": 0.193,
                "nuclei_diversity": 0.963,
                "nuclei_fold_fraction": 0.0,
                "limbct_px_without_affine_256": 8.10,
                "limbct_log_jacobian_std": 0.240,
                "limbct_diversity": 0.900,
                "limbct_fold_fraction": 0.0,
                "limbmr_px_without_affine_256": 7.36,
                "limbmr_log_jacobian_std": 0.229,
                "limbmr_diversity": 0.912,
                "limbmr_fold_fraction": 0.0,
            },
        ),
        NetworkCard(
            name="anatomy-3d",
            kind="velocity_unet",
            spatial_dims=3,
            working_size=81,
            channels=(16, 32, 48, 64),
            sampler="velocity",
            steps=12,
            sha256="303f152a9d126dbaf1e0b877720c9eeaee6e8a4f8b3e2a6ee737eed45df3b6f4",
            source=_OURS,
            licence="Apache-2.0; the licences of the training data are with them",
            training_data=_OPEN_SCANS,
            gates={  # means over test images at level 0.6, 12 steps; benchmarks/plausibility/gates.py
                "hippocampus3d_px_without_affine_256": 4.83,
                "hippocampus3d_log_jacobian_std": 0.123,
                "hippocampus3d_diversity": 0.971,
                "hippocampus3d_fold_fraction": 0.0,
                "ixi3d_px_without_affine_256": 4.22,
                "ixi3d_log_jacobian_std": 0.104,
                "ixi3d_diversity": 0.984,
                "ixi3d_fold_fraction": 0.0,
            },
        ),
        NetworkCard(
            name="zheng2026-cmr-2d",
            kind="recresacnet",
            spatial_dims=2,
            working_size=256,
            sha256="b10b186406ca420ee543d2058b47dcc321b6dfeb3d022ecb64fec3f1bc96a47f",
            source=_SOURCE,
            licence="Apache-2.0 (the authors' release)",
            training_data="cardiac MR slices, by the authors",
        ),
        NetworkCard(
            name="zheng2026-lct-3d",
            kind="recresacnet",
            spatial_dims=3,
            working_size=128,
            source=_SOURCE,
            licence="Apache-2.0 (the authors' release)",
            training_data="lung CT volumes, by the authors",
        ),
    )
}

_PUBLISHED = {
    "zheng2026-cmr-2d": PublishedFile(
        url=f"{_REPOSITORY}/{_COMMIT}/models/cmr_recresacnet/000000_cmr_recresacnet.pth",
        sha256="c9e93ccbd99ad288bb1c961f980141d2c8c91115e8a5986d7a20a98f64ae8e93",
    ),
    "zheng2026-lct-3d": PublishedFile(
        url=f"{_REPOSITORY}/{_COMMIT}/models/lct_recresacnet/000000_lct_recresacnet.pth",
        git_blob="6309023cefe116cd55fb8307ad37b38d47448990",
    ),
}

_AUTO = {2: "anatomy-2d", 3: "anatomy-3d"}
_SHIPPED = Path(__file__).parent / "shipped"


def list_networks() -> tuple[str, ...]:
    """Names that ``load_network`` and the transforms accept, in alphabetical order."""
    return tuple(sorted(_CARDS))


def network_card(name: str) -> NetworkCard:
    """The card of a known network.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name == "auto":
        raise ValueError(f"network 'auto' depends on the image. Name {_AUTO[2]} for 2D or {_AUTO[3]} for 3D here.")
    if name not in _CARDS:
        raise ValueError(
            f"network must be 'auto', one of {', '.join(list_networks())} or a .safetensors file, got {name!r}."
        )
    return _CARDS[name]


def list_published() -> tuple[str, ...]:
    """Names of the networks that the authors publish, in alphabetical order."""
    return tuple(sorted(_PUBLISHED))


def published_file(name: str) -> PublishedFile:
    """Where the authors publish a known network.

    Raises:
        ValueError: unknown name, or a network that comes with this package.
    """
    network_card(name)
    if name not in _PUBLISHED:
        raise ValueError(f"network {name!r} comes with this package; published are {', '.join(list_published())}.")
    return _PUBLISHED[name]


def shipped_file(name: str) -> Path | None:
    """The weights file of a known network inside this package; None for a network that is published elsewhere."""
    network_card(name)
    return None if name in _PUBLISHED else _SHIPPED / f"{name}.safetensors"


def weights_folder() -> Path:
    """The folder of converted and downloaded weights.

    ``MONAI_DRDM_WEIGHTS`` names it; without that variable it is ``monai_drdm`` in the user's cache folder.
    """
    chosen = os.environ.get("MONAI_DRDM_WEIGHTS")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(cache) / "monai_drdm"


def known_file(name: str) -> Path:
    """Where the weights of a known network are, or will be once they are downloaded.

    A file in ``weights_folder()`` has precedence over the one in this package.

    Raises:
        ValueError: unknown name.
    """
    path, shipped = weights_folder() / f"{name}.safetensors", shipped_file(name)
    return path if shipped is None or path.is_file() else shipped


def auto_network(spatial_dims: int) -> str:
    """Name of the default network for 2D or 3D images.

    Raises:
        ValueError: not 2 or 3.
    """
    if spatial_dims not in _AUTO:
        raise ValueError(f"network='auto': there is no default network for {spatial_dims}D images, only 2D and 3D.")
    return _AUTO[spatial_dims]
