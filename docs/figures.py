"""Draws the pictures of "How it works" from data that anybody has: an MR volume in nibabel's test data.

    python docs/figures.py            # writes docs/images/*.png, in about ten seconds
    python docs/figures.py --out DIR

They show what the package computes: fields come from its sampler with the network `anatomy-2d`, and nothing is painted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import nibabel as nib
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from monai_drdm.deformation import FieldDrawer
from monai_drdm.diffusion import DRDM
from monai_drdm.diffusion.schedule import integration_time
from monai_drdm.fields import exp_svf, fold_fraction, gaussian_smooth, isotropic_velocity, resize_ddf, warp, warp_points
from monai_drdm.networks import load_network
from monai_drdm.viz import plot_jacobian, plot_warped_grid
from monai_drdm.viz.figures import LABEL_AFTER, LABEL_BEFORE, plot_outlines, show_image

SPACING = (2.0, 2.0)
"""Millimetres per pixel of the slice."""
SEED, LEVEL = 6, 0.6
DPI = 110


def read_slice() -> tuple[Tensor, Tensor]:
    """A slice ``(112, 112)`` in [0, 1] with room around, and labels by thresholds: 1 brain, 2 fluid in its middle."""
    scan = nib.load(files("nibabel") / "tests" / "data" / "example4d.nii.gz")
    image = F.pad(torch.as_tensor(scan.get_fdata()[8:120, :, 12, 0]).float(), (8, 8))
    image = (image / torch.quantile(image, 0.998)).clamp(0, 1)
    middle = torch.zeros_like(image, dtype=torch.bool)
    middle[41:69, 32:76] = True
    smooth = gaussian_smooth(image[None, None], 1.0)[0, 0]
    label = (smooth > 0.25).to(torch.uint8)
    label[(smooth > 0.7) & middle] = 2
    return image, label


def draw_fields(image: Tensor, level: float, seed: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The random field, the recovered field, and the fields after each step, ``(1, 2, *S)`` pixels each."""
    model, steps = DRDM(load_network("anatomy-2d")), list[Tensor]()

    def keep(step: object) -> None:
        steps.append(resize_ddf(step.ddf.clone(), image.shape))  # type: ignore[attr-defined]

    random = model.diffuse(image.shape, level, [seed], SPACING)
    return random, model.sample(image[None, None], level, [seed], SPACING, callback=keep), steps


def moved(image: Tensor, ddf: Tensor, mode: str = "bilinear") -> Tensor:
    """An image ``(H, W)`` under a field ``(1, 2, H, W)``."""
    return warp(image[None, None], ddf, mode, "border")[0, 0]


def panels(rows: int, columns: int, height: float = 2.8) -> tuple[Figure, list[Axes]]:
    """An empty figure of square panels."""
    figure = Figure(figsize=(2.45 * columns, height * rows), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.03)
    return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())


def grey(axis: Axes, image: Tensor, name: str) -> None:
    """Show an image in grey."""
    show_image(axis, image, SPACING, name, cmap="gray", vmin=0, vmax=1)


def signed(axis: Axes, values: Tensor, name: str) -> None:
    """Show a component of a field: red to one side, blue to the other."""
    limit = float(values.abs().max())
    show_image(axis, values, SPACING, name, cmap="RdBu", vmin=-limit, vmax=limit)


def idea(image: Tensor) -> Figure:
    """Original, randomly deformed, recovered."""
    random, recovered, _ = draw_fields(image, LEVEL, SEED)
    figure, axes = panels(1, 3)
    names = ("the scan", "a random field deforms it", "the network recovers it")
    for axis, one, name in zip(axes, (image, moved(image, random), moved(image, recovered)), names):
        grey(axis, one, name)
    return figure


def random_field(image: Tensor) -> Figure:
    """Noise of four scales, their sum, and the grid under the field that follows from it."""
    figure, axes = panels(2, 3, 3.0)
    velocity = torch.zeros(())
    for k in range(4):
        generator = torch.Generator().manual_seed(SEED + k)
        noise = 2**k * isotropic_velocity([generator], image.shape, finest_node=2**k / 32, scales=1)
        count = 32 >> k
        signed(axes[k], noise[0, 0], f"noise on {count} × {count} nodes,\nstrength {2**k}")
        velocity = velocity + noise
    signed(axes[4], velocity[0, 0], "their sum: a velocity")
    random = exp_svf(velocity * integration_time(LEVEL, 2))
    plot_warped_grid(axes[5], random[0], SPACING, lines=24)
    axes[5].set_title("followed for a time:\nthe random field", fontsize=11)
    return figure


