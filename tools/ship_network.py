"""Copy a trained network into the package, under a name that is in one of the registries.

Its card is that of the registry without the measured gates, so that later measurements do not change the file.
Prints the hash to pin in the registry.

    python tools/ship_network.py run/network.safetensors anatomy-2d
    python tools/ship_network.py run/network.safetensors registration-3d
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path

from monai_drdm.networks import load_network, network_card, NetworkCard, save_network
from monai_drdm.networks.registry import shipped_file
from monai_drdm.registration import list_registrations, load_registration, registration_card, save_registration
from monai_drdm.registration.registry import registration_file

LIMIT_BYTES = 4_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path, help="trained .safetensors file")
    parser.add_argument("name", help="name in the registry")
    options = parser.parse_args()
    ship = ship_registration if options.name in list_registrations() else ship_recovery
    print(ship(options.network, options.name))


def ship_recovery(trained: Path, name: str) -> str:
    """Ship a network that deforms; its hash."""
    network, card, path = load_network(trained), network_card(name), shipped_file(name)
    if path is None:
        raise SystemExit(f"{name} is published elsewhere.")
    found = network.card
    if (found.kind, found.channels, found.working_size) != (card.kind, card.channels, card.working_size):
        raise SystemExit(f"{trained} is another network than the registry's {name}: {found}")
    network.card = NetworkCard(
        card.name,
        card.kind,
        card.spatial_dims,
        card.working_size,
        channels=card.channels,
        sampler=card.sampler,
        steps=card.steps,
        level=card.level,
        licence=card.licence,
        training_data=card.training_data,
    )
    return shipped(path, lambda new: save_network(network, new))


def ship_registration(trained: Path, name: str) -> str:
    """Ship a network that registers; its hash."""
    network, card = load_registration(trained), registration_card(name)
    if network.structure.spatial_dims != card.spatial_dims:
        raise SystemExit(f"{trained} is another network than the registry's {name}: {network.structure}")
    return shipped(registration_file(name), lambda new: save_registration(network, new))


def shipped(path: Path, save: Callable[[Path], object]) -> str:
    """Write a file of the package, if it is small enough; its hash."""
    path.parent.mkdir(exist_ok=True)
    new = path.with_name(f"new-{path.name}")
    save(new)
    size = new.stat().st_size
    if size > LIMIT_BYTES:
        new.unlink()
        raise SystemExit(f"{path.name} would have {size} bytes, more than {LIMIT_BYTES}.")
    new.replace(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
