"""The registration networks in the package."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
from scipy.ndimage import gaussian_filter

from monai_drdm.cli import main
from monai_drdm.fields import fold_fraction
from monai_drdm.registration import list_registrations, load_registration, register, registration_card
from monai_drdm.registration.registry import registration_file

ROWS = Path(__file__).parents[2] / "benchmarks" / "registration" / "stages.jsonl"


def test_names():
    assert list_registrations() == ("registration-3d",)
    with pytest.raises(ValueError, match="must be one of registration-3d, got 'registration-4d'"):
        registration_card("registration-4d")


@pytest.mark.parametrize("name", list_registrations())
def test_files_are_small_and_pinned(name):
    card, path = registration_card(name), registration_file(name)
    assert path.stat().st_size <= 4_000_000
    assert hashlib.sha256(path.read_bytes()).hexdigest() == card.sha256
    assert load_registration(name).structure.spatial_dims == card.spatial_dims
    assert all((card.licence, card.training_data, card.source))


@pytest.mark.parametrize("damage", ["a bit", "no weights"])
@pytest.mark.parametrize("name", list_registrations())
def test_a_damaged_file_is_refused_before_it_is_parsed(name, damage, tmp_path, monkeypatch):
    data = bytearray(registration_file(name).read_bytes())
    data[-1] ^= 1
    (tmp_path / f"{name}.safetensors").write_bytes(data if damage == "a bit" else b"no weights at all")
    monkeypatch.setattr("monai_drdm.registration.registry._SHIPPED", tmp_path)
    with pytest.raises(ValueError, match=f"expected {registration_card(name).sha256}"):
        load_registration(name)


@pytest.mark.parametrize("name", list_registrations())
def test_the_command_lists_and_verifies(name, capsys):
    assert main(["weights", "list"]) == 0
    assert re.search(rf"^{name}  \dD  registration  Apache-2\.0", capsys.readouterr().out, re.MULTILINE)
    assert main(["weights", "verify", name]) == 0
    assert f"{name}  ok  registration 3D  sha256 {registration_card(name).sha256}" in capsys.readouterr().out


def test_gates_are_those_that_were_measured():
    card = registration_card("registration-3d")
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    for name in ("hippocampus", "ixi"):
        mine = [row for row in rows if (row["set"], row["split"], row["method"]) == (name, "test", "affine, network")]
        assert {row["network"] for row in mine} == {card.sha256}
        found = {
            f"{name}_dice": np.mean([np.nanmean(row["dice"]) for row in mine]),
            f"{name}_fold_fraction": np.mean([row["fold_fraction"] for row in mine]),
        }
        assert {key: card.gates[key] for key in found} == pytest.approx(found, rel=2e-4)


def moved_by_a_known_field(seed):
    """A textured volume, the same moved by SimpleITK, and the field ``(1, 3, *S)`` that was used, in voxels."""
    shape = (40, 44, 36)
    draw = np.random.default_rng(seed)
    image = sum(gaussian_filter(draw.normal(size=shape), s) * s**1.5 for s in (1.5, 3, 6))
    image = (image - image.min()) / (image.max() - image.min())
    field = np.stack([gaussian_filter(draw.normal(size=shape), 7, mode="nearest") for _ in shape])
    field *= 2 / np.sqrt((field**2).sum(0)).mean()
    volume = SimpleITK.GetImageFromArray(image.astype(np.float32))
    flow = SimpleITK.GetImageFromArray(np.moveaxis(field[::-1], 0, -1).copy(), isVector=True)  # ITK's axes are x, y, z
    moved = SimpleITK.Resample(volume, SimpleITK.DisplacementFieldTransform(flow), SimpleITK.sitkLinear)
    both = (torch.from_numpy(SimpleITK.GetArrayFromImage(one))[None, None] for one in (volume, moved))
    return *both, torch.from_numpy(field)[None].float()


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_a_known_field_in_what_it_has_never_seen(seed):
    moving, fixed, known = moved_by_a_known_field(seed)
    ddf = register(load_registration("registration-3d"), moving, fixed)
    inner = (slice(None), slice(None), *(slice(8, -8),) * 3)
    error = (ddf - known)[inner].norm(dim=1).mean()
    assert error < 0.7 * known[inner].norm(dim=1).mean()
    assert fold_fraction(ddf) < 1e-3
