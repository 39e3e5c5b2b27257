"""Registration: motion separability of fields; training and judging networks (``pip install monai-drdm[train]``)."""

from typing import TYPE_CHECKING

from monai_drdm.lazy_names import lazy_names

if TYPE_CHECKING:
    from monai_drdm.registration.affine import apply_affine, find_affine
    from monai_drdm.registration.aligner import ResidualAlignerNet, SEPARABLE_STRUCTURES
    from monai_drdm.registration.alignment import register
    from monai_drdm.registration.data import unit_range
    from monai_drdm.registration.evaluate import evaluate_registration, RegistrationScore
    from monai_drdm.registration.networks import load_registration, RegistrationNetwork, save_registration
    from monai_drdm.registration.pair_files import PairSettings, register_files
    from monai_drdm.registration.registry import list_registrations, registration_card, RegistrationCard
    from monai_drdm.registration.separability import motion_separability, separability_bound, SeparabilityBound

__all__ = [
    "SEPARABLE_STRUCTURES",
    "PairSettings",
    "RegistrationCard",
    "RegistrationNetwork",
    "RegistrationScore",
    "ResidualAlignerNet",
    "SeparabilityBound",
    "apply_affine",
    "evaluate_registration",
    "find_affine",
    "list_registrations",
    "load_registration",
    "motion_separability",
    "register",
    "register_files",
    "registration_card",
    "save_registration",
    "separability_bound",
    "unit_range",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "RegistrationCard": "registry",
        "RegistrationNetwork": "networks",
        "RegistrationScore": "evaluate",
        "ResidualAlignerNet": "aligner",
        "SEPARABLE_STRUCTURES": "aligner",
        "SeparabilityBound": "separability",
        "apply_affine": "affine",
        "evaluate_registration": "evaluate",
        "find_affine": "affine",
        "PairSettings": "pair_files",
        "list_registrations": "registry",
        "load_registration": "networks",
        "motion_separability": "separability",
        "register": "alignment",
        "register_files": "pair_files",
        "registration_card": "registry",
        "save_registration": "networks",
        "separability_bound": "separability",
        "unit_range": "data",
    },
)
