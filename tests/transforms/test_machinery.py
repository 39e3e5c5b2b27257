"""MONAI's own test modules for invertible random transforms, pointed at this package's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import (
    CacheDataset,
    DataLoader,
    Dataset,
    decollate_batch,
    MetaTensor,
    pad_list_data_collate,
    set_track_meta,
    TestTimeAugmentation,
)
from monai.transforms import (
    allow_missing_keys_mode,
    BatchInverseTransform,
    CenterSpatialCropd,
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    Flipd,
    Invertd,
    OneOf,
    PadListDataCollate,
    Rand2DElasticd,
    RandFlipd,
    RandomOrder,
    RandRotate90d,
    Rotate90d,
    ScaleIntensityd,
    SomeOf,
    SpatialPadd,
)
from monai.utils import TraceKeys

from monai_drdm import ApplyDDFd, load_network, RandDRDMDeform, RandDRDMDeformd
from monai_drdm.networks import save_network

KEYS = ("image", "label")
MODES = ("bilinear", "nearest")


def deform(network, **options):
    options = {"prob": 1.0, "mode": MODES, "deformation_level": 0.4, **options}
    return RandDRDMDeformd(KEYS, network=network, **options).set_random_state(1)


def fresh(sample):
    """MONAI's transforms write records onto their input: every run gets its own."""
    return {key: MetaTensor(value.clone()) for key, value in sample.items()}


def wave(shape, amplitude=3.0):
    """A smooth field along the first axis that vanishes at both ends of the second."""
    ramp = torch.sin(torch.linspace(0, torch.pi, shape[1])) * amplitude
    return torch.stack([ramp[None].expand(*shape), torch.zeros(*shape)])


def interior(data, margin=6):
    return torch.as_tensor(data)[(..., *(slice(margin, -margin),) * 2)]


def overlap(found, truth):
    """Mean Dice over the labels of the truth."""
    found, truth = torch.as_tensor(found), torch.as_tensor(truth)
    scores = [
        2.0 * ((found == one) & (truth == one)).sum() / ((found == one).sum() + (truth == one).sum())
        for one in truth.unique()
        if one > 0
    ]
    return float(torch.stack(scores).mean())


def names(data):
    return [operation[TraceKeys.CLASS_NAME] for operation in data.applied_operations]


def assert_same(found, expected):
    assert set(found) == set(expected)
    for key in KEYS:
        assert torch.equal(torch.as_tensor(found[key]), torch.as_tensor(expected[key]))


# test_inverse


def test_a_chain_is_undone_step_by_step(small_network, scan):
    """As in MONAI's test_inverse: each inverse gives what stood before its transform, newest first."""
    network = small_network(2, 48)
    chain = [
        SpatialPadd(KEYS, spatial_size=(100, 104)),
        RandFlipd(KEYS, prob=1, spatial_axis=1),
        deform(network),
        RandRotate90d(KEYS, prob=1, max_k=1),
        deform(network, deformation_level=0.3).set_random_state(5),
        Rotate90d(KEYS, k=2),
    ]
    sample = scan((96, 96))
    stages = [fresh(sample)]
    for transform in chain:
        stages.append(transform({key: value.clone() for key, value in stages[-1].items()}))
    current = {key: value.clone() for key, value in stages[-1].items()}
    for transform, before in zip(reversed(chain), reversed(stages[:-1])):
        current = transform.inverse(current)
        for key in KEYS:
            assert current[key].shape == before[key].shape
            assert names(current[key]) == names(before[key])
            torch.testing.assert_close(current[key].affine, before[key].affine)
        assert overlap(current["label"], before["label"]) >= 0.93
        assert (interior(current["image"], 12) - interior(before["image"], 12)).abs().mean() < 0.006
    assert current["image"].shape == (1, 96, 96)


# test_compose