def steps(image: Tensor) -> Figure:
    """The image, and how far pixels are moved, after some of the twelve steps of recovery."""
    random, recovered, after = draw_fields(image, LEVEL, SEED)
    shown = {"before recovery": random, "after step 1": after[0], "after step 3": after[2], "after step 6": after[5]}
    shown["after step 12"] = recovered
    figure, axes = panels(2, len(shown))
    length = {name: field[0].norm(dim=0) * SPACING[0] for name, field in shown.items()}
    top = float(length["before recovery"].max())
    for k, (name, field) in enumerate(shown.items()):
        grey(axes[k], moved(image, field), name)
        below = axes[len(shown) + k]
        show_image(
            below, length[name], SPACING, f"{length[name].mean():.0f} mm on average", cmap="magma", vmin=0, vmax=top
        )
    return figure


def levels(image: Tensor) -> Figure:
    """Random and recovered images of one seed at five levels."""
    chosen = (0.2, 0.4, 0.6, 0.8, 1.0)
    figure, axes = panels(2, len(chosen))
    for k, level in enumerate(chosen):
        random, recovered, _ = draw_fields(image, level, SEED)
        grey(axes[k], moved(image, random), f"level {level:g}, random")
        grey(axes[len(chosen) + k], moved(image, recovered), "recovered")
    return figure


def draws(image: Tensor) -> Figure:
    """One scan, and what seven seeds make of it."""
    figure, axes = panels(2, 4)
    grey(axes[0], image, "the scan")
    for axis, seed in zip(axes[1:], range(1, 8)):
        grey(axis, moved(image, draw_fields(image, LEVEL, seed)[1]), f"seed {seed}")
    return figure


def one_field(image: Tensor, label: Tensor) -> Figure:
    """Image, label outlines and landmarks before and after, and the grid of the field that moves them all."""
    drawn = FieldDrawer("anatomy-2d", deformation_level=LEVEL).draw(image[None], SPACING, SEED)
    ddf = drawn.ddf[None]
    points = torch.tensor([[[39.0, 84.0], [74.0, 82.0], [34.0, 52.0], [78.0, 50.0], [56.0, 20.0]]])
    figure, axes = panels(1, 3)
    for axis, one, outline, at, colour, name in (
        (axes[0], image, label, points[0], LABEL_BEFORE, "image, label, landmarks"),
        (axes[1], moved(image, ddf), moved(label, ddf, "nearest"), warp_points(points, ddf)[0], LABEL_AFTER, "moved"),
    ):
        grey(axis, one, name)
        plot_outlines(axis, outline, colour)
        axis.plot(at[:, 0], at[:, 1], "+", color=colour, markersize=9, markeredgewidth=2)
    plot_warped_grid(axes[2], drawn.ddf, SPACING, lines=24)
    axes[2].set_title("by one field", fontsize=11)
    return figure


def folds(image: Tensor) -> Figure:
    """Grid and Jacobian determinant of a random field, which folds, and of the recovered one, which does not."""
    random, recovered, _ = draw_fields(image, 1.0, SEED)
    figure, axes = panels(1, 4, 2.7)
    for k, (field, name) in enumerate(((random, "random, level 1"), (recovered, "recovered"))):
        plot_warped_grid(axes[2 * k], field[0], SPACING, lines=24)
        axes[2 * k].set_title(f"{name}: grid", fontsize=11)
        mappable = plot_jacobian(axes[2 * k + 1], field[0], SPACING)
        axes[2 * k + 1].set_title(f"Jacobian; {float(fold_fraction(field)[0]):.1%} folds", fontsize=11)
    figure.colorbar(mappable, ax=axes, shrink=0.75, pad=0.01)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Write all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    out = parser.parse_args(arguments).out
    image, label = read_slice()
    figures = {
        "idea": idea(image),
        "random_field": random_field(image),
        "steps": steps(image),
        "levels": levels(image),
        "draws": draws(image),
        "one_field": one_field(image, label),
        "folds": folds(image),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=DPI)


if __name__ == "__main__":
    main()
