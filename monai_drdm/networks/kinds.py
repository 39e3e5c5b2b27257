"""The kinds of recovery networks, for commands that only need their names: this module needs no torch."""

SAMPLERS = {"recresacnet": ("reference", "fast"), "velocity_unet": ("velocity",)}
"""The samplers of each kind."""
WORKING_SIZE = {"recresacnet": {2: 256, 3: 128}, "velocity_unet": {2: 161, 3: 81}}
"""Voxels along the longest side, for 2D and 3D networks of each kind, unless a card says otherwise."""
MAX_STEPS = 1000
"""Largest number of recovery steps: more would only run on."""
