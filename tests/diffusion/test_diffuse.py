from itertools import pairwise

import numpy as np
import pytest
import torch

from monai_drdm.diffusion import diffuse, diffuse_published
from monai_drdm.fields import fold_fraction, fractions_to_voxels, voxels_to_mm

# Six numbers each of total and target for generators seeded 100 + t, at `spots`, taken while they agreed with the
# authors' fields to 1e-6 (test_parity_with_the_release).
RECORDED = [
    (
        (128, 2, 48),
        (-0.0250065, 0.0545925, -0.0320771, -0.0238761, -0.0229901, 0.0758846),
        (-0.0028847, 0.0044594, -0.0008246, -0.0029666, -0.0020741, 0.006188),
    ),
    (
        (256, 2, 79),
        (0.0221455, 0.121467, -0.0571655, -0.1717616, -0.0421021, 0.071228),
        (0.0003884, 0.0075385, -0.0048695, -0.0125771, -0.0006734, 0.0058261),
    ),
    (
        (64, 3, 8),
        (-0.0008818, 0.0008516, 9.74e-05, 0.0014716, 0.0004705, 0.0001144),
        (-0.0002801, 0.0002975, 3.85e-05, 0.0005085, 0.000187, 3e-06),
    ),
]

ANISOTROPIC = [((40, 24), (1.0, 3.0)), ((33, 20), None), ((20, 16, 9), (1.0, 1.2, 4.0))]


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def spots(tensor, count=6):
    flat = tensor.flatten()
    return flat[[i * flat.numel() // count + 5 * i for i in range(count)]]


def mean_displacement(ddf):
    return float(ddf.norm(dim=1).mean())


@pytest.mark.parametrize(
    ("dims", "size", "t", "tolerance"),
    [
        (2, 128, 8, 1e-5),
        (2, 128, 48, 1e-5),
        (2, 256, 48, 1e-5),
        (2, 256, 79, 1e-5),
        (3, 128, 8, 1e-4),
        (3, 128, 48, 1e-4),
    ],
)
def test_parity_with_the_release(reference, dims, size, t, tolerance):
    stride = {2: 4, 3: 8}[dims]
    fields = diffuse_published(seeded(100 + t), size, dims, t)
    with np.load(reference / "diffusion_parity.npz") as file:
        for field, name in zip(fields, ("ddf", "dvf")):
            sparse = field[(..., *(slice(None, None, stride),) * dims)]
            expected = torch.from_numpy(file[f"{dims}d_{size}_T{t}_{name}"])
            torch.testing.assert_close(sparse, expected, rtol=0, atol=tolerance)


def test_parity_of_the_draws(reference):
    generator = torch.Generator().manual_seed(148)
    with np.load(reference / "diffusion_parity.npz") as file:
        for i, size in enumerate((64, 32, 16, 8) * 2):
            drawn = torch.randn((1, 2, size, size), generator=generator)
            torch.testing.assert_close(drawn, torch.from_numpy(file[f"2d_256_T48_z{i}"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("case", "total", "target"), RECORDED)
def test_recorded_numbers(case, total, target):
    size, dims, t = case
    fields = diffuse_published(seeded(100 + t), size, dims, t)
    for field, expected in zip(fields, (total, target)):
        assert field.shape == (1, dims, *(size,) * dims)
        torch.testing.assert_close(spots(field), torch.tensor(expected), rtol=0, atol=1e-5)


def test_published_samples_are_independent():
    together = diffuse_published(seeded(1, 2, 3), 64, 2, 20)
    for b, seed in enumerate((1, 2, 3)):
        for field, alone in zip(together, diffuse_published(seeded(seed), 64, 2, 20)):
            torch.testing.assert_close(field[b : b + 1], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("t", [-1, 80])
def test_published_refuses_time(t):
    with pytest.raises(ValueError, match=rf"t must be in \[0, 80\), got {t}"):
        diffuse_published(seeded(0), 64, 2, t)


def test_mean_displacement_is_the_published_one():
    ddf = diffuse(seeded(*range(30)), (128, 128), 0.6)
    assert mean_displacement(ddf) / 128 == pytest.approx(0.110, rel=0.1)


def test_mean_displacement_is_a_fraction_of_the_longest_side():
    fractions = [mean_displacement(diffuse(seeded(*range(20)), (n, n), 0.6)) / n for n in (48, 96, 192)]
    assert fractions == pytest.approx([0.110] * 3, rel=0.15)


@pytest.mark.parametrize("shape", [(96, 96), (24, 24, 24)])
def test_displacement_grows_with_the_level(shape):
    means = [mean_displacement(diffuse(seeded(*range(10)), shape, level / 10)) for level in range(1, 11)]
    assert all(a < b for a, b in pairwise(means))
    assert mean_displacement(diffuse(seeded(0), shape, 1e-3)) < 0.01 * max(shape)


def test_folds_far_less_than_the_release():
    ours = diffuse(seeded(*range(6)), (256, 256), 0.6)
    released = fractions_to_voxels(diffuse_published(seeded(*range(6)), 256, 2, 48)[0])
    assert mean_displacement(ours) == pytest.approx(mean_displacement(released), rel=0.15)
    assert float(fold_fraction(ours).mean()) < 0.2 * float(fold_fraction(released).mean())
    assert float(fold_fraction(ours, "central").mean()) < 0.03


@pytest.mark.parametrize(("shape", "spacing"), [((64, 64), None), *ANISOTROPIC])
def test_a_sample_does_not_know_its_batch(shape, spacing):
    levels = [0.2, 0.9, 0.6]
    together = diffuse(seeded(5, 6, 7), shape, levels, spacing)
    for b, seed in enumerate((5, 6, 7)):
        assert torch.equal(together[b : b + 1], diffuse(seeded(seed), shape, levels[b], spacing))


def test_seeds_and_levels_matter():
    first, second = diffuse(seeded(1, 2), (32, 32), 0.5)
    assert not torch.equal(first, second)
    assert not torch.equal(diffuse(seeded(1), (32, 32), 0.6)[0], first)


@pytest.mark.parametrize(("shape", "spacing"), ANISOTROPIC)
def test_only_ratios_of_spacing_matter(shape, spacing):
    spacing = spacing or (1.0,) * len(shape)
    twice = tuple(2 * s for s in spacing)
    one, other = (diffuse(seeded(3), shape, 0.6, s) for s in (spacing, twice))
    assert one.shape == (1, len(shape), *shape)
    assert one.dtype == torch.float32
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_displacements_are_isotropic_in_millimetres():
    spacing = (1.0, 4.0)
    ddf = voxels_to_mm(diffuse(seeded(*range(30)), (96, 24), 0.5, spacing), spacing)
    along = ddf.square().mean(dim=(0, 2, 3)).sqrt()
    assert float(along[0] / along[1]) == pytest.approx(1.0, abs=0.25)
    assert mean_displacement(ddf) == pytest.approx(
        mean_displacement(diffuse(seeded(*range(30)), (96, 96), 0.5)), rel=0.2
    )


@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (5, 7), (1, 1), (3, 1, 9)])
def test_any_shape_is_finite(shape):
    ddf = diffuse(seeded(0), shape, 1.0)
    assert ddf.shape == (1, len(shape), *shape)
    assert bool(torch.isfinite(ddf).all())


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    diffuse(seeded(0), (16, 16), 0.5)
    diffuse_published(seeded(0), 16, 2, 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("level", [0.0, -0.5, 1.5, float("nan"), [0.5, 0.0]])
def test_level_outside_its_range(level):
    with pytest.raises(ValueError, match=r"diffuse: deformation_level must be in \(0, 1\]"):
        diffuse(seeded(0, 1), (16, 16), level)


def test_wrong_number_of_levels():
    with pytest.raises(ValueError, match="level must be one number or one per sample, got 3 for 2"):
        diffuse(seeded(0, 1), (16, 16), [0.1, 0.2, 0.3])


@pytest.mark.parametrize("spacing", [(1.0,), (1.0, 1.0, 1.0), (1.0, 0.0), (1.0, -2.0), (float("inf"), 1.0)])
def test_wrong_spacing(spacing):
    with pytest.raises(ValueError, match="spacing must be 2 positive numbers in mm"):
        diffuse(seeded(0), (16, 16), 0.5, spacing)


def test_wrong_shape():
    with pytest.raises(ValueError, match="shape must be 2 or 3 sizes of 1 or more"):
        diffuse(seeded(0), (16, 0), 0.5)
