"""Invariants of ``RandDRDMDeformd`` over random samples and options, against oracles in numpy and scipy."""

from __future__ import annotations

import hashlib
import json
import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, HealthCheck, settings
from hypothesis import strategies as st
from monai.data import MetaTensor, set_track_meta
from monai.networks.blocks import Warp
from scipy.ndimage import map_coordinates

from monai_drdm import RandDRDMDeform, RandDRDMDeformd
from monai_drdm.deformation.seeds import stable_hash
from monai_drdm.deformation.stored_field import StoredField
from monai_drdm.fields import resize_ddf, warp
from monai_drdm.transforms import DeformationParams

INTEGERS = ("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
FLOATS = ("float16", "float32", "float64")
EXACT = ("nearest", "label")
SCIPY_PADDING = {"border": "nearest", "zeros": "grid-constant", "reflection": "mirror"}
EARLIER = {"class": "Other", "id": 7, "orig_size": (1,), "extra_info": {}, "do_transforms": True}

seeds = st.integers(0, 2**32 - 1)


def check(weight: float = 1.0):
    """Examples of the profile times a weight: more where one is quick, fewer where it is slow."""
    examples = max(2, round(settings.default.max_examples * weight))
    return settings(max_examples=examples, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def networks(small_network):
    return Networks({2: small_network(2, working_size=16), 3: small_network(3, working_size=8)})


class Networks(dict):
    """By dimension; hypothesis prints them with every example that fails."""

    def __repr__(self) -> str:
        return "networks"


# --- random samples -------------------------------------------------------------------------------------------------


class Case:
    """A sample and the options to deform it with; no dataclass, of which hypothesis would print every voxel."""

    def __init__(
        self,
        data: dict[str, Any],
        options: dict[str, Any],
        shape: tuple[int, ...],
        spacing: tuple[float, ...],
        affine: np.ndarray,
        seed: int,
    ) -> None:
        self.data, self.options, self.shape, self.spacing = data, options, shape, spacing
        self.affine, self.seed = affine, seed

    def __repr__(self) -> str:
        entries = {key: (type(value).__name__, array_of(value).dtype.name) for key, value in self.data.items()}
        return f"Case({entries}, {self.options}, {self.shape}, {self.spacing}, seed={self.seed})"

    @property
    def dims(self) -> int:
        return len(self.shape)

    def transform(self, networks, **changes) -> RandDRDMDeformd:
        network = networks[2 if self.options.get("slice_axis") is not None else self.dims]
        options = {"network": network, "prob": 1.0, **self.options, **changes}
        return RandDRDMDeformd(**options).set_random_state(self.seed)


@st.composite
def affines(draw, dims: int):
    """Voxel to world, with its spacing: rotated and flipped at random, nearly singular never."""
    spacing = [draw(st.floats(0.3, 6.0).map(lambda s: round(s, 3))) for _ in range(dims)]
    random = np.random.RandomState(draw(seeds))
    kind = draw(st.sampled_from(["plain", "flipped", "oblique"]))
    direction = np.eye(dims)
    if kind != "plain":
        direction = direction[random.permutation(dims)] * random.choice([-1, 1], dims)
    if kind == "oblique":
        direction = np.linalg.qr(random.randn(dims, dims))[0]
    affine = np.eye(4)
    affine[:dims, :dims] = direction * spacing
    affine[:dims, 3] = 0 if kind == "plain" else random.uniform(-200, 200, dims)
    return affine, tuple(spacing)


def values(shape: tuple[int, ...], dtype: str, kind: str, seed: int) -> np.ndarray:
    random = np.random.RandomState(seed)
    if kind == "smooth":
        axes = np.meshgrid(*(np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape[1:]), indexing="ij")
        waves = [np.sin(sum(a * f for a, f in zip(axes, random.uniform(-4, 4, len(axes))))) for _ in range(shape[0])]
        out = (np.stack(waves) + 1) * 50
    elif kind == "constant":
        out = np.full(shape, float(random.randint(0, 100)))
    elif kind == "extreme" and dtype in INTEGERS[1:]:
        info = np.iinfo(dtype)
        return random.choice(np.array([info.min, 0, 1, info.max - 1, info.max], dtype=dtype), shape)
    elif kind == "extreme":
        out = random.choice([-100.0, 0.0, 1000.0], shape)
    else:
        out = random.uniform(0, 100, shape)
    if dtype == "bool":
        return out > 50
    return out.astype(dtype)


def contained(array: np.ndarray, container: str, affine: np.ndarray) -> Any:
    if container == "numpy":
        return array
    if container == "tensor":
        return torch.from_numpy(array.copy())
    meta = MetaTensor(torch.from_numpy(array.copy()), affine=torch.from_numpy(affine), meta={"who": ["me"]})
    meta.push_applied_operation(dict(EARLIER))
    return meta


@st.composite
def cases(draw, dims=(2, 2, 2, 2, "slices", "slices", 3), exact_only: bool = False):
    kind = draw(st.sampled_from(dims))
    spatial = 2 if kind == 2 else 3
    shape = tuple(draw(st.integers(1, 24)) for _ in range(spatial))
    affine, spacing = draw(affines(spatial))
    if spatial == 2 and draw(st.booleans()):
        affine = affine[np.ix_([0, 1, 3], [0, 1, 3])]  # MONAI keeps both forms
    data, modes, paddings, first_channels = {}, [], [], 1
    containers = st.sampled_from(["numpy", "tensor", "meta", "meta"])
    for index in range(draw(st.integers(1, 4))):
        mode = draw(st.sampled_from(EXACT if exact_only else (*EXACT, "bilinear", "bilinear")))
        dtype = draw(st.sampled_from((*INTEGERS, *FLOATS, "float32")))
        if mode == "label" and dtype == "float16":
            dtype = "float32"
        channels = draw(st.integers(1, 3))
        content = draw(st.sampled_from(["noise", "smooth", "constant", "extreme"]))
        array = values((channels, *shape), dtype, content, draw(seeds))
        if mode == "label" and dtype in FLOATS:
            array = np.rint(array)
        container = draw(containers)
        if index == 0:
            first_channels, plain = channels, container != "meta"
        data[f"key{index}"] = contained(array, container, affine)
        modes.append(mode)
        paddings.append(draw(st.sampled_from(list(SCIPY_PADDING))))
    low, high = sorted(draw(st.floats(0.01, 1.0)) for _ in range(2))
    options = {
        "keys": list(data),
        "mode": modes,
        "padding_mode": paddings,
        "deformation_level": draw(st.sampled_from([low, (low, high)])),
        "sampler": "fast",
        "steps": 1 if kind == 3 else draw(st.integers(1, 2)),
        "image_channel": draw(st.sampled_from([None, 0, first_channels - 1, -1])),
        "max_displacement_mm": draw(st.sampled_from([None, None, 0.5, 3.0])),
        "on_fold": draw(st.sampled_from(["rescale", "resample", "skip", "keep"])),
        "max_fold_fraction": draw(st.sampled_from([0.0, 1e-4, 0.05])),
        "pixdim": spacing if plain else None,
        "slice_axis": draw(st.integers(0, 2)) if kind == "slices" else None,
    }
    return Case(data, options, shape, spacing, affine, draw(seeds))


# --- oracles --------------------------------------------------------------------------------------------------------


def array_of(value: Any) -> np.ndarray:
    return value.as_tensor().numpy() if isinstance(value, MetaTensor) else np.asarray(value)


def state_of(value: Any) -> tuple[Any, ...]:
    array = array_of(value)
    rest = (value.affine.tolist(), repr(value.meta), repr(value.applied_operations)) if hasattr(value, "meta") else ()
    return type(value), array.dtype, array.shape, array.tobytes(), rest


def coordinates(ddf: np.ndarray) -> np.ndarray:
    shape = ddf.shape[1:]
    at = ddf.astype(np.float64) + np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"))
    for axis, size in enumerate(shape):
        if size == 1:  # holds its only value everywhere
            at[axis] = 0
    return at


def linear(channel: np.ndarray, at: np.ndarray, padding: str = "border") -> np.ndarray:
    return map_coordinates(channel.astype(np.float64), at, order=1, mode=SCIPY_PADDING[padding])


def assert_warped(out: np.ndarray, before: np.ndarray, ddf: np.ndarray, mode: str, padding: str) -> None:
    """Compare with scipy, where rounding of coordinates cannot matter."""
    at = coordinates(ddf)
    for new, old in zip(out, before):
        if mode == "bilinear":
            size = max(float(np.abs(old.astype(np.float64)).max()), 1e-6)
            slack = size * (2e-3 if out.dtype == np.float16 else 2e-4)
            np.testing.assert_allclose(new.astype(np.float64), linear(old, at, padding), rtol=0, atol=slack)
        elif mode == "nearest":
            ties = (np.abs(at - np.floor(at) - 0.5) < 1e-3).any(axis=0)
            _, inverse = np.unique(old, return_inverse=True)
            codes = inverse.reshape(old.shape) + 1.0
            expected = map_coordinates(codes, at, order=0, mode=SCIPY_PADDING[padding]).round().astype(int)
            known = np.concatenate([np.zeros(1, old.dtype), np.unique(old)])
            assert (ties | (new == known[expected])).all()
        else:
            ids = np.unique(np.concatenate([old.ravel(), np.zeros(1, old.dtype)]))
            if len(ids) > 12:
                continue
            votes = np.stack([linear(old == one, at, padding) for one in ids])
            if padding == "zeros":
                votes[np.flatnonzero(ids == 0)[0]] += 1 - votes.sum(axis=0)
            ranked = np.sort(votes, axis=0)
            close = ranked[-1] - ranked[-2] < 1e-3 if len(ids) > 1 else np.zeros(votes.shape[1:], dtype=bool)
            assert (close | (new == ids[votes.argmax(axis=0)])).all()


def corner_folds(ddf: np.ndarray) -> float:
    """Fraction of cells with a corner whose Jacobian determinant is not positive; loops over cells' corners."""
    dims, shape = ddf.shape[0], ddf.shape[1:]
    position = coordinates(ddf)
    for axis, size in enumerate(shape):
        if size == 1:
            position[axis] = ddf[axis]
    folded = np.zeros([max(n - 1, 1) for n in shape], dtype=bool)
    for corner in product((0, 1), repeat=dims):
        rows = []
        for axis in range(dims):
            start = [slice(c, n - 1 + c) if n > 1 else slice(0, 1) for c, n in zip(corner, shape)]
            if shape[axis] == 1:
                row = np.zeros_like(position[(slice(None), *start)])
                row[axis] = 1
            else:
                low, high = list(start), list(start)
                low[axis], high[axis] = slice(0, shape[axis] - 1), slice(1, shape[axis])
                row = position[(slice(None), *high)] - position[(slice(None), *low)]
            rows.append(row)
        folded |= np.linalg.det(np.moveaxis(np.stack(rows), (0, 1), (-2, -1))) <= -1e-6  # float32 rounds about 0
    return float(folded.mean())


def expected_dtype(dtype: np.dtype, mode: str) -> np.dtype:
    return dtype if mode in EXACT or dtype.kind == "f" else np.dtype(np.float32)


def per_key(case: Case):
    return zip(case.options["keys"], case.options["mode"], case.options["padding_mode"])


# --- 1, 2, 3, 5: what comes back --------------------------------------------------------------------------------------


@check(2)
@given(case=cases())
def test_outputs_are_the_inputs_moved_by_one_field(networks, case):
    before = {key: state_of(value) for key, value in case.data.items()}
    transform = case.transform(networks)
    out = transform(case.data)
    assert {key: state_of(value) for key, value in case.data.items()} == before
    assert set(out) == set(case.data)
    ddf = transform.last.ddf
    assert ddf.shape == (case.dims, *case.shape)
    assert ddf.dtype == torch.float32
    assert torch.isfinite(ddf).all()
    for key, mode, padding in per_key(case):
        old, new = array_of(case.data[key]), array_of(out[key])
        assert new.shape == old.shape
        assert np.isfinite(new).all()
        if transform.last.skipped:
            assert new.dtype == expected_dtype(old.dtype, mode)
            np.testing.assert_array_equal(new, old.astype(new.dtype))
            continue
        assert new.dtype == expected_dtype(old.dtype, mode)
        if mode in EXACT:
            assert set(new.ravel().tolist()) <= {*old.ravel().tolist(), *([0] if padding == "zeros" else [])}
        again = warp(torch.from_numpy(old.copy())[None], ddf[None], mode, padding)[0]
        np.testing.assert_array_equal(new, again.numpy())
        assert_warped(new, old, ddf.numpy(), mode, padding)
        if mode == "bilinear" and min(case.shape) > 4 and padding == "border":
            image = torch.from_numpy(old.astype(np.float32))[None]
            monai = Warp("bilinear", "border")(image, ddf[None].contiguous())[0].numpy()
            inner = (slice(None), *(slice(2, -2),) * case.dims)
            slack = 2e-3 * max(float(np.abs(monai).max()), 1e-6)
            np.testing.assert_allclose(new[inner].astype(np.float64), monai[inner], rtol=0, atol=slack)


@check()
@given(case=cases(), prob=st.sampled_from([0.0, 1.0]))
def test_one_record_per_output_with_the_field_that_was_applied(networks, case, prob):
    fired, other = case.transform(networks, prob=prob), case.transform(networks, prob=1.0 - prob)
    out, contrary = fired(case.data), other(case.data)
    moved = prob == 1.0 and not fired.last.skipped
    assert (fired.last is None) == (prob == 0.0)
    for key, mode, _ in per_key(case):
        old, new = case.data[key], out[key]
        assert isinstance(new, MetaTensor)
        assert array_of(new).dtype == array_of(contrary[key]).dtype == expected_dtype(array_of(old).dtype, mode)
        if not moved:
            np.testing.assert_array_equal(array_of(new), array_of(old).astype(array_of(new).dtype))
        earlier = list(old.applied_operations) if isinstance(old, MetaTensor) else []
        assert list(new.applied_operations)[:-1] == earlier
        record = new.applied_operations[-1]
        assert record["class"] == "RandDRDMDeformd"
        assert record["do_transforms"] == moved
        assert set(record["extra_info"]) == set(contrary[key].applied_operations[-1]["extra_info"])
        stored = record["extra_info"]["field"].ddf()
        assert stored.shape == (case.dims, *case.shape)
        if moved:
            assert torch.equal(stored, fired.last.ddf)
            assert DeformationParams.from_json(record["extra_info"]["params"]) == fired.last.params
        else:
            assert not stored.any()
            assert record["extra_info"]["params"] == ""
        if isinstance(old, MetaTensor):
            np.testing.assert_array_equal(new.affine, old.affine)
            assert new.meta["who"] == ["me"]
            assert new.meta["who"] is not old.meta["who"]


@check()
@given(case=cases(), limit=st.floats(0.05, 5.0))
def test_field_keeps_its_limits(networks, case, limit):
    transform = case.transform(networks, max_displacement_mm=limit, on_fold="rescale")
    transform(case.data)
    ddf = transform.last.ddf.numpy().astype(np.float64)
    millimetres = np.sqrt(sum((ddf[d] * case.spacing[d]) ** 2 for d in range(case.dims)))
    assert millimetres.max() <= limit * (1 + 1e-5)
    assert corner_folds(ddf) <= case.options["max_fold_fraction"]
    assert transform.last.statistics.fold_fraction <= case.options["max_fold_fraction"]
    assert transform.last.statistics.max_displacement_mm == pytest.approx(millimetres.max(), rel=1e-4, abs=1e-6)
    axis = case.options["slice_axis"]
    if axis is not None:
        assert not ddf[axis].any()
        assert (ddf == np.take(ddf, [0], axis=axis + 1)).all()


@check(0.1)
@given(
    shape=st.tuples(st.integers(5, 24), st.integers(5, 24)),
    level=st.floats(0.7, 1.0),
    limit=st.sampled_from([0.0, 1e-4, 0.02]),
    seed=seeds,
)
def test_fold_policies_agree_on_what_folds(rough, shape, level, limit, seed):
    """The released sampler with a rough network folds; every policy starts from the same field."""
    image = torch.from_numpy(values((1, *shape), "float32", "noise", 1))
    made = {}
    for policy in ("keep", "rescale", "skip", "raise"):
        transform = RandDRDMDeform(
            rough[2],
            prob=1.0,
            sampler="reference",
            deformation_level=level,
            on_fold=policy,
            max_fold_fraction=limit,
        )
        if policy == "raise" and made["keep", "last"].statistics.fold_fraction > limit:
            with pytest.raises(ValueError, match="max_fold_fraction"):
                transform.set_random_state(seed)(image)
            continue
        made[policy] = transform.set_random_state(seed)(image)
        made[policy, "last"] = transform.last
    kept = made["keep", "last"].ddf.numpy()
    folds = made["keep", "last"].statistics.fold_fraction
    assert corner_folds(kept) == pytest.approx(folds, abs=2 / kept[0].size)
    rescaled = made["rescale", "last"]
    assert corner_folds(rescaled.ddf.numpy()) <= limit
    if folds <= limit:
        for policy in ("rescale", "skip", "raise"):
            assert torch.equal(made[policy, "last"].ddf, made["keep", "last"].ddf)
        return
    assert torch.equal(made["skip"].as_tensor(), image)
    assert 0 <= rescaled.params.scale < 1
    np.testing.assert_allclose(rescaled.ddf, kept * rescaled.params.scale, atol=1e-3)


@pytest.fixture(scope="module")
def rough(small_network):
    return Networks({2: small_network(2, working_size=16, scale=300.0)})


# --- 4: replay --------------------------------------------------------------------------------------------------------


@check()
@given(case=cases(), order=st.randoms(use_true_random=False))
def test_records_seeds_and_the_last_draw_replay_bit_for_bit(networks, case, order):
    transform = case.transform(networks)
    out = transform(case.data)
    first = transform.last
    text = first.params.to_json()
    assert json.loads(text)["seed"] == first.params.seed
    record = DeformationParams.from_json(text)
    assert record == first.params

    def assert_same(result, ddf):
        assert torch.equal(ddf, first.ddf)
        for key in case.options["keys"]:
            np.testing.assert_array_equal(array_of(result[key]), array_of(out[key]))

    again = transform(case.data, randomize=False)
    assert_same(again, transform.last.ddf)
    twin = case.transform(networks)
    result = twin(case.data)
    assert_same(result, twin.last.ddf)
    # another transform: other limits, keys in another order, in a dictionary of another order
    triples = list(per_key(case))
    order.shuffle(triples)
    keys, modes, paddings = (list(column) for column in zip(*triples))
    other = case.transform(
        networks,
        keys=keys,
        mode=modes,
        padding_mode=paddings,
        image_key=case.options["keys"][0],
        image_channel=None,
        deformation_level=0.5,
        max_displacement_mm=0.1,
        on_fold="raise",
        max_fold_fraction=0.0,
        slice_axis=None,
        prob=0.0,
    ).set_random_state(1)
    if first.skipped:
        other(case.data, params=record)
        assert torch.equal(other.last.ddf, first.ddf)
        return
    result = other({key: case.data[key] for key in sorted(keys, reverse=True)}, params=record)
    assert_same(result, other.last.ddf)
    result = other(case.data, field=first.ddf)
    assert_same(result, other.last.ddf)


@check()
@given(case=cases())
def test_array_form_and_containers_give_the_same(networks, case):
    key, mode, padding = next(iter(per_key(case)))
    array = array_of(case.data[key])
    options = {name: value for name, value in case.options.items() if name not in ("keys", "mode", "padding_mode")}
    network = networks[2 if case.options["slice_axis"] is not None else case.dims]
    fields, outputs = [], []
    for container in ("numpy", "tensor", "meta"):
        transform = RandDRDMDeform(
            network, prob=1.0, mode=mode, padding_mode=padding, **{**options, "pixdim": case.spacing}
        ).set_random_state(case.seed)
        affine = np.diag([*case.spacing, *[1.0] * (4 - case.dims)])
        outputs.append(transform(contained(array, container, affine)))
        fields.append(transform.last.ddf)
    set_track_meta(False)
    try:
        keyed = case.transform(networks, pixdim=case.spacing, keys=[key], mode=mode, padding_mode=padding)
        outputs.append(keyed({key: array})[key])
        fields.append(keyed.last.ddf)
        assert type(outputs[-1]) is torch.Tensor
    finally:
        set_track_meta(True)
    for field, output in zip(fields[1:], outputs[1:]):
        assert torch.equal(field, fields[0])
        np.testing.assert_array_equal(array_of(output), array_of(outputs[0]))


# --- 5: fields as records keep them -----------------------------------------------------------------------------------


@st.composite
def compact_fields(draw, sizes=(1e-30, 1e-3, 1.0, 32.0, 1e5)):
    dims = draw(st.integers(2, 3))
    coarse = tuple(draw(st.integers(1, 6)) for _ in range(dims))
    size = draw(st.sampled_from(sizes))
    field = np.random.RandomState(draw(seeds)).uniform(-1, 1, (dims, *coarse)) * size
    if draw(st.integers(0, 4)) == 0:
        field[:, ...] = 0
        field[0].flat[0] = draw(st.sampled_from([0.0, size]))
    field *= draw(st.floats(0.5, 2.0))
    return torch.from_numpy(field.astype(np.float32))


@check(8)
@given(field=compact_fields(), full=st.tuples(*[st.integers(1, 20)] * 3), refine=st.booleans())
def test_stored_field_is_the_field_to_half_a_step(field, full, refine):
    dims, coarse = field.shape[0], field.shape[1:]
    shape = tuple(max(a, b) for a, b in zip(full, coarse)) if refine else tuple(coarse)
    stored = StoredField.quantised(field, shape)
    largest = float(field.abs().max())
    assert stored.values.dtype == torch.int16
    assert math.frexp(stored.step)[0] == 0.5  # a power of two
    if largest:
        assert stored.step <= largest / 2**14
    # what is nearly a power of two is a case of its own, below
    assume(largest == 0 or math.frexp(largest)[0] < 1 - 2**-16)
    exact = resize_ddf(field[None].double(), shape)[0]
    error = (stored.ddf().double() - exact).abs().flatten(1).amax(dim=1)
    for d in range(dims):
        scale = (shape[d] - 1) / (coarse[d] - 1) if coarse[d] > 1 else shape[d] / coarse[d]
        rounding = 0.0 if shape == tuple(coarse) else 8 * 2**-24 * largest * scale
        assert float(error[d]) <= stored.step / 2 * (1 + 1e-6) * scale + rounding


@check()
@given(exponent=st.integers(-20, 17), below=st.integers(1, 200))
def test_stored_field_is_to_half_a_step_below_a_power_of_two(exponent, below):
    largest = np.float32(2.0**exponent) * np.float32(1 - below * 2**-24)
    field = torch.zeros(2, 3, 3)
    field[0, 1, 1] = float(largest)
    stored = StoredField.quantised(field, (3, 3))
    assert float((stored.ddf() - field).abs().max()) <= stored.step / 2 * (1 + 1e-6)


# --- 6: the way back --------------------------------------------------------------------------------------------------


@check()
@given(case=cases(), prob=st.sampled_from([0.0, 1.0, 1.0, 1.0]))
def test_inverse_restores_form_and_takes_one_record(networks, case, prob):
    case.data = {key: contained(array_of(value), "meta", case.affine) for key, value in case.data.items()}
    transform = case.transform(networks, prob=prob)
    out = transform(case.data)
    twice = transform(out, randomize=False)
    states = {key: state_of(value) for key, value in twice.items()}
    once = transform.inverse(twice)
    back = transform.inverse(once)
    assert {key: state_of(value) for key, value in twice.items()} == states
    for key, mode, padding in per_key(case):
        old = array_of(case.data[key])
        counts = [len(sample[key].applied_operations) for sample in (twice, once, back)]
        earlier = len(case.data[key].applied_operations) if isinstance(case.data[key], MetaTensor) else 0
        assert counts == [earlier + 2, earlier + 1, earlier]
        new = array_of(back[key])
        assert new.shape == old.shape
        assert new.dtype == expected_dtype(old.dtype, mode)
        assert np.isfinite(new).all()
        if mode in EXACT:
            assert set(new.ravel().tolist()) <= {*old.ravel().tolist(), *([0] if padding == "zeros" else [])}
        if (old == old.flat[0]).all() and padding != "zeros":
            np.testing.assert_allclose(new.astype(np.float64), old.astype(np.float64), rtol=1e-5)
        if prob == 0.0 or transform.last.skipped:
            np.testing.assert_array_equal(new, old.astype(new.dtype))


@check()
@given(case=cases(dims=(2,)))
def test_outputs_can_be_deformed_again(networks, case):
    """What the transform took and gave back, it takes again, also where only some entries came with an affine."""
    transform = case.transform(networks)
    twice = transform(transform(case.data))
    assert all(array_of(twice[key]).shape == array_of(case.data[key]).shape for key in case.data)


@check()
@given(case=cases())
def test_inverse_field_misses_by_no_more_than_it_says(networks, case):
    transform = case.transform(networks, on_fold="rescale", max_fold_fraction=0.0)
    out = transform(case.data)
    last = transform.last
    ddf, inverse = (field.numpy().astype(np.float64) for field in (last.ddf, last.inverse_ddf))
    at = coordinates(inverse)
    missed = np.stack([inverse[d] + linear(ddf[d], at) for d in range(case.dims)])
    worst = float(np.sqrt((missed**2).sum(axis=0)).max())
    assert worst == pytest.approx(last.inverse_residual_vox, abs=2e-4)
    back = transform.inverse(out)
    for key, mode, padding in per_key(case):
        assert_warped(array_of(back[key]), array_of(out[key]), last.inverse_ddf.numpy(), mode, padding)


# --- 6, 8: landmarks --------------------------------------------------------------------------------------------------


def landmarks(case: Case, seed: int, beyond: float = 0.3, shape: tuple[int, ...] = (2, 40)) -> np.ndarray:
    """Voxel coordinates inside and, a bit, outside the image; some are not there."""
    random = np.random.RandomState(seed)
    size = np.array(case.shape)
    points = random.uniform(-0.5 - beyond * size, size - 0.5 + beyond * size, (*shape, case.dims))
    points[0, 0] = np.nan
    points[0, 1] = np.inf
    return points


def within(points: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return ((points >= -0.5) & (points <= np.array(shape) - 0.5)).all(axis=-1)


@check(2)
@given(case=cases(), seed=seeds, prob=st.sampled_from([0.0, 1.0, 1.0, 1.0]), dtype=st.sampled_from(FLOATS[1:]))
def test_landmarks_go_and_return(networks, case, seed, prob, dtype):
    points = landmarks(case, seed).astype(dtype)
    transform = case.transform(networks, point_keys=["points"], prob=prob)
    sample = {**case.data, "points": points.copy()}
    out = transform(sample)
    np.testing.assert_array_equal(sample["points"], points)
    moved, valid = array_of(out["points"]), array_of(out["points_valid"])
    assert moved.shape == points.shape
    assert moved.dtype == points.dtype
    assert valid.dtype == bool
    assert valid.shape == points.shape[:-1]
    image_keys = set(case.options["keys"])
    records = {key: out[key].applied_operations[-1]["extra_info"] for key in (*image_keys, "points")}
    assert all(record["field"] is records["points"]["field"] for record in records.values())
    finite = np.isfinite(points).all(axis=-1)
    np.testing.assert_array_equal(moved[~finite], points[~finite])
    assert not valid[~finite].any()
    edges = np.concatenate([moved + 0.5, moved - np.array(case.shape) + 0.5], axis=-1)
    unclear = (np.abs(edges) < 1e-4).any(axis=-1)  # rounding to the dtype of the points
    assert (valid <= (within(points, case.shape) & (within(moved, case.shape) | unclear))).all()
    if prob == 0.0 or transform.last.skipped:
        np.testing.assert_array_equal(moved, points)
        np.testing.assert_array_equal(valid, within(points, case.shape))
    elif transform.last.statistics.fold_fraction == 0:
        # validity is lost for one more reason, a landmark that is not found, and there is none without folds
        assert ((within(points, case.shape) & within(moved, case.shape)) <= (valid | unclear)).all()
    back = array_of(transform.inverse(out)["points"])
    assert np.abs(back[valid] - points[valid]).max(initial=0) <= 1e-2 + 1e-4
    inner = finite & within(points, case.shape)
    if prob == 0.0 or transform.last.statistics.fold_fraction == 0:
        assert np.abs(back[inner] - points[inner]).max(initial=0) <= 1e-2 + 1e-4
    np.testing.assert_array_equal(back[~finite], points[~finite])


@check()
@given(case=cases(dims=(2, 2, "slices", 3)), seed=seeds)
def test_landmarks_go_where_the_image_goes(networks, case, seed):
    """An image whose channels are its own coordinates shows at a moved landmark where the landmark was."""
    assume(max(case.shape) > 3)
    axes = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float64) for n in case.shape), indexing="ij"))
    points = landmarks(case, seed, beyond=0.0)
    transform = case.transform(
        networks,
        keys=[*case.options["keys"], "where"],
        mode=[*case.options["mode"], "bilinear"],
        padding_mode=[*case.options["padding_mode"], "border"],
        point_keys="points",
    )
    out = transform({**case.data, "where": axes, "points": points})
    where, moved, valid = (array_of(out[key]) for key in ("where", "points", "points_valid"))
    size = np.array(case.shape)
    ddf = transform.last.ddf.numpy()
    free = ((axes + ddf >= 0) & (axes + ddf <= size.reshape(-1, *[1] * case.dims) - 1)) | (
        (size == 1).reshape(-1, *[1] * case.dims)
    )  # not cut off at the border of the image
    for point, target in zip(points[valid], moved[valid]):
        low = np.clip(np.floor(target).astype(int), 0, size - 1)
        high = np.minimum(low + 1, size - 1)
        cell = (slice(None), *(slice(a, b + 1) for a, b in zip(low, high)))
        inner = ((target >= 0) & (target <= size - 1)) | (size == 1)
        if not inner.all() or not free[cell].all():
            continue
        for axis in range(case.dims):
            if case.shape[axis] > 1:
                found = linear(where[axis], np.where(size > 1, target, 0)[:, None])[0]
                assert found == pytest.approx(point[axis], abs=1.2e-2)


