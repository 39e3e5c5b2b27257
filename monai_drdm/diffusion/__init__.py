"""Deformation diffusion and recovery: random fields, samplers, and the model that combines them."""

from monai_drdm.diffusion.diffuse import diffuse, diffuse_published
from monai_drdm.diffusion.model import DRDM
from monai_drdm.diffusion.recover import recover_fast, recover_reference, RecoveryStep
from monai_drdm.diffusion.schedule import composition_counts, integration_time, time_step
from monai_drdm.diffusion.working_grid import WorkingGrid
from monai_drdm.networks.kinds import SAMPLERS

__all__ = [
    "DRDM",
    "SAMPLERS",
    "RecoveryStep",
    "WorkingGrid",
    "composition_counts",
    "diffuse",
    "diffuse_published",
    "integration_time",
    "recover_fast",
    "recover_reference",
    "time_step",
]
