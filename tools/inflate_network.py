"""Turn a trained 2D network into a 3D network to start training from, since training from scratch is slow in 3D.

The kernels act within the planes of the last two axes, so the new network predicts for every slice what the old one
predicts for it, and no velocity across slices. A 3D field of level s moves images about as far as a 2D one of s / 2,
so the octaves that encode the level shift by one.

    python tools/inflate_network.py network2d.safetensors network3d.safetensors
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from monai_drdm.networks import load_network, save_network, VelocityUNet


def inflate(flat: VelocityUNet) -> VelocityUNet:
    solid = VelocityUNet(3, flat.in_channels, flat.card.channels)
    values = solid.state_dict()
    for name, old in flat.state_dict().items():
        new = torch.zeros_like(values[name])
        if old.ndim == 4:
            rows = slice(1, 3) if name == "out.weight" else slice(None)
            new[rows, :, new.shape[2] // 2] = old
        elif name == "out.bias":
            new[1:] = old
        else:
            new = old.clone()
        values[name] = new
    first = values["embed.0.weight"]
    sines, cosines = first.chunk(2, dim=1)
    values["embed.0.weight"] = torch.cat([part.roll(-1, 1) * _all_but_last(part) for part in (sines, cosines)], dim=1)
    solid.load_state_dict(values)
    card = flat.card
    solid.card = dataclasses.replace(
        solid.card, name=f"{card.name}-inflated", working_size=card.working_size, training_data=card.training_data
    )
    return solid


def _all_but_last(columns: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(columns)
    mask[:, -1] = 0
    return mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="a 2D velocity_unet: name or file")
    parser.add_argument("out", type=Path, help="new .safetensors file")
    options = parser.parse_args()
    flat = load_network(options.network)
    if not isinstance(flat, VelocityUNet) or flat.spatial_dims != 2:
        raise SystemExit(f"{options.network} is no 2D velocity_unet.")
    print(save_network(inflate(flat), options.out))


if __name__ == "__main__":
    main()