@check()
@given(case=cases(dims=(2, 3)), seed=seeds)
def test_landmarks_stay_on_an_axis_of_one_voxel(networks, case, seed):
    """Such an axis holds its only value everywhere: the image does not move along it, so neither do landmarks."""
    axis = seed % case.dims
    case.data = {key: _first_slice(value, axis) for key, value in case.data.items()}
    case.shape = tuple(1 if d == axis else n for d, n in enumerate(case.shape))
    points = landmarks(case, seed, beyond=0.0)
    transform = case.transform(networks, point_keys="points")
    moved = array_of(transform({**case.data, "points": points})["points"])
    finite = np.isfinite(points).all(axis=-1)
    np.testing.assert_allclose(moved[finite][:, axis], points[finite][:, axis], atol=1e-6)


def _first_slice(value: Any, axis: int) -> Any:
    return value[(slice(None), *(slice(None),) * axis, slice(0, 1))]


@check()
@given(case=cases(), seed=seeds)
def test_world_landmarks_are_the_voxel_landmarks_through_the_affine(networks, case, seed):
    points = landmarks(case, seed)[0, 2:][None]
    case.data["key0"] = contained(array_of(case.data["key0"]), "meta", case.affine)
    dims = case.dims
    matrix, origin = case.affine[:dims, :dims], case.affine[:dims, -1]
    outputs, backs, fields = [], [], []
    for space, given_points in (("voxel", points), ("world", points @ matrix.T + origin)):
        transform = case.transform(networks, point_keys="points", point_space=space, on_fold="rescale")
        out = transform({**case.data, "points": given_points})
        outputs.append((array_of(out["points"]), array_of(out["points_valid"])))
        backs.append(array_of(transform.inverse(out)["points"]))
        fields.append(transform.last.ddf)
    assert torch.equal(fields[0], fields[1])
    (voxel, valid), (world, world_valid) = outputs
    np.testing.assert_allclose(world[valid], (voxel @ matrix.T + origin)[valid], atol=0.02 * max(case.spacing))
    edges = np.concatenate([voxel + 0.5, voxel - np.array(case.shape) + 0.5], axis=-1)
    unclear = (np.abs(edges) < 5e-3).any(axis=-1)
    assert (unclear | (valid == world_valid)).all()
    np.testing.assert_allclose(backs[1][valid], (points @ matrix.T + origin)[valid], atol=0.02 * max(case.spacing))


