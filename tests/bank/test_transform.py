from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import decollate_batch, list_data_collate, MetaTensor
from monai.networks.blocks import Warp
from monai.transforms import Affine, Compose, Invertd
from scipy.ndimage import center_of_mass

from monai_drdm import DeformationBank, RandDRDMBankd
from monai_drdm.fields import fold_fraction, warp_points
from monai_drdm.transforms import BankedParams, RandDRDMBankD, RandDRDMBankDict

KEYS = ["image", "label"]
MODES = ["bilinear", "nearest"]
POSE = {"rotate_range": 0.4, "scale_range": 0.2, "shear_range": 0.1, "translate_range": 3.0}


@pytest.fixture
def banked(small_network, scan):
    """A sample, and a transform by a bank of it."""

    def build(shape=(48, 40), bank_options=None, **options):
        sample = {**scan(shape), "name": "one"}
        dims = 2 if bank_options and "slice_axis" in bank_options else len(shape)
        bank = DeformationBank.build(
            [sample],
            id_key="name",
            network=small_network(dims, working_size=32 if dims == 2 else 16),
            fields_per_image=4,
            progress=False,
            **bank_options or {},
        )
        settings = {"keys": KEYS, "bank": bank, "id_key": "name", "prob": 1.0, "mode": MODES, **options}
        return sample, RandDRDMBankd(**settings).set_random_state(1)

    return build


def middle(tensor, margin=8):
    return torch.as_tensor(tensor)[(slice(None), *(slice(margin, -margin),) * (tensor.ndim - 1))]


def test_aliases():
    assert RandDRDMBankD is RandDRDMBankd
    assert RandDRDMBankDict is RandDRDMBankd


@pytest.mark.parametrize("shape", [(48, 40), (20, 24, 18)])
def test_it_moves_as_monai_warps(banked, shape):
    sample, transform = banked(shape)
    out = transform(sample)
    expected = Warp("bilinear", "border")(sample["image"][None], transform.last.ddf[None])[0]
    torch.testing.assert_close(middle(out["image"], 2), middle(expected, 2), atol=1e-4, rtol=0)
    assert out["label"].dtype == torch.uint8
    assert transform.last.statistics.max_displacement_vox > 0.5


@pytest.mark.parametrize("shape", [(48, 40), (20, 24, 18)])
def test_the_pose_is_that_of_monai(banked, shape):
    """Without displacement what is left is MONAI's ``Affine``."""
    sample, transform = banked(shape, displacement_scale=0.0, **POSE)
    out = transform(sample)
    matrix = np.array(transform.last.banked.matrix)
    expected = Affine(affine=matrix, padding_mode="border", image_only=True)(sample["image"])
    torch.testing.assert_close(out["image"].as_tensor(), torch.as_tensor(expected), atol=1e-4, rtol=0)
    assert abs(np.linalg.det(matrix) - 1) > 1e-3


