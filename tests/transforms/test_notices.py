"""What looks like a mistake is said once, and is computed all the same; honest data are met in silence."""

from __future__ import annotations

import pickle
import re
import warnings

import nibabel
import numpy as np
import pytest
import torch
from monai.data import DataLoader, list_data_collate, MetaTensor
from monai.transforms import (
    CenterSpatialCropd,
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    EnsureTyped,
    LoadImaged,
    RandAffined,
    RandCropByPosNegLabeld,
    RandSpatialCropd,
)
from PIL import Image

from monai_drdm import ApplyDDFd, BatchRandDRDMDeformd, RandDRDMDeform, RandDRDMDeformd, RandDRDMPaird
from monai_drdm.transforms.notices import layout_problem, looks_like_labels

KEYS, MODES = ["image", "label"], ["bilinear", "nearest"]


def said(transform, *samples):
    """What a transform says of samples, without what others say."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for sample in samples:
            transform(sample)
    return [str(one.message) for one in caught if str(one.message).startswith(type(transform).__name__)]


def idle(keys=KEYS, kind=RandDRDMDeformd, **options):
    """A transform that never fires: it looks at the data all the same."""
    return kind(keys, prob=0.0, **options)


# --- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.bool, torch.uint16])
def test_labels_that_would_become_fractions(scan, dtype, mode):
    sample = scan((40, 48), dtype)
    transform = idle(mode=mode)
    (message,) = said(transform, sample, sample, sample)
    assert re.search(rf"'label' seems to hold labels, and mode='{mode}'.*mode=\['bilinear', 'nearest'\]", message)
    assert not said(idle(mode=[mode, "nearest"]), sample)
    assert not said(idle("label", mode=mode), sample), "the image key is what the user says it is"


@pytest.mark.parametrize("kind", [BatchRandDRDMDeformd, RandDRDMPaird, ApplyDDFd])
def test_every_form_says_so(scan, kind):
    sample = scan((40, 48))
    options = {"ddf": torch.zeros(2, 40, 48)} if kind is ApplyDDFd else {"prob": 0.0}
    sample = list_data_collate([sample] * 2) if kind is BatchRandDRDMDeformd else sample
    (message,) = said(kind(KEYS, **options), sample, sample)
    assert "'label' seems to hold labels" in message


def test_a_label_that_is_empty_at_first(scan):
    sample = scan((40, 48))
    empty = sample | {"label": torch.zeros_like(sample["label"])}
    assert len(said(idle(), empty, empty, sample, sample)) == 1
    assert not said(idle(), empty, empty)


def test_few_ids_in_disorder():
    ids = torch.randint(0, 5, (1, 1, 40, 48), generator=torch.Generator().manual_seed(1))
    assert looks_like_labels(ids)


def photograph(noise, dtype, seed=3):
    """Whole numbers as a camera or scanner gives them: smooth, with noise, and a black background."""
    axes = torch.meshgrid(*[torch.linspace(-1, 1, 96)] * 2, indexing="ij")
    smooth = 200 * torch.exp(-2 * (axes[0] ** 2 + axes[1] ** 2)) * (axes[0] ** 2 + axes[1] ** 2 < 0.8)
    noisy = smooth + noise * torch.randn(96, 96, generator=torch.Generator().manual_seed(seed)) * (smooth > 0)
    return noisy.clamp(0, 255).round().to(dtype)[None]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32])
@pytest.mark.parametrize("noise", [2.0, 8.0])
def test_second_images_of_whole_numbers_are_met_in_silence(dtype, noise):
    image = photograph(noise, dtype)
    assert not said(idle(["t1", "t2"]), {"t1": image, "t2": image})


@pytest.mark.parametrize("name", ["float", "nan", "constant"])
def test_other_values_are_met_in_silence(scan, name):
    values = {
        "float": torch.randn(1, 40, 48),
        "nan": torch.full((1, 40, 48), torch.nan),
        "constant": torch.full((1, 40, 48), 3),
    }
    assert not said(idle(), scan((40, 48)) | {"label": values[name]})


def test_labels_that_monai_made_fractions_of_before(scan):
    """By lazy resampling, whatever the mode. Without it there are none, and other fractions are met in silence."""
    sample = scan((64, 64), torch.float32)
    for lazy in (True, False):
        steps = [EnsureTyped(KEYS), RandAffined(KEYS, mode=MODES, prob=1.0, rotate_range=0.4)]
        moved = Compose(steps, lazy=lazy).set_random_state(1)(sample)
        fractions = bool((moved["label"] != moved["label"].round()).any())
        messages = said(idle(mode=MODES), moved, moved)
        assert len(messages) == fractions == lazy, "MONAI no longer does so: drop the notice"
        assert not fractions or re.search(r"'label'.*RandAffined moved it lazily.*lazy=False", messages[0])
    soft = sample | {"label": MetaTensor(sample["label"] * 0.3)}
    assert not said(idle(mode=MODES), soft)


def test_pending_operations_keep_the_mode_they_were_recorded_with(scan):
    """Where this transform applies them, labels stay whole, as where MONAI applies them at once."""
    sample = EnsureTyped(KEYS)(scan((64, 64), torch.float32))
    options = {"mode": MODES, "prob": 1.0, "rotate_range": 0.4, "padding_mode": "zeros"}
    at_once, later = (RandAffined(KEYS, lazy=lazy, **options).set_random_state(1)(sample) for lazy in (False, True))
    assert later["label"].has_pending_operations
    transform = idle(mode=MODES)
    assert not said(transform, later)
    applied = transform(later)
    assert torch.equal(applied["label"], applied["label"].round())
    assert (applied["label"] != at_once["label"]).float().mean() < 0.02
    assert (applied["image"] - at_once["image"])[:, 12:-12, 12:-12].abs().max() < 1e-3


# --- layout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "advice"),
    [
        ((64, 64, 1), "EnsureChannelFirstd"),
        ((40, 48, 3), "EnsureChannelFirstd"),
        ((40, 48, 4), "EnsureChannelFirstd"),
        ((32, 40, 20, 1), "EnsureChannelFirstd"),
        ((4, 1, 64, 64), "BatchRandDRDMDeformd"),
    ],
)
def test_axes_in_another_order(shape, advice):
    image = torch.rand(shape)
    (message,) = said(idle("image"), {"image": image}, {"image": image})
    assert f"'image' of shape {shape} is taken for {shape[0]} channels" in message
    assert advice in message
    assert idle("image")({"image": image})["image"].shape == shape
    assert advice in said(RandDRDMDeform(prob=0.0), image)[0]
    if advice != "BatchRandDRDMDeformd":
        assert advice in said(idle("image", BatchRandDRDMDeformd), {"image": image[None]})[0]


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 512),
        (1, 512, 1),
        (3, 512, 1),
        (1, 256, 256),
        (3, 40, 48),
        (15, 64, 64),
        (64, 64, 64),
        (256, 32, 32),
        (20, 12, 3),
        (1, 1, 64, 64),
        (2, 64, 64, 1),
        (4, 64, 64, 3),
        (1, 1, 1, 512),
        (4, 1, 8, 8),
        (4, 3, 64, 64),
        (32, 40, 40, 40),
    ],
)
def test_honest_shapes_are_met_in_silence(shape):
    """Thin volumes, rows and columns, many channels."""
    assert not said(RandDRDMDeform(prob=0.0), torch.rand(shape))
    assert not said(idle("image", BatchRandDRDMDeformd), {"image": torch.rand(2, *shape)})


@pytest.fixture
def files(tmp_path):
    """A volume, one of three channels, and a photograph."""
    rng = np.random.default_rng(1)
    for name, shape in {"volume": (40, 48, 30), "vectors": (40, 48, 30, 3), "slice": (40, 48, 1)}.items():
        nibabel.save(nibabel.Nifti1Image(rng.random(shape, np.float32), np.eye(4)), tmp_path / f"{name}.nii.gz")
    Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8)).save(tmp_path / "photo.png")
    return {path.name.split(".")[0]: path for path in tmp_path.iterdir()}


@pytest.mark.parametrize("name", ["volume", "vectors", "slice", "photo"])
def test_what_the_metadata_of_a_file_know(files, name):
    """A missing ``EnsureChannelFirstd`` is noticed by them, also of a volume of 40 slices, and nothing else is."""
    load, order = LoadImaged("image"), EnsureChannelFirstd("image")
    raw, ordered = load({"image": files[name]}), order(load({"image": files[name]}))
    (message,) = said(idle("image"), raw, raw)
    assert "EnsureChannelFirstd" in message
    assert not said(idle("image"), ordered, ordered)
    sides = ordered["image"].shape[1:]
    many = ordered | {"image": MetaTensor(torch.rand(20, *sides), meta=ordered["image"].meta)}
    assert not said(idle("image"), many), "20 channels, and the file has as many axes as it should"
    batch = list_data_collate([ordered] * 2)
    assert not said(idle("image", BatchRandDRDMDeformd), batch)
    if name == "volume":
        (message,) = said(idle("image", BatchRandDRDMDeformd), ordered)
        assert "taken for a batch of 2D images. If it is one volume, RandDRDMDeformd" in message


# --- patches --------------------------------------------------------------------------------------------------------


def patches(count, *steps):
    """Samples cut from one scan."""
    image = MetaTensor(torch.rand(1, 40, 40, 40, generator=torch.Generator().manual_seed(2)))
    pipeline = Compose([EnsureTyped(KEYS), *steps]).set_random_state(1)
    made = [pipeline({"image": image, "label": (image > 0.5).float()}) for _ in range(count)]
    return [one[0] if isinstance(one, list) else one for one in made]


CROPS = [
    RandSpatialCropd(KEYS, (16, 16, 16), random_size=False),
    RandCropByPosNegLabeld(KEYS, "label", (16, 16, 16), num_samples=1),
]


@pytest.mark.parametrize("crop", CROPS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("kind", [RandDRDMDeformd, RandDRDMPaird, BatchRandDRDMDeformd, RandDRDMDeform])
def test_random_patches_of_larger_scans(crop, kind):
    samples = patches(4, crop)
    if kind is BatchRandDRDMDeformd:
        samples = [list_data_collate([one] * 2) for one in samples]
    if kind is RandDRDMDeform:
        transform, samples = RandDRDMDeform(prob=0.0), [one["image"] for one in samples]
    else:
        transform = idle(kind=kind, mode=MODES)
    assert not said(transform, *samples[:2])
    (message,) = said(transform, *samples[2:])
    assert re.search(r"out of \(40, 40, 40\).*Put this transform before random crops.*DeformationBank", message)


def test_other_crops_are_met_in_silence():
    """What is cut to its foreground or centre is the scan, and a crop of nearly all of it costs nearly as much."""
    for step in (
        CenterSpatialCropd(KEYS, (16, 16, 16)),
        CropForegroundd(KEYS, "image", lambda image: image > 0.999),
        RandSpatialCropd(KEYS, (32, 32, 32), random_size=False),
    ):
        assert not said(idle(mode=MODES), *patches(4, step))
    mixed = patches(2, CROPS[0]) + patches(1) + patches(2, CROPS[0])
    assert not said(idle(mode=MODES), *mixed)
    given = ApplyDDFd(KEYS, torch.zeros(3, 16, 16, 16), mode=MODES)
    assert not said(given, *patches(4, CROPS[0])), "a given field costs nothing"


# --- once, and without cost -----------------------------------------------------------------------------------------


def test_only_the_first_calls_are_looked_at(scan):
    """Whatever comes later loses no time; a pickled transform goes on where it was."""
    sample = scan((24, 24))
    transform = idle(mode=MODES)
    assert not said(transform, *[sample] * 64)
    late = sample | {"image": torch.rand(24, 24, 3), "label": torch.rand(24, 24, 3)}
    assert not said(transform, late)
    assert len(said(idle(mode=MODES), late)) == 1
    assert not said(pickle.loads(pickle.dumps(transform)), late)


def test_metadata_of_any_kind_do_no_harm():
    for shape in ("unknown", 3, [None], object(), []):
        image = MetaTensor(torch.rand(1, 20, 24), meta={"spatial_shape": shape})
        image.applied_operations = [{"class": "RandSpatialCrop", "orig_size": shape}, "text"]
        assert layout_problem(image, (1, 20, 24), batched=False) is None
        assert not said(RandDRDMDeform(prob=0.0), image, image, image)
        image.is_batch = True
        image.applied_operations = ["text"]
        assert not said(idle("image", BatchRandDRDMDeformd), {"image": image[None]})


class Sayings:
    """How often a transform says something of each sample, in whatever process that happens."""

    def __init__(self, samples, transform):
        self.samples, self.transform = samples, transform

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return len(said(self.transform, self.samples[index]))


def test_of_several_workers_one_speaks(scan):
    sayings = Sayings([scan((24, 24))] * 4, idle())
    loader = DataLoader(sayings, num_workers=2, batch_size=1, multiprocessing_context="fork")
    assert [int(count) for count in loader] == [1, 0, 0, 0]
    assert [int(count) for count in loader] == [0, 0, 0, 0]  # another epoch, with other workers
    again = DataLoader(Sayings(sayings.samples, idle()), num_workers=2, batch_size=1, multiprocessing_context="fork")
    assert [int(count) for count in again] == [1, 0, 0, 0]