@check()
@given(case=cases(dims=(2, 2, "slices", 3)), seed=seeds)
def test_boxes_enclose_the_landmarks_that_were_in_them_and_return_exactly(networks, case, seed):
    random = np.random.RandomState(seed)
    size = np.array(case.shape)
    low = random.uniform(0, 0.6, (3, case.dims)) * size
    boxes = np.concatenate([low, low + random.uniform(0.05, 0.4, low.shape) * size], axis=1)
    share = random.uniform(0, 1, (3, 30, case.dims))
    points = boxes[:, None, : case.dims] * (1 - share) + boxes[:, None, case.dims :] * share - 0.5
    transform = case.transform(
        networks, point_keys="points", box_keys="boxes", on_fold="rescale", max_fold_fraction=0.0
    )
    out = transform({**case.data, "points": points, "boxes": boxes})
    moved, valid, around = (array_of(out[key]) for key in ("points", "points_valid", "boxes"))
    slack = 0.1  # faces are sampled about once a voxel
    above = moved + 0.5 >= around[:, None, : case.dims] - slack
    below = moved + 0.5 <= around[:, None, case.dims :] + slack
    assert ((above & below).all(axis=-1) | ~valid).all()
    np.testing.assert_allclose(array_of(transform.inverse(out)["boxes"]), boxes, atol=1e-9)