@pytest.mark.parametrize("shape", [(48, 40), (20, 24, 18)])
def test_field_and_pose_are_one_field(banked, shape):
    """Image coordinates, sampled once, are those of the pose followed by the field."""
    sample, transform = banked(shape, **POSE)
    transform(sample)
    banked_params = transform.last.banked
    field = transform.bank.entry("one", sample["image"]).field(banked_params.index).ddf()
    matrix = torch.tensor(banked_params.matrix, dtype=torch.float64)
    centre = torch.tensor([(n - 1) / 2 for n in shape], dtype=torch.float64)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape), indexing="ij")
    posed = torch.einsum("ij,j...->i...", matrix[:-1, :-1], torch.stack(axes) - centre.view(-1, *[1] * len(shape)))
    posed = posed + (centre + matrix[:-1, -1]).view(-1, *[1] * len(shape))
    moved = Warp("bilinear", "border")(field[None].double(), (posed - torch.stack(axes))[None])[0]
    expected = posed + moved - torch.stack(axes)
    torch.testing.assert_close(transform.last.ddf.double(), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("pose", [{}, POSE])
def test_inverse_and_landmarks(banked, pose):
    sample, transform = banked((64, 56), displacement_scale=(0.4, 0.6), point_keys="points", **pose)
    points = torch.tensor([[[25.0, 30.0], [32.0, 28.0], [40.0, 22.0]]])
    out = transform({**sample, "points": points})
    expected = warp_points(points, transform.last.ddf[None])  # a posed field on a grid is interpolated between voxels
    torch.testing.assert_close(out["points"].as_tensor(), expected, atol=1e-2 if pose else 1e-3, rtol=0)
    back = transform.inverse({key: out[key] for key in (*KEYS, "points")})
    torch.testing.assert_close(back["points"].as_tensor(), points, atol=1e-2, rtol=0)
    lost = middle(back["image"].as_tensor() - sample["image"], 20).abs().mean()
    assert lost < 0.1 * middle(out["image"].as_tensor() - sample["image"], 20).abs().mean()
    there_and_back = (
        transform.last.inverse_ddf
        + Warp("bilinear", "border")(transform.last.ddf[None], transform.last.inverse_ddf[None])[0]
    )
    assert middle(there_and_back, 20).abs().max() < 0.05


TURNS = [{"flip_prob": 1.0}, {"rotate_range": (np.pi, np.pi)}, {"rotate_range": (2.2, 2.2), "flip_prob": 1.0}]


@pytest.mark.parametrize("pose", TURNS)
@pytest.mark.parametrize(
    ("shape", "options"), [((48, 40), {}), ((26, 24, 22), {}), ((36, 32, 5), {"bank_options": {"slice_axis": 2}})]
)
def test_landmarks_and_boxes_go_where_the_image_goes_under_flips_and_large_turns(banked, shape, options, pose):
    """Each landmark is the centre of mass of a spot in the image, each box encloses a block of a label."""
    points = torch.tensor([[[0.4, 0.55, 0.5], [0.6, 0.5, 0.5], [0.5, 0.35, 0.5]]])[..., : len(shape)]
    points = (points * (torch.tensor(shape) - 1)).round()
    axes = torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing="ij")
    away = torch.stack([sum((a - c) ** 2 for a, c in zip(axes, one)) for one in points[0]])
    low = torch.tensor([n // 3 for n in shape])
    high = torch.tensor([n // 2 + 1 for n in shape])
    block = torch.zeros(1, *shape, dtype=torch.uint8)
    block[(0, *(slice(a, b) for a, b in zip(low, high)))] = 1
    sample, transform = banked(
        shape,
        keys=["image", "spots", "block"],
        mode=["bilinear", "bilinear", "nearest"],
        point_keys="points",
        box_keys="boxes",
        displacement_scale=0.2,  # so that the centres of spots stay those of their mass
        **options,
        **{k: v[:1] if k == "rotate_range" and len(shape) == 2 else v for k, v in pose.items()},
    )
    given = {"points": points, "boxes": torch.cat([low, high])[None].float()}
    out = transform({**sample, "spots": torch.exp(-away / 4), "block": block, **given})
    assert bool(out["points_valid"].all())
    for spot, point in zip(out["spots"].numpy(), out["points"][0]):
        assert spot.sum() > 5
        np.testing.assert_allclose(center_of_mass(spot), point, atol=0.35)
    inside = torch.nonzero(out["block"].as_tensor()[0])
    (box,) = out["boxes"].as_tensor()
    assert bool((box[: len(shape)] <= inside.amin(0) + 0.5).all())
    assert bool((box[len(shape) :] >= inside.amax(0) + 0.5).all())
    assert bool((box[len(shape) :] - box[: len(shape)] <= inside.amax(0) - inside.amin(0) + 3).all())
    back = transform.inverse(out)
    torch.testing.assert_close(back["points"].as_tensor(), points, atol=1e-3, rtol=0)
    torch.testing.assert_close(back["boxes"].as_tensor(), given["boxes"], atol=1e-3, rtol=0)


def test_records_replay_and_travel(banked):
    sample, transform = banked(displacement_scale=(0.5, 1.0), **POSE)
    out = transform(sample)
    again = transform(sample, randomize=False)
    assert torch.equal(out["image"].as_tensor(), again["image"].as_tensor())
    record = BankedParams.from_json(transform.last.banked.to_json())
    assert record == transform.last.banked
    replayed = transform(sample, params=record)
    assert torch.equal(out["image"].as_tensor(), replayed["image"].as_tensor())
    assert out["image"].applied_operations[-1]["extra_info"]["params"] == record.to_json()
    decollated = decollate_batch(list_data_collate([{key: out[key] for key in KEYS}]))
    inverted = Invertd(KEYS, transform, orig_keys=KEYS, nearest_interp=False)(decollated[0])
    assert inverted["image"].shape == sample["image"].shape
    with pytest.raises(ValueError, match="params were recorded for image 'one'"):
        transform(sample, params=BankedParams.from_json(record.to_json().replace(record.bank, "0" * 64)))
    with pytest.raises(ValueError, match="cannot be read as a record"):
        BankedParams.from_json("{}")


def test_all_fields_are_drawn_and_the_state_decides(banked):
    sample, transform = banked(prob=0.5)
    seen, fired = set(), 0
    for _ in range(60):
        transform(sample)
        if transform.last is not None:
            fired += 1
            seen.add(transform.last.banked.index)
    assert seen == {0, 1, 2, 3}
    assert 15 < fired < 45
    first = [transform.set_random_state(3)(sample)["image"].as_tensor() for _ in range(2)]
    assert torch.equal(*first)
    composed = Compose([transform]).set_random_state(9)
    assert composed(sample)["image"].shape == sample["image"].shape
    transform.seed_key = "name"
    same = [transform(sample)["image"].as_tensor() for _ in range(2)]
    assert torch.equal(*same)


def test_less_displacement_may_fold(banked):
    """A field that folds only when it is scaled down is scaled further, until it does not."""
    sample, transform = banked(displacement_scale=0.6)
    entry = transform.bank.entry("one", sample["image"])
    step = 1 / 256
    axes = [(torch.arange(n) - (n - 1) / 2) * -rate / step for n, rate in zip(entry.values.shape[2:], (2.0, 1.5))]
    entry.values.copy_(torch.stack(torch.meshgrid(*axes, indexing="ij")).round().to(torch.int16))
    object.__setattr__(entry, "steps", (step,) * 4)
    whole = entry.field(0).ddf()[None]
    assert float(fold_fraction(whole)[0]) == 0  # mirrored along both axes
    assert float(fold_fraction(0.6 * whole)[0]) > 0.9  # along one of them
    transform(sample)
    assert float(fold_fraction(transform.last.ddf[None])[0]) <= 1e-4
    assert 0 < transform.last.banked.scale < 0.6


def test_volumes_by_an_in_plane_field(banked):
    sample, transform = banked((40, 36, 5), {"slice_axis": 2}, rotate_range=0.3)
    transform(sample)
    ddf = transform.last.ddf
    assert ddf.shape == (3, 40, 36, 5)
    assert torch.equal(ddf[..., 0], ddf[..., 4])
    assert not ddf[2].any()


def test_wrong_calls(banked):
    sample, transform = banked()
    with pytest.raises(ValueError, match="randomize=False"):
        transform(sample, randomize=False)
    with pytest.raises(KeyError, match="image"):
        transform({"label": sample["label"]})
    with pytest.raises(ValueError, match="id_key 'name' is missing"):
        transform({key: sample[key] for key in KEYS})
    with pytest.raises(TypeError, match="bank must be a DeformationBank"):
        RandDRDMBankd("image", bank="folder")
    with pytest.raises(ValueError, match="displacement_scale"):
        RandDRDMBankd("image", bank=transform.bank, displacement_scale=(0.5, 1.5))
    with pytest.raises(ValueError, match="prob must be"):
        RandDRDMBankd("image", bank=transform.bank, prob=2)


def test_file_names_are_identities(small_network, scan):
    image = MetaTensor(scan((32, 32))["image"], meta={"filename_or_obj": "ward/7.nii.gz"})
    bank = DeformationBank.on_demand(network=small_network(2), fields_per_image=2)
    transform = RandDRDMBankd("image", bank=bank, prob=1.0)
    transform({"image": image})
    assert transform.last.banked.identity == "ward/7.nii.gz"
    assert "ward/7.nii.gz" in bank
