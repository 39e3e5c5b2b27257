from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from monai_drdm.networks import RecResACNet, save_network

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_segmentation_pipeline_trains(tmp_path):
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / "segmentation_pipeline.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    for key in ("images", "labels"):
        (tmp_path / key).mkdir()
    axes = np.meshgrid(np.linspace(-1, 1, 40), np.linspace(-1, 1, 36), np.linspace(-1, 1, 3), indexing="ij")
    disc = axes[0] ** 2 + axes[1] ** 2 < 0.3
    for case in "ab":
        nib.save(nib.Nifti1Image(disc * 100.0, np.eye(4)), tmp_path / "images" / f"{case}.nii.gz")
        nib.save(nib.Nifti1Image(disc.astype(np.uint8), np.eye(4)), tmp_path / "labels" / f"{case}.nii.gz")
    network = RecResACNet(2)
    torch.nn.init.zeros_(network.conv_out.weight)
    torch.nn.init.zeros_(network.conv_out.bias)
    network.card = dataclasses.replace(network.card, working_size=32, steps=1)
    save_network(network, tmp_path / "n.safetensors")
    folders = ["--images", str(tmp_path / "images"), "--labels", str(tmp_path / "labels")]
    options = ["--classes", "2", "--size", "32", "--prob", "1", "--network", str(tmp_path / "n.safetensors")]
    first = example.main([*folders, *options, "--epochs", "1"])
    last = example.main([*folders, *options, "--epochs", "12"])
    assert last < 0.7 * first  # a bright disc is learned under augmentation