# --- 7: seeds ---------------------------------------------------------------------------------------------------------

nameable = st.one_of(st.text(), st.binary(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False))


@check(6)
@given(value=st.one_of(nameable, st.lists(nameable, max_size=4)), other=nameable)
def test_hash_tells_values_apart_and_nothing_else(value, other):
    number = stable_hash(value)
    assert 0 <= number < 2**32
    assert stable_hash(value) == number
    if isinstance(value, list):
        assert stable_hash(tuple(value)) == number
        assert stable_hash([*value, other]) != number
        assert stable_hash([value]) != number
    else:
        assert stable_hash([value]) != number
        same = type(value) is type(other) or {type(value), type(other)} == {int, float}
        assert (stable_hash(other) == number) == (same and value == other)
    if isinstance(value, float):
        assert stable_hash(np.float64(value)) == stable_hash(torch.tensor(value, dtype=torch.float64)) == number
    if isinstance(value, str):  # the number that any process computes
        digest = hashlib.sha256(b"text " + value.encode()).digest()
        assert number == int.from_bytes(digest[:4], "big")


@check()
@given(
    case=cases(dims=(2, 2, "slices")),
    name=st.one_of(st.text(), st.integers(0, 9), st.lists(st.text(), min_size=1, max_size=2)),
    prob=st.sampled_from([0.3, 1.0]),
    calls=st.integers(1, 3),
    state=seeds,
)
def test_field_of_a_seed_key_does_not_hang_on_what_came_before(networks, case, name, prob, calls, state):
    sample = {**case.data, "name": name}
    fresh = case.transform(networks, seed_key="name", prob=prob)
    out = fresh(sample)
    worn = case.transform(networks, seed_key="name", prob=prob).set_random_state(state)
    for call in range(calls):
        worn({**case.data, "name": f"another {call}"})
    again = worn(sample)
    assert (fresh.last is None) == (worn.last is None)
    if fresh.last is not None:
        assert worn.last.params == fresh.last.params
        assert torch.equal(worn.last.ddf, fresh.last.ddf)
    for key in case.options["keys"]:
        np.testing.assert_array_equal(array_of(again[key]), array_of(out[key]))