def chain_around(network, size=100, prob=0.7):
    """MONAI's transforms, and a given field, on both sides of a random one."""
    return Compose(
        [
            EnsureTyped(KEYS),
            SpatialPadd(KEYS, spatial_size=(size, size)),
            RandFlipd(KEYS, prob=0.5, spatial_axis=0),
            ApplyDDFd(KEYS, wave((size, size)), mode=MODES),
            deform(network, prob=prob),
            RandRotate90d(KEYS, prob=0.5),
            CenterSpatialCropd(KEYS, roi_size=(size - 2, size - 2)),
        ]
    )


@pytest.mark.parametrize("seed", range(4))
def test_compose_inverse(small_network, scan, seed):
    sample = scan((96, 96))
    chain = chain_around(small_network(2, 48)).set_random_state(seed)
    out = chain(fresh(sample))
    expected = ["SpatialPad", "RandFlipd", "ApplyDDFd", "RandDRDMDeformd", "RandRotate90d", "CenterSpatialCrop"]
    assert names(out["image"]) == names(out["label"]) == expected
    assert out["image"].shape == (1, 98, 98)
    back = chain.inverse(out)
    for key in KEYS:
        assert back[key].applied_operations == []
        assert back[key].shape == sample[key].shape
    assert overlap(back["label"], sample["label"]) >= 0.93
    assert (interior(back["image"], 12) - interior(sample["image"], 12)).abs().mean() < 0.006


def test_compose_is_reproducible(small_network, scan):
    sample = scan((40, 40))
    runs = []
    for seed in (3, 3, 4):
        chain = chain_around(small_network(2), 44, prob=1.0).set_random_state(seed)
        runs.append([chain(fresh(sample)) for _ in range(3)])
    for first, second in zip(runs[0], runs[1]):
        assert_same(first, second)
    images = [run["image"].as_tensor() for run in (*runs[0], runs[2][0])]
    assert not any(torch.equal(images[a], images[b]) for a in range(4) for b in range(a))


def test_compose_gives_each_instance_its_own_randomness(small_network, scan):
    first, second = deform(small_network(2)), deform(small_network(2))
    Compose([first, second]).set_random_state(0)(fresh(scan((32, 32))))
    assert first.last.params.seed != second.last.params.seed


def test_compose_runs_parts(small_network, scan):
    """``start`` and ``end`` of Compose split a pipeline without changing what it gives."""
    sample = scan((40, 40))
    whole = chain_around(small_network(2), 44).set_random_state(3)
    parts = chain_around(small_network(2), 44).set_random_state(3)
    expected = whole(fresh(sample))
    assert_same(parts(parts(fresh(sample), end=4), start=4), expected)


def lazy_chain(network, lazy):
    flip = RandFlipd(KEYS, prob=1, spatial_axis=0)
    return Compose(
        [flip, Rotate90d(KEYS, k=1), deform(network), Flipd(KEYS, spatial_axis=1), RandRotate90d(KEYS, prob=1)],
        lazy=lazy,
    ).set_random_state(2)


@pytest.mark.parametrize("shape", [(40, 48), (20, 24, 22)])
def test_lazy_compose(small_network, scan, shape):
    """Lazy flips and turns wait for a resampling; the field must be drawn on what they make, not on what they found."""
    sample = scan(shape)
    network = small_network(len(shape), 16)
    eager, lazy = lazy_chain(network, False), lazy_chain(network, True)
    expected, out = eager(fresh(sample)), lazy(fresh(sample))
    torch.testing.assert_close(lazy.transforms[2].last.ddf, eager.transforms[2].last.ddf, atol=1e-2, rtol=0)
    for key in KEYS:
        assert not out[key].has_pending_operations
        assert out[key].shape == expected[key].shape
        # in 2D MONAI itself gives 3 x 3 affines when lazy and 4 x 4 ones when not
        linear = (slice(len(shape)),) * 2
        torch.testing.assert_close(out[key].affine[linear], expected[key].affine[linear])
    torch.testing.assert_close(out["image"].as_tensor(), expected["image"].as_tensor(), atol=1e-3, rtol=0)
    assert (out["label"].as_tensor() != expected["label"].as_tensor()).float().mean() < 1e-3


