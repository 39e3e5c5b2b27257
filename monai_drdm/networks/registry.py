"""The networks known by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from monai_drdm.networks.card import NetworkCard

_REPOSITORY = "https://raw.githubusercontent.com/jianqingzheng/def_diff_rec"
_COMMIT = "1c70370f0e0159161daae726d96d6cf975cac5ef"
_SOURCE = "Zheng et al., Medical Image Analysis 110, 2026, 103987; github.com/jianqingzheng/def_diff_rec"


@dataclass(frozen=True)
class PublishedFile:
    """Where the authors publish a ``.pth`` and how it is recognised."""

    url: str
    sha256: str = ""
    """Empty while nobody has verified one; then the file can be recognised by its git blob id only."""
    git_blob: str = ""


_CARDS = {
    card.name: card
    for card in (
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

_AUTO = {2: "zheng2026-cmr-2d"}


_SHIPPED = Path(__file__).parent / "shipped"


def list_networks() -> tuple[str, ...]:
    """Names that ``load_network`` and the transforms know, in alphabetical order."""
    return tuple(sorted(_CARDS))


def network_card(name: str) -> NetworkCard:
    """The card of a known network.

    Raises:
        ValueError: unknown name; lists the known ones.
    """
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
    """The weights of a known network inside this package; None for those that are published elsewhere."""
    network_card(name)
    return None if name in _PUBLISHED else _SHIPPED / f"{name}.safetensors"


def auto_network(spatial_dims: int) -> str:
    """Name of the default network for images of a dimension.

    Raises:
        ValueError: there is none yet.
    """
    if spatial_dims not in _AUTO:
        raise ValueError(
            f"network='auto': there is no default network for {spatial_dims}D images yet. Pass network= a loaded "
            f"{spatial_dims}D network or the path of its .safetensors file, or deform 2D slices."
        )
    return _AUTO[spatial_dims]