# --- 9: intensities and orientation -----------------------------------------------------------------------------------


@check()
@given(
    shape=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    kind=st.sampled_from(["noise", "smooth", "extreme"]),
    gain=st.floats(0.05, 50.0),
    offset=st.floats(-100.0, 100.0),
    level=st.floats(0.05, 1.0),
    seed=seeds,
)
def test_field_does_not_hang_on_the_range_of_intensities(networks, shape, kind, gain, offset, level, seed):
    image = values((1, *shape), "float32", kind, seed)
    fields = []
    for data in (image, image * np.float32(gain) + np.float32(offset * gain)):
        transform = RandDRDMDeform(networks[2], prob=1.0, deformation_level=level, steps=2).set_random_state(seed)
        transform(data)
        fields.append(transform.last.ddf.numpy())
    np.testing.assert_allclose(fields[1], fields[0], atol=1e-2, rtol=0)


@check()
@given(case=cases(dims=(2, 2, "slices")), seed=seeds)
def test_field_hangs_on_spacing_but_not_on_orientation_or_type(networks, case, seed):
    """The same voxels under a flipped and shifted affine, and as a wider type, get the same field."""
    array = values(array_of(case.data["key0"]).shape, "uint8", "noise", seed)
    dims, random = case.dims, np.random.RandomState(seed)
    plain = np.diag([*case.spacing, *[1.0] * (4 - dims)])
    turned = plain.copy()
    turned[:dims, :dims] = plain[:dims, :dims][random.permutation(dims)] * random.choice([-1, 1], dims)
    turned[:dims, 3] = random.uniform(-300, 300, dims)
    fields = []
    for affine, dtype in ((plain, "uint8"), (turned, "uint8"), (plain, "int64"), (plain, "float64")):
        transform = case.transform(networks, keys="image", mode="nearest", padding_mode="border", pixdim=None)
        transform({"image": contained(array.astype(dtype), "meta", affine)})
        fields.append(transform.last.ddf)
    assert all(torch.equal(field, fields[0]) for field in fields[1:])