def test_pending_operations_come_first(small_network, scan):
    sample = scan((40, 48))
    turn = Rotate90d(KEYS, k=1, lazy=True)
    transform = deform(small_network(2))
    out = transform(turn(fresh(sample)))
    assert transform.last.ddf.shape == (2, 48, 40)
    assert names(out["image"]) == ["Rotate90", "RandDRDMDeformd"]
    assert not out["image"].has_pending_operations
    by_hand = {key: torch.rot90(value, 1, (1, 2)) for key, value in sample.items()}
    expected = deform(small_network(2))(by_hand)
    torch.testing.assert_close(out["image"].as_tensor(), expected["image"].as_tensor(), atol=1e-3, rtol=0)
    idle = deform(small_network(2), prob=0.0)(turn(fresh(sample)))
    torch.testing.assert_close(idle["image"].as_tensor(), by_hand["image"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["array", "dictionary", "given field"])
def test_pending_operations_stay_on_the_input(small_network, scan, form):
    """The input is left as it is: the second call must find the same lazy turn waiting that the first one found."""
    turned = Rotate90d(KEYS, k=1, lazy=True)(fresh(scan((40, 48))))
    assert turned["image"].has_pending_operations
    if form == "array":
        array = RandDRDMDeform(small_network(2), prob=0.0)
        outs = [array(turned["image"]) for _ in range(2)]
    else:
        given = ApplyDDFd(KEYS, torch.zeros(2, 48, 40), mode=MODES)
        transform = given if form == "given field" else deform(small_network(2), prob=0.0)
        outs = [transform(turned)["image"] for _ in range(2)]
    assert turned["image"].has_pending_operations
    assert names(turned["image"]) == []
    assert torch.equal(outs[0].as_tensor(), outs[1].as_tensor())


# test_invertd


@pytest.mark.parametrize("nearest_interp", [True, False])
def test_invertd(small_network, scan, nearest_interp):
    sample = scan((96, 96))
    chain = Compose([RandFlipd(KEYS, prob=1), deform(small_network(2, 48)), RandRotate90d(KEYS, prob=1)])
    out = chain.set_random_state(0)(fresh(sample))
    before = [dict(operation) for operation in out["image"].applied_operations]
    out["pred"] = torch.cat([out["image"], 2 * out["image"]])
    assert isinstance(out["pred"], MetaTensor)
    inverted = Invertd("pred", chain, orig_keys="image", nearest_interp=nearest_interp)(out)
    back = inverted["pred"]
    assert back.applied_operations == []
    assert back.shape == (2, 96, 96)
    error = (interior(back[:1].as_tensor()) - interior(sample["image"])).abs().mean()
    assert error < (0.03 if nearest_interp else 0.004)
    torch.testing.assert_close(back[1], 2 * back[0], atol=1e-5, rtol=0)
    drawn = set(torch.as_tensor(out["pred"]).unique().tolist())
    assert (set(back.unique().tolist()) <= drawn) is nearest_interp  # nearest invents no values
    assert [dict(operation) for operation in out["image"].applied_operations] == before
    assert before[1]["extra_info"]["mode"] == "bilinear"


def test_invertd_of_segmentations(small_network, scan):
    """The common use: class indices, predicted from the image, return by nearest though the image was interpolated."""
    sample = scan((96, 96))
    chain = Compose([EnsureTyped(KEYS), deform(small_network(2, 48))]).set_random_state(0)
    out = chain(fresh(sample))
    out["pred"] = out["label"].to(torch.int64)
    back = Invertd(["pred", "label"], chain, orig_keys=["image", "label"], nearest_interp=True)(out)
    assert back["pred"].dtype == torch.int64
    assert overlap(back["pred"], sample["label"]) >= 0.95
    assert torch.equal(back["pred"].as_tensor(), back["label"].as_tensor().to(torch.int64))


def test_invertd_leaves_idle_data(small_network, scan):
    chain = Compose([deform(small_network(2), prob=0.0)])
    out = chain(fresh(scan((32, 32))))
    prediction = MetaTensor(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)))
    back = Invertd("pred", chain, orig_keys="image")({**out, "pred": prediction})
    assert torch.equal(back["pred"].as_tensor(), prediction.as_tensor())
    assert names(out["image"]) == ["RandDRDMDeformd"]


