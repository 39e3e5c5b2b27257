"""Copy a trained network into the package, under a name that is in the registry.

Its card is that of the registry without the measured gates, so that later measurements do not change the file.
Prints the hash to pin in the registry.

    python tools/ship_network.py run/network.safetensors anatomy-2d
"""

from __future__ import annotations

import argparse
from pathlib import Path

from monai_drdm.networks import load_network, network_card, NetworkCard, save_network
from monai_drdm.networks.registry import shipped_file

LIMIT_BYTES = 4_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path, help="trained .safetensors file")
    parser.add_argument("name", help="name in the registry")
    options = parser.parse_args()
    network, card, path = load_network(options.network), network_card(options.name), shipped_file(options.name)
    if path is None:
        raise SystemExit(f"{options.name} is published elsewhere.")
    trained = network.card
    if (trained.kind, trained.channels, trained.working_size) != (card.kind, card.channels, card.working_size):
        raise SystemExit(f"{options.network} is another network than the registry's {options.name}: {trained}")
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
    new = path.with_name(f"new-{path.name}")
    digest, size = save_network(network, new), new.stat().st_size
    if size > LIMIT_BYTES:
        new.unlink()
        raise SystemExit(f"{options.network} needs {size} bytes, more than {LIMIT_BYTES}.")
    new.replace(path)
    print(digest)


if __name__ == "__main__":
    main()
