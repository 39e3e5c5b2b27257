from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.networks.blocks import Warp

from monai_drdm import RandDRDMDeformD, RandDRDMDeformd, RandDRDMDeformDict


def deform(network, keys=("image", "label"), **options):
    options.setdefault("mode", ("bilinear", "nearest"))
    return RandDRDMDeformd(keys, network=network, prob=1.0, **options)


def test_aliases():
    assert RandDRDMDeformD is RandDRDMDeformd
    assert RandDRDMDeformDict is RandDRDMDeformd


@pytest.mark.parametrize("shape", [(40, 48), (20, 24, 18)])
def test_one_field_for_all_keys(small_network, scan, shape):
    """Image coordinates as channels come back as the sampled coordinates; the label must be sampled at the same."""
    sample = scan(shape)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in shape), indexing="ij")
    coordinates = torch.stack(axes)
    keys = ("image", "label", "coordinates")
    transform = deform(small_network(len(shape)), keys, mode=("bilinear", "nearest", "bilinear")).set_random_state(2)
    out = transform({**sample, "coordinates": coordinates})
    where = out["coordinates"].as_tensor().round().long()
    expected = sample["label"][(slice(None), *where)]
    disagree = (out["label"].as_tensor() != expected).float().mean()
    assert disagree < 1e-3  # only exact halves may round differently
    sampled = Warp(mode="bilinear", padding_mode="border")(sample["image"][None], transform.last.ddf[None])[0]
    inside = (slice(None), *(slice(2, -2),) * len(shape))
    torch.testing.assert_close(out["image"].as_tensor()[inside], sampled[inside], atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["nearest", "label"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32])
def test_label_set_and_dtype_are_exact(small_network, scan, dtype, mode):
    sample = scan((40, 36), dtype)
    out = deform(small_network(2), mode=("bilinear", mode)).set_random_state(1)(sample)
    assert out["label"].dtype == dtype
    assert set(out["label"].unique().tolist()) <= set(sample["label"].unique().tolist())


@pytest.mark.parametrize("mode", ["nearest", "label"])
def test_label_ids_beyond_float_precision(small_network, scan, mode):
    sample = scan((30, 30), torch.int64)
    big = 2**40 + 1
    sample["label"] = torch.where(sample["label"] == 2, big, sample["label"])
    out = deform(small_network(2), mode=("bilinear", mode)).set_random_state(1)(sample)
    assert set(out["label"].unique().tolist()) == {0, 1, big}


@pytest.mark.parametrize("dtype", [bool, np.uint16, np.int64])
def test_numpy_labels(small_network, scan, dtype):
    sample = scan((30, 30))
    label = (sample["label"].numpy() > 0).astype(dtype)
    out = deform(small_network(2)).set_random_state(1)({"image": sample["image"].numpy(), "label": label})
    assert set(np.unique(np.asarray(out["label"]))) <= {0, 1}
    assert np.asarray(out["label"]).dtype == label.dtype


def test_empty_label_and_channels_that_differ(small_network, scan):
    sample = scan((32, 24))
    sample["label"] = torch.zeros(3, 32, 24, dtype=torch.bool)
    out = deform(small_network(2)).set_random_state(1)(sample)
    assert out["label"].shape == (3, 32, 24)
    assert not out["label"].any()


def test_input_is_left_alone_and_other_entries_pass(small_network, scan):
    sample = {**scan((32, 24)), "id": "p1"}
    copies = {key: value.clone() for key, value in sample.items() if key != "id"}
    out = deform(small_network(2)).set_random_state(1)(sample)
    assert out["id"] == "p1"
    for key, value in copies.items():
        torch.testing.assert_close(sample[key], value, rtol=0, atol=0)
    idle = RandDRDMDeformd(("image", "label"), network=small_network(2), prob=0.0)(sample)
    torch.testing.assert_close(idle["image"].as_tensor(), sample["image"], rtol=0, atol=0)


def test_image_key_decides_the_field(small_network, scan):
    sample = scan((32, 32))
    sample["other"] = torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(0))
    fields = {}
    for image_key in ("image", "other"):
        transform = deform(small_network(2), ("label", "image", "other"), mode="nearest", image_key=image_key)
        transform.set_random_state(1)(sample)
        fields[image_key] = transform.last.ddf
    assert not torch.equal(fields["image"], fields["other"])
    default = deform(small_network(2), ("image", "label")).set_random_state(1)
    default(sample)
    torch.testing.assert_close(default.last.ddf, fields["image"], rtol=0, atol=0)


def test_replay_and_reproducibility(small_network, scan):
    sample = scan((32, 40))
    a, b = (deform(small_network(2)).set_random_state(5) for _ in range(2))
    first, second, third = a(sample), b(sample), a(sample)
    torch.testing.assert_close(first["image"], second["image"], rtol=0, atol=0)
    assert not torch.equal(first["image"].as_tensor(), third["image"].as_tensor())
    replayed = a(sample, params=b.last.params)
    torch.testing.assert_close(replayed["label"], second["label"], rtol=0, atol=0)
    by_field = a(sample, field=b.last.ddf)
    torch.testing.assert_close(by_field["image"], second["image"], rtol=0, atol=0)


def test_missing_keys(small_network, scan):
    sample = {"image": scan((24, 24))["image"]}
    with pytest.raises(KeyError, match="label"):
        deform(small_network(2))(sample)
    out = deform(small_network(2), allow_missing_keys=True)(sample)
    assert set(out) == {"image"}
    with pytest.raises(KeyError, match="image_key"):
        deform(small_network(2), allow_missing_keys=True)({"label": scan((24, 24))["label"]})


def test_keys_must_agree(small_network, scan):
    sample = scan((24, 24))
    with pytest.raises(ValueError, match="one spatial shape"):
        deform(small_network(2))({"image": sample["image"], "label": torch.zeros(1, 24, 25)})
    shifted = torch.eye(4, dtype=torch.float64)
    shifted[0, 3] = 5
    metas = {"image": MetaTensor(sample["image"]), "label": MetaTensor(sample["label"], affine=shifted)}
    with pytest.raises(ValueError, match="one affine"):
        deform(small_network(2))(metas)


def test_wrong_number_of_modes(small_network):
    with pytest.raises(ValueError, match="mode must be one or one per key"):
        RandDRDMDeformd(("a", "b"), network=small_network(2), mode=["bilinear"] * 3)
    with pytest.raises(ValueError, match="padding_mode must be one or one per key"):
        RandDRDMDeformd(("a", "b"), network=small_network(2), padding_mode=["zeros"] * 3)


def test_bicubic_is_for_2d_only(small_network, scan):
    out = deform(small_network(2), mode=("bicubic", "nearest")).set_random_state(0)(scan((32, 32)))
    assert torch.isfinite(out["image"]).all()
    with pytest.raises(ValueError, match="bicubic"):
        deform(small_network(3), mode=("bicubic", "nearest"))(scan((16, 16, 16)))


def test_metadata_survives(small_network, scan):
    sample = scan((24, 24))
    affine = torch.tensor([[0, 2.0, 0, 5], [-3, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)
    metas = {key: MetaTensor(value, affine=affine, meta={"name": key}) for key, value in sample.items()}
    out = deform(small_network(2)).set_random_state(0)(metas)
    for key, value in out.items():
        torch.testing.assert_close(value.affine, affine)
        assert value.meta["name"] == key