# test_inverse_collation


def loader_of(samples, chain, **options):
    torch.manual_seed(1)  # MONAI's DataLoader seeds the transforms from it
    return DataLoader(Dataset([dict(one) for one in samples], chain), batch_size=len(samples), **options)


def collation_chain(network):
    return Compose(
        [EnsureTyped(KEYS), RandFlipd(KEYS, prob=0.5, spatial_axis=0), deform(network, prob=0.6)]
    ).set_random_state(4)


def test_batches_of_one_shape_return(small_network, scan):
    samples = [scan((96, 96)) for _ in range(4)]
    samples[1]["image"] = samples[1]["image"] * 2
    chain = collation_chain(small_network(2, 48))
    batch = next(iter(loader_of(samples, chain)))
    assert batch["image"].shape == (4, 1, 96, 96)
    items = decollate_batch(batch)
    fired = [item["image"].applied_operations[-1][TraceKeys.DO_TRANSFORM] for item in items]
    assert set(fired) == {True, False}
    for item, sample in zip(items, samples):
        back = chain.inverse(item)
        assert overlap(back["label"], sample["label"]) >= 0.95
        assert (interior(back["image"]) - interior(sample["image"])).abs().mean() < 0.008
        assert back["image"].applied_operations == []


def test_batches_of_many_shapes_return(small_network, scan):
    shapes = [(90, 96), (96, 80), (84, 92)]
    samples = [scan(shape) for shape in shapes]
    chain = collation_chain(small_network(2, 48))
    batch = next(iter(loader_of(samples, chain, collate_fn=pad_list_data_collate)))
    assert batch["image"].shape == (3, 1, 96, 96)
    items = decollate_batch(batch)
    fired = [item["image"].applied_operations[-2][TraceKeys.DO_TRANSFORM] for item in items]
    assert True in fired
    with pytest.raises(ValueError, match=r"PadListDataCollate\.inverse"):
        chain.transforms[-1].inverse(items[fired.index(True)])
    items = decollate_batch(next(iter(loader_of(samples, chain, collate_fn=pad_list_data_collate))))
    for item, sample in zip(items, samples):
        back = chain.inverse(PadListDataCollate.inverse(item))
        assert back["label"].shape == sample["label"].shape
        assert overlap(back["label"], sample["label"]) >= 0.95


@pytest.mark.parametrize("shapes", [[(96, 96)] * 3, [(90, 96), (96, 80), (84, 92)]])
def test_batch_inverse_transform(small_network, scan, shapes):
    samples = [scan(shape) for shape in shapes]
    chain = collation_chain(small_network(2, 48))
    loader = loader_of(samples, chain, collate_fn=pad_list_data_collate)
    batch = next(iter(loader))
    items = BatchInverseTransform(chain, loader)(batch)
    assert len(items) == 3
    for item, sample in zip(items, samples):
        assert item["label"].shape == sample["label"].shape
        assert overlap(item["label"], sample["label"]) >= 0.95


def test_batches_from_workers_return(small_network, scan):
    """The transform that inverts never saw the data: it was copied into the workers that did."""
    samples = [scan((96, 96)) for _ in range(4)]
    chain = Compose([EnsureTyped(KEYS), deform(small_network(2, 32))])
    loader = DataLoader(Dataset(samples, chain), batch_size=2, num_workers=2)
    items = [item for batch in loader for item in decollate_batch(batch)]
    assert len(items) == 4
    assert len({item["image"].as_tensor().sum().item() for item in items}) == 4
    for item, sample in zip(items, samples):
        assert overlap(item["label"], sample["label"]) < 0.93
        back = chain.inverse(item)
        assert overlap(back["label"], sample["label"]) >= 0.95
        assert back["image"].applied_operations == []


