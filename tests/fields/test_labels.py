import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from monai_drdm.fields import warp_labels

SCIPY_MODES = {"border": "nearest", "zeros": "grid-constant", "reflection": "mirror"}


def vote_by_brute_force(label, position, padding_mode):
    """One indicator image per class, interpolated linearly; the smallest id among the largest values."""
    ids = np.unique(np.append(label, 0) if padding_mode == "zeros" else label)
    votes = [
        ndimage.map_coordinates(
            (label == i).astype(np.float64), position, order=1, mode=SCIPY_MODES[padding_mode], cval=float(i == 0)
        )
        for i in ids
    ]
    return ids[(np.stack(votes) >= np.max(votes, axis=0) - 1e-6).argmax(axis=0)]


@pytest.mark.parametrize("padding_mode", SCIPY_MODES)
@pytest.mark.parametrize("offset", [0, 2**24, 2**53, -50], ids=["small", "2^24", "2^53", "negative"])
def test_label_mode_equals_brute_force_voting(shape, smooth_ddf, voxel_grid, rng, padding_mode, offset):
    label = rng.integers(0, 12, shape) * 7 + offset
    ddf = smooth_ddf(shape, 4.0, dtype=torch.float64, seed=1)
    warped = warp_labels(torch.from_numpy(label)[None, None], ddf, "label", padding_mode)
    expected = vote_by_brute_force(label, voxel_grid(shape) + ddf[0].numpy(), padding_mode)
    assert warped.dtype == torch.int64
    np.testing.assert_array_equal(warped[0, 0].numpy(), expected)


def test_label_mode_equals_brute_force_voting_with_a_float32_field(shape, smooth_ddf, voxel_grid, rng):
    label = ndimage.median_filter(rng.integers(0, 5, shape, dtype=np.int16), 3)
    ddf = smooth_ddf(shape, 4.0, seed=1)
    warped = warp_labels(torch.from_numpy(label)[None, None], ddf)[0, 0].numpy()
    position = voxel_grid(shape).astype(np.float32) + ddf[0].numpy()
    assert (warped == vote_by_brute_force(label, position, "border")).mean() > 0.9995


@pytest.mark.parametrize(
    "image_dtype", [torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.float16]
)
@pytest.mark.parametrize("padding_mode", SCIPY_MODES)
def test_label_mode_works_for_every_dtype(smooth_ddf, voxel_grid, rng, image_dtype, padding_mode):
    label = rng.integers(0, 2 if image_dtype == torch.bool else 9, (15, 18))
    ddf = smooth_ddf((15, 18), 4.0, dtype=torch.float64)
    warped = warp_labels(torch.from_numpy(label).to(image_dtype)[None, None], ddf, "label", padding_mode)
    assert warped.dtype == image_dtype
    expected = vote_by_brute_force(label, voxel_grid((15, 18)) + ddf[0].numpy(), padding_mode)
    np.testing.assert_array_equal(warped[0, 0].to(torch.int64).numpy(), expected)


def test_channels_and_samples_vote_alone(smooth_ddf, voxel_grid, rng):
    label, ddf = rng.integers(0, 6, (2, 3, 10, 13)), smooth_ddf((10, 13), 3.0, batch=2, dtype=torch.float64)
    warped = warp_labels(torch.from_numpy(label), ddf)
    for b in range(2):
        for c in range(3):
            expected = vote_by_brute_force(label[b, c], voxel_grid((10, 13)) + ddf[b].numpy(), "border")
            np.testing.assert_array_equal(warped[b, c].numpy(), expected)


@pytest.mark.parametrize(
    ("image_dtype", "low", "high"),
    [
        (torch.int64, 3, 8),
        (torch.int64, -8, 3),
        (torch.uint16, 3, 2**16 - 1),
        (torch.uint32, 3, 2**32 - 1),
        (torch.uint64, 2**63 - 1, 2**63),
        (torch.bool, 0, 1),
    ],
)
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_tie_goes_to_the_smallest_id(image_dtype, low, high, swap, axis):
    values = np.array([high, low] if swap else [low, high], dtype=str(image_dtype).removeprefix("torch."))
    label = torch.from_numpy(np.moveaxis(values.reshape(1, 1, 2, 1), 2, axis + 2).copy())
    ddf = torch.zeros(1, 2, *label.shape[2:])
    ddf[:, axis] = 0.5
    assert warp_labels(label, ddf).flatten()[0].item() == low


@pytest.mark.parametrize("order", [(1, 2, 3, 4), (4, 3, 2, 1), (2, 4, 1, 3), (3, 1, 4, 2)])
def test_a_tie_of_four_goes_to_the_smallest_id(order):
    label = torch.tensor(order).view(1, 1, 2, 2)
    assert warp_labels(label, torch.full((1, 2, 2, 2), 0.5))[0, 0, 0, 0] == 1


def test_two_small_votes_beat_one_large_one():
    label = torch.tensor([[9, 2], [2, 5]])[None, None]  # at (0.4, 0.4): 9 has 0.36, 2 has 0.48
    ddf = torch.full((1, 2, 2, 2), 0.4)
    assert warp_labels(label, ddf, "label")[0, 0, 0, 0] == 2
    assert warp_labels(label, ddf, "nearest")[0, 0, 0, 0] == 9


@pytest.mark.parametrize("chunk", [7, 64, 1000])
@pytest.mark.parametrize("padding_mode", SCIPY_MODES)
def test_the_chunk_size_does_not_matter(monkeypatch, smooth_ddf, rng, chunk, padding_mode):
    shape = (11, 9, 8)
    label = torch.from_numpy(rng.integers(0, 100, (2, 2, *shape)))
    ddf = smooth_ddf(shape, 3.0, batch=2)
    expected = warp_labels(label, ddf, "label", padding_mode)
    monkeypatch.setattr("monai_drdm.fields.labels._CHUNK", chunk)
    assert torch.equal(warp_labels(label, ddf, "label", padding_mode), expected)


@pytest.mark.parametrize("mode", ["nearest", "label"])
@given(seed=st.integers(0, 2**32 - 1), shape=st.lists(st.integers(1, 7), min_size=2, max_size=3))
def test_no_id_is_invented(mode, seed, shape):
    rng = np.random.default_rng(seed)
    label = torch.from_numpy(rng.integers(-(2**62), 2**62, (1, 1, *shape)))
    ddf = torch.from_numpy(rng.uniform(-9, 9, (1, len(shape), *shape)))
    warped = warp_labels(label, ddf, mode)
    assert set(warped.unique().tolist()) <= set(label.unique().tolist())
    outside = warp_labels(label, ddf, mode, "zeros")
    assert set(outside.unique().tolist()) <= {0, *label.unique().tolist()}


@pytest.mark.parametrize("mode", ["nearest", "label"])
def test_label_and_field_are_not_modified(smooth_ddf, mode):
    label, ddf = torch.arange(120).view(1, 1, 10, 12), smooth_ddf((10, 12))
    before = ddf.clone()
    warp_labels(label, ddf, mode, "zeros").zero_()
    assert torch.equal(label, torch.arange(120).view(1, 1, 10, 12))
    assert torch.equal(ddf, before)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "linear"])
def test_modes_that_blend_are_refused(mode):
    with pytest.raises(ValueError, match="warp_labels: mode must be 'nearest' or 'label'"):
        warp_labels(torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, 4, 4), mode)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="must share one grid"):
        warp_labels(torch.zeros(1, 1, 4, 5), torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match="padding_mode must be"):
        warp_labels(torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, 4, 4), "label", "wrap")
