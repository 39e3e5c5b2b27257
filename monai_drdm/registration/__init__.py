"""Registration: motion separability of fields; training and judging networks (``pip install monai-drdm[train]``)."""

from typing import TYPE_CHECKING

from monai_drdm.lazy_names import lazy_names

if TYPE_CHECKING:
    from monai_drdm.registration.aligner import ResidualAlignerNet, SEPARABLE_STRUCTURES
    from monai_drdm.registration.data import unit_range
    from monai_drdm.registration.evaluate import evaluate_registration, RegistrationScore
    from monai_drdm.registration.networks import load_registration, register, RegistrationNetwork, save_registration
    from monai_drdm.registration.separability import motion_separability, separability_bound, SeparabilityBound

__all__ = [
    "SEPARABLE_STRUCTURES",
    "RegistrationNetwork",
    "RegistrationScore",
    "ResidualAlignerNet",
    "SeparabilityBound",
    "evaluate_registration",
    "load_registration",
    "motion_separability",
    "register",
    "save_registration",
    "separability_bound",
    "unit_range",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "RegistrationNetwork": "networks",
        "RegistrationScore": "evaluate",
        "ResidualAlignerNet": "aligner",
        "SEPARABLE_STRUCTURES": "aligner",
        "SeparabilityBound": "separability",
        "evaluate_registration": "evaluate",
        "load_registration": "networks",
        "motion_separability": "separability",
        "register": "networks",
        "save_registration": "networks",
        "separability_bound": "separability",
        "unit_range": "data",
    },
)
