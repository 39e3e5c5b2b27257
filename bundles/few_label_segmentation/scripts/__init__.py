"""What the bundle trains with. ``mean_teacher`` and ``scans`` are those of the examples of monai_drdm."""
