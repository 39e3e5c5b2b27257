"""Registration: motion separability of fields; training and judging networks (``pip install monai-drdm[train]``)."""

from monai_drdm.registration.data import unit_range
from monai_drdm.registration.evaluate import evaluate_registration, RegistrationScore
from monai_drdm.registration.networks import load_registration, register, RegistrationNetwork, save_registration
from monai_drdm.registration.separability import motion_separability, separability_bound, SeparabilityBound

__all__ = [
    "RegistrationNetwork",
    "RegistrationScore",
    "SeparabilityBound",
    "evaluate_registration",
    "load_registration",
    "motion_separability",
    "register",
    "save_registration",
    "separability_bound",
    "unit_range",
]