def test_cached_data_stay_as_they_were(small_network, scan):
    dataset = CacheDataset(
        [scan((32, 32))], Compose([EnsureTyped(KEYS), deform(small_network(2))]), progress=False, copy_cache=False
    )
    outs = [dataset[0] for _ in range(3)]
    assert [names(out["image"]) for out in outs] == [["RandDRDMDeformd"]] * 3
    assert torch.equal(dataset._cache[0]["image"].as_tensor(), scan((32, 32))["image"])
    assert names(dataset._cache[0]["image"]) == []


# test_testtimeaugmentation


@pytest.mark.parametrize("orig_key", ["image", "label"])
def test_test_time_augmentation(small_network, scan, orig_key):
    """A model that is a pointwise threshold commutes with deforming: all augmented predictions agree."""
    sample = scan((96, 96))
    chain = Compose([EnsureTyped(KEYS), RandFlipd(KEYS, prob=0.5), deform(small_network(2, 48))]).set_random_state(0)
    augment = TestTimeAugmentation(
        chain,
        batch_size=2,
        num_workers=0,
        inferrer_fn=lambda image: (image > 0.35).float(),
        orig_key=orig_key,
        progress=False,
    )
    most, mean, spread, coefficient = augment(fresh(sample), num_examples=4)
    truth = (sample["image"] > 0.35).float()
    assert most.shape == mean.shape == (1, 96, 96)
    assert overlap(most, truth) >= 0.97
    assert overlap((mean > 0.5).float(), truth) >= 0.97
    assert spread.max() > 0
    assert (spread > 0).float().mean() < 0.1  # only at the edge
    assert coefficient > 0


def test_test_time_augmentation_needs_the_inverse(small_network, scan):
    """Without inverting, predictions lie where the deformed anatomies lie: they spread far more."""
    sample = scan((64, 64))
    spreads = []
    for apply_inverse in (True, False):
        chain = Compose([EnsureTyped(KEYS), deform(small_network(2))]).set_random_state(0)
        augment = TestTimeAugmentation(
            chain, 2, 0, lambda image: (image > 0.35).float(), progress=False, apply_inverse_to_pred=apply_inverse
        )
        spreads.append(float(augment(fresh(sample), num_examples=4)[2].mean()))
    assert spreads[0] < 0.3 * spreads[1]


# test_one_of, test_some_of, test_random_order


def test_one_of(small_network, scan):
    sample = scan((96, 96))
    network = small_network(2, 48)
    choices = [
        deform(network),
        deform(network, deformation_level=0.2),
        RandFlipd(KEYS, prob=1, spatial_axis=0),
        ApplyDDFd(KEYS, wave((96, 96)), mode=MODES),
    ]
    chain = OneOf(choices).set_random_state(0)
    seen = set()
    for _ in range(8):
        out = chain(fresh(sample))
        operations = out["image"].applied_operations
        assert names(out["image"])[1:] == ["OneOf"]
        chosen = operations[-1]["extra_info"]["index"]
        assert names(out["image"])[0] == type(choices[chosen]).__name__
        seen.add(chosen)
        back = chain.inverse(out)
        assert back["image"].applied_operations == []
        assert overlap(back["label"], sample["label"]) >= 0.95
    assert len(seen) >= 3


@pytest.mark.parametrize("kind", [SomeOf, RandomOrder])
def test_some_of_and_random_order(small_network, scan, kind):
    sample = scan((96, 96))
    options = {"num_transforms": 2} if kind is SomeOf else {}
    choices = [
        deform(small_network(2, 48)),
        RandRotate90d(KEYS, prob=1, max_k=1),
        ApplyDDFd(KEYS, wave((96, 96)), mode=MODES),
    ]
    chain = kind(choices, **options).set_random_state(1)
    orders = set()
    for _ in range(6):
        out = chain(fresh(sample))
        applied = names(out["image"])
        assert applied.pop() == kind.__name__
        assert len(applied) == (2 if kind is SomeOf else 3)
        orders.add(tuple(applied))
        back = chain.inverse(out)
        assert back["image"].applied_operations == []
        assert overlap(back["label"], sample["label"]) >= 0.93
    assert len(orders) >= 2


