"""The model: draws plausible random fields for images, with one network and one sampler."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from monai_drdm.diffusion.diffuse import diffuse, diffuse_published
from monai_drdm.diffusion.recover import Callback, recover_fast, recover_reference, strided_times
from monai_drdm.diffusion.recover_velocity import OVER_RELAXATION, recover_velocity
from monai_drdm.diffusion.schedule import check_precision, check_share, levels_of_batch, time_step
from monai_drdm.diffusion.working_grid import WorkingGrid
from monai_drdm.fields import crop, fractions_to_voxels, mend_folds
from monai_drdm.networks import RecoveryNetwork, RecResACNet, VelocityUNet
from monai_drdm.networks.kinds import MAX_STEPS, SAMPLERS
from monai_drdm.networks.recresacnet import TIME_STEPS
from monai_drdm.networks.velocity_unet import half_shape


class DRDM:
    """Deformation diffusion and recovery with one network.

    Args:
        network: a recovery network with its card.
        sampler: ``reference`` (as released) or ``fast`` for published networks, ``velocity`` for ours, or ``auto``: the
            card's.
        steps: recovery steps; None is the card's. ``reference`` always takes 80.
        recovery: factor on every recovery step, in [0, 1], for ``velocity`` only. Below 1 more of the random field is
            left: shapes differ more and are less plausible. 0 is no recovery.
        symmetry: how far fields are kept symmetric where images are, in [0, 1], by ``velocity``; 0 is not at all.
            Less ``recovery`` keeps less. The published samplers do not do it.
        precision: ``bfloat16`` computes the convolutions of ``velocity`` in bfloat16, which is faster on hardware that
            supports it; fields and coordinates stay float32. The fields differ a little from those of ``float32``.
        compiled: compile the network of ``velocity`` with ``torch.compile``, with CUDA graphs on a GPU. The first
            images of each shape then take a minute.

    Raises:
        ValueError: a sampler that does not fit the network, or other settings that do not fit the sampler.
    """

    def __init__(
        self,
        network: RecoveryNetwork,
        sampler: str = "auto",
        steps: int | None = None,
        recovery: float = 1.0,
        *,
        symmetry: float = 1.0,
        precision: str = "float32",
        compiled: bool = False,
    ) -> None:
        known = SAMPLERS[network.card.kind]
        if sampler not in ("auto", *known):
            raise ValueError(f"sampler must be 'auto' or one of {known} for {network.card.name!r}, got {sampler!r}.")
        self.network = network
        self.sampler = network.card.sampler if sampler == "auto" else sampler
        if self.sampler not in known:
            raise ValueError(f"card of {network.card.name!r}: sampler must be one of {known}, got {self.sampler!r}.")
        if self.sampler == "reference":
            if steps not in (None, TIME_STEPS):
                raise ValueError(
                    f"sampler 'reference' takes {TIME_STEPS} steps, got steps={steps}. Use sampler='fast'."
                )
            self.steps = TIME_STEPS
        else:
            self.steps = network.card.steps if steps is None else operator.index(steps)
            if self.sampler == "fast":
                strided_times(self.steps)
            elif not 1 <= self.steps <= MAX_STEPS:
                raise ValueError(f"sampler 'velocity': steps must be from 1 to {MAX_STEPS}, got {self.steps}.")
        self.recovery = check_share(recovery, "recovery")
        if self.recovery != 1.0 and self.sampler != "velocity":
            raise ValueError(f"recovery below 1 needs sampler 'velocity', got {recovery} for {self.sampler!r}.")
        symmetry = check_share(symmetry, "symmetry")
        self.symmetry = symmetry if self.sampler == "velocity" else 0.0
        self.precision, self.compiled = check_precision(precision), compiled
        if (precision != "float32" or compiled) and self.sampler != "velocity":
            raise ValueError(f"bfloat16 and compiled need sampler 'velocity', got {self.sampler!r}.")

    @torch.no_grad()
    def sample(
        self,
        images: Tensor,
        level: float | Sequence[float],
        seeds: Sequence[int],
        spacing: Sequence[float] | None = None,
        *,
        compact: bool = False,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draw one plausible random field for each image: diffusion, then recovery (paper, Algorithm 2).

        Args:
            images: ``(B, C, *S)`` in any intensity range; ``C`` must be the network's.
            level: deformation level in (0, 1], one or one per image.
            seeds: one per image. Image, level and seed fix the field, independently of the rest of the batch.
            spacing: mm per voxel along each axis; None is isotropic.
            compact: return the field on the coarser of working grid and image grid, axis by axis. This loses nothing;
                ``fields.resize_ddf`` resizes it to the image's grid.
            callback: called after each recovery step, with fields on the grid that the sampler works on.
            progress: show a progress bar.

        Returns:
            ``(B, D, *S)`` voxels of the images, float32, on the network's device; of their own grid if ``compact``.

        Raises:
            ValueError: dimensions, channels, number of seeds or levels do not fit; images, or predictions of the
                network, are not finite.
        """
        self._check(images)
        grid = self._grid(images.shape[2:], spacing)
        # fields and coordinates need full precision, also inside an autocast of the caller
        with torch.autocast(self.device.type, enabled=False):
            working = grid.image_to_working(images.to(self.device), self.network.card.input_range)
            ddf = self._diffuse(grid, level, seeds, images.shape[0])
            ddf = self._recover(working, ddf, levels_of_batch(level, images.shape[0], "DRDM"), callback, progress)
            if self.sampler != "velocity" and not bool(torch.isfinite(ddf).all()):  # that sampler looks itself
                raise ValueError(f"network {self.network.card.name!r} predicts NaN or infinity. Check its weights.")
            ddf = grid.ddf_to_compact(ddf) if compact else grid.ddf_to_full(ddf)
            # a field may fold on a coarser grid although it does not on the working grid
            return ddf if self.sampler == "reference" else mend_folds(ddf)

    def sample_steps(
        self,
        images: Tensor,
        level: float | Sequence[float],
        seeds: Sequence[int],
        spacing: Sequence[float] | None = None,
        *,
        compact: bool = False,
    ) -> list[Tensor]:
        """The fields on the way to what ``sample`` draws: the random one, then the field after every recovery step.

        The arguments and errors are those of ``sample``. The last field is the one that ``sample`` returns; all of them
        are held in memory at once, which ``compact`` keeps small.
        """
        grid = self._grid(images.shape[2:], spacing)
        sized = grid.ddf_to_compact if compact else grid.ddf_to_full
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            fields = [sized(self._diffuse(grid, level, seeds, images.shape[0]))]
        drawn = self.sample(
            images, level, seeds, spacing, compact=compact, callback=lambda step: fields.append(sized(step.ddf))
        )
        return [*fields[:-1], drawn]

    @torch.no_grad()
    def diffuse(
        self,
        shape: Sequence[int],
        level: float | Sequence[float],
        seeds: Sequence[int],
        spacing: Sequence[float] | None = None,
    ) -> Tensor:
        """The random fields that ``sample`` starts from, before any recovery.

        Args:
            shape: spatial shape ``S`` of the images.
            level: as in ``sample``.
            seeds: as in ``sample``.
            spacing: as in ``sample``.

        Returns:
            ``(B, D, *S)`` voxels of the images, float32, on the network's device.

        Raises:
            ValueError: number of levels or a level that does not fit.
        """
        grid = self._grid(shape, spacing)
        with torch.autocast(self.device.type, enabled=False):
            return grid.ddf_to_full(self._diffuse(grid, level, seeds, len(seeds)))

    def _recover(
        self, working: Tensor, ddf: Tensor, levels: list[float], callback: Callback | None, progress: bool
    ) -> Tensor:
        network = self.network
        if isinstance(network, VelocityUNet):
            return recover_velocity(
                network,
                working,
                ddf,
                levels,
                steps=self.steps,
                over_relaxation=self.recovery * OVER_RELAXATION,
                symmetry=self.symmetry,
                predict=self._predict,
                callback=callback,
                progress=progress,
            )
        assert isinstance(network, RecResACNet)
        if self.sampler == "reference":
            return recover_reference(network, working, ddf, callback=callback, progress=progress)
        return recover_fast(network, working, ddf, steps=self.steps, callback=callback, progress=progress)

    def _predict(self, images: Tensor, level: Tensor) -> Tensor:
        network = _compiled(self.network) if self.compiled else self.network
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            velocity: Tensor = network(images, level)
        return velocity.clone() if self.compiled else velocity  # CUDA graphs reuse the memory of their output

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.network.parameters()).device

    def _grid(self, shape: Sequence[int], spacing: Sequence[float] | None) -> WorkingGrid:
        spacing = (1.0,) * len(shape) if spacing is None else spacing
        return WorkingGrid.of(shape, spacing, self.network.card.working_size, odd=self.sampler == "velocity")

    def _diffuse(self, grid: WorkingGrid, level: float | Sequence[float], seeds: Sequence[int], batch: int) -> Tensor:
        levels = levels_of_batch(level, batch, "DRDM")
        if len(seeds) != batch:
            raise ValueError(f"DRDM: need one seed per image, got {len(seeds)} for {batch}.")
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        if self.sampler == "velocity":
            shape = half_shape(grid.shape)
            spacing = [2 * s if n > 1 else s for n, s in zip(grid.shape, grid.spacing)]
            return diffuse(generators, shape, levels, spacing, device=self.device)
        if self.sampler == "fast":
            return diffuse(generators, grid.shape, levels, grid.spacing, device=self.device)
        size, dims = max(grid.shape), len(grid.shape)
        fields = [
            diffuse_published([generator], size, dims, time_step(one), device=self.device)[0]
            for generator, one in zip(generators, levels)
        ]
        square = fractions_to_voxels(torch.cat(fields))
        return crop(square, grid.shape, centre=True)

    def _check(self, images: Tensor) -> None:
        card = self.network.card
        if images.ndim != card.spatial_dims + 2 or images.shape[1] != card.in_channels or 0 in images.shape:
            raise ValueError(
                f"{card.name!r} needs images of shape (B, {card.in_channels}, *S) with {card.spatial_dims} spatial "
                f"axes, got {tuple(images.shape)}."
            )
        if not bool(torch.isfinite(images.to(torch.float32)).all()):
            raise ValueError(
                "images must be finite in float32, got NaN, infinity or more. Clean them first (numpy.nan_to_num)."
            )


@lru_cache(maxsize=8)
def _compiled(network: RecoveryNetwork) -> Callable[..., Tensor]:
    """The compiled network. It is compiled once for every shape of its input; on a GPU it runs as a CUDA graph."""
    graphs = next(network.parameters()).device.type == "cuda"
    return torch.compile(network, dynamic=False, mode="reduce-overhead" if graphs else None)
