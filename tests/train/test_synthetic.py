import numpy as np
import pytest
import torch

from monai_drdm.train.augmentation import smooth_noise
from monai_drdm.train.synthetic import _organs, synthetic_images, synthetic_labels

SIZES = [(17, 17), (65, 49), (48, 80), (17, 17, 17), (24, 33, 19)]
THIN = [(33, 1, 25), (17, 17, 1), (1, 33), (5, 3), (2, 2)]


def seeded_generator(seed=0):
    return torch.Generator().manual_seed(seed)


def agreement(labels, other):
    """For each map the fraction of equal labels, of voxels that are not background in both."""
    body = (labels != 0) & (other != 0)
    return ((labels == other) & body).flatten(1).sum(dim=1) / body.flatten(1).sum(dim=1).clamp(min=1)


# labels


@pytest.mark.parametrize("size", [*SIZES, *THIN])
def test_labels_are_whole_numbers_from_zero(size):
    labels = synthetic_labels(seeded_generator(), 3, size)
    assert labels.shape == (3, 1, *size)
    assert labels.dtype == torch.int64
    assert labels.min() >= 0
    assert labels.max() < 100


@pytest.mark.parametrize("size", SIZES)
def test_anatomies_have_many_parts_on_a_background(size):
    maps = torch.cat([synthetic_labels(seeded_generator(seed), 4, size) for seed in range(8)])
    assert np.mean([len(one.unique()) for one in maps]) >= 5
    assert min(len(one.unique()) for one in maps) >= 2
    background = (maps == 0).flatten(1).float().mean(dim=1)
    assert (background > 0).float().mean() > 0.75
    assert 0.05 < background.mean() < 0.7


def test_parts_are_of_some_size():
    """No part of an image is all of it, and most voxels belong to parts of more than a hundredth."""
    for seed in range(6):
        for one in synthetic_labels(seeded_generator(seed), 4, (97, 81)):
            share = one.unique(return_counts=True)[1] / one.numel()
            assert share.max() < 0.9
            assert share[share > 0.01].sum() > 0.7


@pytest.mark.parametrize("size", [(65, 65), (97, 81), (33, 41, 33)])
def test_neighbours_mostly_belong_together(size):
    for seed in range(6):
        labels = synthetic_labels(seeded_generator(seed), 4, size)
        same = [(labels.diff(dim=d) == 0).float().mean().item() for d in range(2, labels.ndim)]
        assert min(same) > 0.7


@pytest.mark.parametrize("size", [(65, 65), (33, 33, 33)])
def test_some_anatomies_are_symmetric_about_one_axis_only(size):
    labels = torch.cat([synthetic_labels(seeded_generator(seed), 8, size) for seed in range(6)])
    mirrored, turned = agreement(labels, labels.flip(2)), agreement(labels, labels.flip(3))
    assert mirrored.mean() > turned.mean() + 0.1
    assert 0.25 < (mirrored > turned.max()).float().mean() < 0.75


@pytest.mark.parametrize("size", [(33, 25), (17, 9, 13)])
def test_organs_are_where_their_field_is_the_largest(size):
    """Against a sort of all fields, drawn again with the random numbers in the order of the code."""
    for seed in range(4):
        labels, edge, used = _organs(seeded_generator(seed), 5, size)
        generator = seeded_generator(seed)
        count, nodes = (int(torch.randint(*one, (1,), generator=generator)) for one in ((6, 16), (3, 8)))
        fields = smooth_noise(generator, 5, count, size, nodes) + 0.4 * smooth_noise(generator, 5, count, size, 9)
        for number in torch.nonzero(torch.rand(5, generator=generator) < 0.5)[:, 0].tolist():
            fields[number] += fields[number].flip(1)
        order = np.argsort(fields.numpy(), axis=1)
        largest = np.sort(fields.numpy(), axis=1)
        np.testing.assert_array_equal(labels.numpy(), order[:, -1:] + 1)
        np.testing.assert_allclose(edge.numpy(), largest[:, -1:] - largest[:, -2:-1], atol=1e-5)
        assert used == count + 1


# images


@pytest.mark.parametrize("size", [*SIZES, *THIN])
def test_images_are_finite_and_in_range(size):
    for seed in range(3):
        images = synthetic_images(seeded_generator(seed), 3, size)
        assert images.shape == (3, 1, *size)
        assert images.dtype == torch.float32
        assert not images.requires_grad
        assert images.isfinite().all()
        assert images.min() >= 0
        assert images.max() <= 1


@pytest.mark.parametrize("size", SIZES)
def test_images_are_not_constant(size):
    images = torch.cat([synthetic_images(seeded_generator(seed), 4, size) for seed in range(6)])
    assert images.flatten(1).std(dim=1).min() > 0.03
    assert images.flatten(1).std(dim=1).mean() > 0.1


@pytest.mark.parametrize("size", [(65, 49), (25, 17, 21), [24, 24]])
@pytest.mark.parametrize("make", [synthetic_labels, synthetic_images])
def test_a_generator_fixes_what_is_made(make, size):
    state = torch.get_rng_state()
    first, again, other = (make(seeded_generator(seed), 3, size) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    generator = seeded_generator(1)
    assert torch.equal(make(generator, 3, size), first)
    assert not torch.equal(make(generator, 3, size), first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [(97, 81), (41, 33, 37)])
def test_contrast_is_that_of_labels_and_differs_between_images(size):
    """An image starts from the labels that its generator gives first."""
    spread, explained = [], []
    for seed in range(5):
        labels = synthetic_labels(seeded_generator(seed), 6, size)
        images = synthetic_images(seeded_generator(seed), 6, size)
        means = torch.full((6, int(labels.max()) + 1), torch.nan)
        for b in range(6):
            of_label = torch.zeros_like(images[b])
            for k in labels[b].unique().tolist():
                where = labels[b] == k
                of_label[where] = images[b][where].mean()
                if where.sum() > 50:
                    means[b, k] = images[b][where].mean()
            explained.append((of_label.var() / images[b].var()).item())
        for column in means.T[1:]:
            column = column[~column.isnan()]
            if len(column) > 3:
                spread.append(column.std().item())
    assert np.mean(explained) > 0.6
    assert len(spread) > 20
    assert np.median(spread) > 0.1


def test_the_background_is_mostly_dark():
    dark = []
    for seed in range(10):
        labels = synthetic_labels(seeded_generator(seed), 6, (65, 65))
        images = synthetic_images(seeded_generator(seed), 6, (65, 65))
        for one, label in zip(images, labels):
            if (label == 0).sum() > 200:
                dark.append((one[label == 0].mean() < one[label != 0].mean() / 2).item())
    assert 0.6 < np.mean(dark) < 1
