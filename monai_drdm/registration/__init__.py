"""Registration networks: training on synthetic pairs, evaluation, and motion separability."""

from monai_drdm.registration.separability import motion_separability, separability_bound, SeparabilityBound

__all__ = ["SeparabilityBound", "motion_separability", "separability_bound"]