def test_beside_a_transform_without_inverse(small_network, scan):
    """What MONAI cannot invert is stepped over; ours is taken back all the same."""
    sample = scan((96, 96))
    transform = deform(small_network(2, 48))
    elastic = Rand2DElasticd("image", spacing=(20, 20), magnitude_range=(0, 1), prob=0.0)
    chain = Compose([EnsureTyped(KEYS), elastic, transform, ScaleIntensityd("image")]).set_random_state(0)
    back = chain.inverse(chain(fresh(sample)))
    assert overlap(back["label"], sample["label"]) >= 0.95


# test_with_allow_missing_keys


def test_allow_missing_keys(small_network, scan):
    image = scan((32, 32))["image"]
    transform = deform(small_network(2))
    chain = Compose([EnsureTyped(KEYS, allow_missing_keys=True), transform]).set_random_state(0)
    with pytest.raises((KeyError, RuntimeError)):
        chain({"image": image})
    both = transform.set_random_state(3)(scan((32, 32)))
    with allow_missing_keys_mode(chain):
        assert transform.allow_missing_keys
        transform.set_random_state(3)  # MONAI flattens the pipeline to enter this mode, which seeds it anew
        out = chain({"image": image})
        back = chain.inverse({"image": out["image"].clone()})
    assert set(out) == set(back) == {"image"}
    assert torch.equal(out["image"].as_tensor(), both["image"].as_tensor())
    assert torch.equal(back["image"].as_tensor(), transform.inverse(both)["image"].as_tensor())
    assert not transform.allow_missing_keys
    with pytest.raises(KeyError, match="label"):
        transform({"image": image})


def test_allow_missing_keys_of_a_given_field(scan):
    sample = scan((32, 32))
    transform = ApplyDDFd(KEYS, wave((32, 32)), mode=MODES)
    with allow_missing_keys_mode(transform):
        out = transform({"label": sample["label"]})
    assert set(out) == {"label"}
    assert torch.equal(out["label"].as_tensor(), transform(sample)["label"].as_tensor())


# set_track_meta, kinds of input, configuration


def test_untracked_pipeline(small_network, scan):
    sample = scan((40, 40))
    tracked = chain_around(small_network(2), 44).set_random_state(3)(fresh(sample))
    try:
        set_track_meta(False)
        out = chain_around(small_network(2), 44).set_random_state(3)({k: v.clone() for k, v in sample.items()})
    finally:
        set_track_meta(True)
    for key in KEYS:
        assert type(out[key]) is torch.Tensor
        assert torch.equal(out[key], tracked[key].as_tensor())


@pytest.mark.parametrize("prob", [0.0, 1.0])
@pytest.mark.parametrize(
    "convert", [lambda t: t.numpy(), lambda t: t.clone(), MetaTensor, lambda t: np.asfortranarray(t.numpy())]
)
def test_every_kind_of_input(small_network, scan, convert, prob):
    sample = scan((40, 48))
    reference, transform = (deform(small_network(2), prob=prob) for _ in range(2))
    expected = reference(sample)
    out = transform({key: convert(value) for key, value in sample.items()})
    for key in KEYS:
        assert isinstance(out[key], MetaTensor)
        assert out[key].dtype == sample[key].dtype
        assert torch.equal(out[key].as_tensor(), expected[key].as_tensor())
    assert_same(transform.inverse(out), reference.inverse(expected))


