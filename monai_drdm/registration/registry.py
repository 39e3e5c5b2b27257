"""The registration networks that come with this package. This module needs no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from monai_drdm.networks.registry import list_networks


@dataclass(frozen=True)
class RegistrationCard:
    """A description of a registration network that is known by name."""

    name: str
    spatial_dims: int
    sha256: str
    """Hash of its weights file."""
    licence: str
    training_data: str
    source: str
    gates: Mapping[str, float]
    """Measured results by name."""


_CARDS = {
    card.name: card
    for card in (
        RegistrationCard(
            name="registration-3d",
            spatial_dims=3,
            sha256="a0375876aa09f3b1f4282fdffdb05001f270713fa32563283ef1065c52bb3a2e",
            licence="Apache-2.0; the licences of the training data are with them",
            training_data="IXI brains (brain-development.org, CC BY-SA 3.0); Medical Segmentation Decathlon "
            "hippocampus (Antonelli et al., Nature Communications 2022, CC BY-SA 4.0); copies of both by anatomy-3d",
            source="trained with monai-drdm register; docs/registration.md has data, command and figures",
            gates={  # means over test pairs after the affine map; benchmarks/registration/stages.py
                "hippocampus_dice": 0.7562,
                "hippocampus_fold_fraction": 4.142e-06,
                "ixi_dice": 0.7239,
                "ixi_fold_fraction": 0.0,
            },
        ),
    )
}
_SHIPPED = Path(__file__).parent / "shipped"


def list_registrations() -> tuple[str, ...]:
    """Names that ``load_registration`` accepts, in alphabetical order."""
    return tuple(sorted(_CARDS))


def registration_card(name: str) -> RegistrationCard:
    """The card of a network of this package.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in _CARDS:
        raise ValueError(f"registration network must be one of {', '.join(list_registrations())}, got {name!r}.")
    return _CARDS[name]


def registration_file(name: str | os.PathLike[str]) -> Path:
    """The file of a network, which is named as for ``load_registration``.

    Raises:
        FileNotFoundError: no such network or file.
    """
    if os.fspath(name) in _CARDS:
        return _SHIPPED / f"{os.fspath(name)}.safetensors"
    if not Path(name).is_file():
        raise FileNotFoundError(f"no registration network {os.fspath(name)}. {_advice(os.fspath(name))}")
    return Path(name)


def _advice(name: str) -> str:
    """What to do if there is no registration network of this name."""
    known = f"{', '.join(list_registrations())} or the network.safetensors of a registration run"
    if name in ("auto", *list_networks()):
        return (
            "A network of that name deforms one scan and cannot register two. Leave the network out and use the affine "
            f"map and the refinement (--affine --refine 40), or give {known}."
        )
    return f"Give {known}."
