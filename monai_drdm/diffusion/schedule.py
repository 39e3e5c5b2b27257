"""Deformation levels, time steps, and how strongly they deform.

A deformation level is the paper's T'/T, a number in (0, 1]; T = 80.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

from monai_drdm.networks.recresacnet import TIME_STEPS

# Integration times of isotropic_velocity at levels 0.1, 0.2, ..., 1.0 that give the mean displacement of the released
# process at 256² in 2D and at 128³ in 3D. Written by tools/calibrate_levels.py.
_INTEGRATION_TIME = {
    2: (1.38, 3.67, 6.31, 9.34, 12.61, 16.32, 20.18, 24.52, 29.19, 33.41),
    3: (0.7, 1.84, 3.11, 4.5, 5.94, 7.48, 9.02, 10.66, 12.32, 13.76),
}


def check_level(level: float, function: str) -> float:
    """Return the level as a float.

    Raises:
        ValueError: outside (0, 1].
    """
    if not 0.0 < level <= 1.0:
        raise ValueError(f"{function}: deformation_level must be in (0, 1], got {level}.")
    return float(level)


def check_share(share: float, name: str) -> float:
    """Return a share, such as the factor on recovery steps, as a float.

    Raises:
        ValueError: not a number in [0, 1].
    """
    if isinstance(share, bool) or not isinstance(share, Real) or not 0.0 <= share <= 1.0:
        raise ValueError(f"{name} must be a number in [0, 1], got {share!r}.")
    return float(share)


def check_precision(precision: str) -> str:
    """Return the dtype in which convolutions are computed, as text.

    Raises:
        ValueError: neither ``float32`` nor ``bfloat16``.
    """
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision must be 'float32' or 'bfloat16', got {precision!r}.")
    return precision


def levels_of_batch(level: float | Sequence[float], batch: int, function: str) -> list[float]:
    """Return one checked level per sample, given one number or one per sample, also as a tensor or array.

    Raises:
        ValueError: a wrong number of levels, or one outside (0, 1].
    """
    given = level.tolist() if hasattr(level, "tolist") else level
    levels = list(given) if isinstance(given, Sequence) else [given] * batch
    if len(levels) != batch:
        raise ValueError(f"{function}: level must be one number or one per sample, got {len(levels)} for {batch}.")
    return [check_level(one, function) for one in levels]


def time_step(level: float) -> int:
    """The published time step T' of a level, 1 to 79."""
    return min(max(round(check_level(level, "time_step") * TIME_STEPS), 1), TIME_STEPS - 1)


def composition_counts(t: int) -> tuple[int, int]:
    """How many times the released process composes its small fields at time step ``t`` (paper, Eq. 6).

    Args:
        t: time step, 0 to 79.

    Returns:
        ``(total, target)``: for the total field ``clamp(floor(2 t^1.3 / 3), 1, 200)``, for the training target
        ``floor(t^0.6)``.

    Raises:
        ValueError: outside 0 to 79.
    """
    if not 0 <= t < TIME_STEPS:
        raise ValueError(f"composition_counts: t must be in [0, {TIME_STEPS}), got {t}.")
    return min(max(int(2 * t**1.3 / 3), 1), 200), int(t**0.6)


def integration_time(level: float, spatial_dims: int) -> float:
    """How long ``diffuse`` integrates a velocity field of unit strength to reach a level's mean displacement.

    Args:
        level: in (0, 1].
        spatial_dims: 2 or 3.

    Returns:
        The factor of the velocity; linear between calibrated levels.
    """
    knots = (0.0, *_INTEGRATION_TIME[spatial_dims])
    position = check_level(level, "integration_time") * 10
    low = min(int(position), 9)
    return knots[low] + (position - low) * (knots[low + 1] - knots[low])


def integration_times(levels: Sequence[float], spatial_dims: int) -> list[float]:
    """``integration_time`` of each level; that of level 0 is 0."""
    return [integration_time(level, spatial_dims) if level > 0 else 0.0 for level in levels]