def test_config_parser(small_network, scan, tmp_path):
    path = tmp_path / "small.safetensors"
    save_network(small_network(2), path)
    config = {
        "keys": list(KEYS),
        "deform": {
            "_target_": "monai_drdm.RandDRDMDeformd",
            "keys": "@keys",
            "network": str(path),
            "mode": list(MODES),
            "prob": 1.0,
            "deformation_level": [0.3, 0.5],
        },
        "again": {"_target_": "monai_drdm.RandDRDMDeform", "network": "$monai_drdm.load_network(@deform#network)"},
        "imports": ["$import monai_drdm"],
        "pipeline": {"_target_": "Compose", "transforms": [{"_target_": "EnsureTyped", "keys": "@keys"}, "@deform"]},
    }
    parser = ConfigParser(config)
    parser.get_parsed_content("imports")
    pipeline = parser.get_parsed_content("pipeline").set_random_state(7)
    sample = scan((96, 96))
    out = pipeline(fresh(sample))
    by_hand = RandDRDMDeformd(
        KEYS, network=load_network(path), prob=1.0, mode=MODES, deformation_level=(0.3, 0.5)
    )  # fmt: skip
    assert_same(out, Compose([EnsureTyped(KEYS), by_hand]).set_random_state(7)(fresh(sample)))
    assert overlap(pipeline.inverse(out)["label"], sample["label"]) >= 0.95
    array = parser.get_parsed_content("again")
    assert isinstance(array, RandDRDMDeform)
    assert array.prob == 0.1


def test_from_arrays_without_channels(small_network):
    """The usual head of a pipeline, from what a reader hands over."""
    image = np.random.default_rng(0).normal(size=(40, 48)).astype(np.float32)
    chain = Compose(
        [EnsureChannelFirstd(KEYS, channel_dim="no_channel"), ScaleIntensityd("image"), deform(small_network(2))]
    )
    out = chain.set_random_state(0)({"image": image, "label": (image > 0).astype(np.uint8)})
    assert out["image"].shape == out["label"].shape == (1, 40, 48)
    assert set(out["label"].unique().tolist()) == {0, 1}


# gradient modes and autocast


MODES_OF_GRADIENT = [torch.no_grad, torch.enable_grad, torch.inference_mode]


@pytest.mark.parametrize("prob", [0.0, 1.0])
@pytest.mark.parametrize("mode", MODES_OF_GRADIENT)
def test_outputs_are_ordinary_tensors(small_network, scan, mode, prob):
    """Whatever the mode around the call, and whatever the input, outputs may be saved for backward."""
    sample = scan((32, 32))
    expected = deform(small_network(2), prob=prob)(sample)
    points, boxes = torch.tensor([[[4.0, 5.0], [20.0, 9.0]]]), torch.tensor([[4.0, 4.0, 20.0, 24.0]])
    with torch.inference_mode():
        inference = {key: MetaTensor(value.clone()) for key, value in sample.items()}
        extra = {"points": points.clone(), "boxes": boxes.clone()}
    assert all(value.is_inference() for value in (*inference.values(), *extra.values()))
    for given in (fresh(sample), inference):
        transform = deform(small_network(2), prob=prob, point_keys="points", box_keys="boxes")
        with mode():
            out = transform({**given, **extra})
            back = transform.inverse(out)
        for result in (out, back):
            for key in (*KEYS, "points", "boxes"):
                assert not result[key].is_inference()
                assert not result[key].requires_grad
                assert not result[key].affine.is_inference()
        assert not out["points_valid"].is_inference()
        if prob > 0:
            assert not transform.last.ddf.is_inference()
        assert_same({key: out[key] for key in KEYS}, expected)
        for record in out["image"].applied_operations:
            assert not record["extra_info"]["field"].values.is_inference()
        weight = torch.ones(1, requires_grad=True)
        (weight * out["image"].as_tensor()).sum().backward()  # an inference tensor cannot be saved for this
        assert weight.grad == pytest.approx(float(expected["image"].sum()), rel=1e-4)


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_array_form_in_inference_mode(small_network, scan, prob):
    image = scan((32, 32))["image"]
    make = lambda: RandDRDMDeform(small_network(2), prob=prob).set_random_state(1)  # noqa: E731
    expected = make()(image)
    with torch.inference_mode():
        transform = make()
        outs = [
            make()(image),
            make()(image.clone()),
            make()(image.numpy()),
            transform.inverse(transform(image.clone())),
        ]
        assert torch.is_inference_mode_enabled()
    assert not any(out.is_inference() for out in outs)
    for out in outs[:3]:
        assert torch.equal(out.as_tensor(), expected.as_tensor())


