"""How much training images vary. This module needs no torch: the settings of a run are made of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Appearance:
    """How much the intensities of images are changed, after they are deformed."""

    gamma: float = 0.4
    """Intensities are raised to ``exp(U(-gamma, gamma))``."""
    contrast: float = 0.3
    """Factor on intensities around their mean, ``1 ± contrast``."""
    bias: float = 0.3
    """Largest relative change by a smooth bias field."""
    blur_vox: float = 0.8
    """Largest standard deviation of a Gaussian blur."""
    noise: float = 0.06
    """Largest standard deviation of Gaussian noise, in units of the intensity range."""


@dataclass(frozen=True)
class Pose:
    """How much images are flipped, rotated, scaled and shifted, before they are deformed."""

    flip: float = 0.5
    """Probability of a flip along each axis."""
    permute: float = 0.0
    """Probability that the axes change places, in square or cubic images."""
    rotation_deg: float = 20.0
    scale: float = 0.2
    """Log of the largest magnification."""
    shift_frac: float = 0.05
    """Largest shift, as a fraction of the image along each axis."""