def test_a_given_field_in_inference_mode(scan):
    sample = scan((32, 32))
    with torch.inference_mode():
        transform = ApplyDDFd(KEYS, wave((32, 32)), mode=MODES)
        out = transform({key: value.clone() for key, value in sample.items()})
    back = transform.inverse(out)
    assert not any(one[key].is_inference() for one in (out, back) for key in KEYS)
    assert not out["image"].applied_operations[-1]["extra_info"]["field"].values.is_inference()


@pytest.mark.parametrize("dims", [2, 3])
def test_autocast_changes_nothing(small_network, scan, dims):
    sample = scan((40, 36, 24)[:dims])
    network = small_network(dims, 16)
    transform, plain = deform(network), deform(network)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        out = transform(sample)
        back = transform.inverse(out)
        assert torch.is_autocast_enabled("cpu")
    expected = plain(sample)
    assert_same(out, expected)
    assert_same(back, plain.inverse(expected))
    assert torch.equal(transform.last.ddf, plain.last.ddf)


def test_modes_of_the_caller_survive_errors(small_network):
    transform = deform(small_network(2))
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ValueError, match="image"):
            transform({"image": torch.zeros(5), "label": torch.zeros(5)})
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()


# training


@pytest.mark.parametrize("inference", [True, False])
def test_a_training_step(small_network, scan, inference):
    samples = [scan((32, 32)) for _ in range(4)]
    chain = Compose([EnsureTyped(KEYS), deform(small_network(2), prob=0.5)])
    with torch.inference_mode(inference):
        batch = next(iter(loader_of(samples, chain)))
    fired = [operations[-1][TraceKeys.DO_TRANSFORM] for operations in batch["image"].applied_operations]
    assert set(fired) == {True, False}
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(4, 3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        images, labels = (batch[key].as_tensor().clone() for key in KEYS)
        loss = torch.nn.functional.cross_entropy(model(images), labels[:, 0].long())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for parameter in model.parameters():
            assert torch.isfinite(parameter.grad).all()
            assert parameter.grad.abs().max() > 0
    assert losses[-1] < losses[0]


def test_inside_a_training_step(small_network, scan):
    """Called between forward and backward it neither joins the graph nor changes gradient mode."""
    weight = torch.ones(1, 1, 3, 3, requires_grad=True)
    feature = torch.nn.functional.conv2d(scan((32, 32))["image"][None], weight, padding=1)
    out = deform(small_network(2))(scan((32, 32)))
    assert not out["image"].requires_grad
    assert torch.is_grad_enabled()
    (feature * out["image"].as_tensor()).mean().backward()
    assert torch.isfinite(weight.grad).all()
    assert weight.grad.abs().max() > 0


@pytest.mark.parametrize("prob", [0.0, 1.0])
@pytest.mark.parametrize("kind", [torch.clone, MetaTensor])
def test_gradients_reach_the_input(small_network, scan, kind, prob):
    """Warping is linear in the image: the gradient of a weighted sum is the adjoint, checked by the dot product."""
    sample = scan((32, 36))
    transform = deform(small_network(2), prob=prob)
    image = sample["image"].clone().requires_grad_(True)
    out = transform({"image": kind(image), "label": sample["label"]})["image"].as_tensor()
    assert out.requires_grad
    weights = torch.rand(out.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((out * weights).sum(), image)
    other = torch.rand(out.shape, generator=torch.Generator().manual_seed(1))
    field = transform.last.ddf if prob else torch.zeros(2, 32, 36)
    warped = transform({"image": other, "label": sample["label"]}, field=field)["image"].as_tensor()
    torch.testing.assert_close((gradient * other).sum(), (warped * weights).sum(), rtol=1e-4, atol=1e-3)


def test_a_network_in_training_mode_is_left_in_it(small_network, scan):
    """The field needs no gradients of the network, whatever state the caller left it in."""
    network = small_network(2)
    expected = deform(network)(scan((32, 32)))
    network.requires_grad_(True)
    out = deform(network)(scan((32, 32)))
    assert_same(out, expected)
    assert not out["image"].requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())
