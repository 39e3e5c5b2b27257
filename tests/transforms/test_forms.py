"""Every form of the transform with every option, and with every kind of array that numpy makes."""

from __future__ import annotations

import dataclasses
import pickle
import random
import signal
import time

import numpy as np
import pytest
import torch
from monai.data import decollate_batch, list_data_collate, MetaTensor
from monai.networks.blocks import Warp

from monai_drdm import (
    ApplyDDFd,
    BatchRandDRDMBankd,
    BatchRandDRDMDeformd,
    DeformationBank,
    RandDRDMBankd,
    RandDRDMDeform,
    RandDRDMDeformd,
    RandDRDMPaird,
)
from monai_drdm.deformation.options import options_of
from monai_drdm.fields.invert import Inverse
from monai_drdm.networks import network_sha256, save_network, VelocityUNet
from monai_drdm.transforms import options as kinds
from monai_drdm.transforms.pairs import INVERSE_DDF, INVERSE_RESIDUAL

FORMS = {
    "array": kinds.ArrayOptions,
    "dictionary": kinds.DeformOptions,
    "batch": kinds.BatchOptions,
    "pair": kinds.PairOptions,
    "bank": kinds.BankedOptions,
    "bank batch": kinds.BatchBankedOptions,
    "given": kinds.ApplyOptions,
}
CHOICES = {
    "sampler": ["velocity"],
    "steps": [1],
    "recovery": [0.5],
    "symmetry": [0.0],
    "image_channel": [0, -1],
    "max_displacement_mm": [0.3],
    "on_fold": ["resample", "skip", "keep", "raise"],
    "max_fold_fraction": [0.0, 1.0],
    "slice_axis": [2],
    "device": ["cpu"],
    "deformation_level": [0.4, (0.2, 0.3)],
    "precision": ["bfloat16"],
    "mode": ["nearest", "label", "bicubic"],
    "padding_mode": ["zeros", "reflection"],
    "point_keys": ["points"],
    "point_space": ["world"],
    "invertible": [False],
    "allow_missing_keys": [True],
    "box_keys": ["boxes"],
    "box_mode": ["xxyy"],
    "image_key": ["image"],
    "seed_key": ["name"],
    "pixdim": [(2.0, 1.0)],
    "displacement_scale": [0.5],
    "rotate_range": [0.3],
    "shear_range": [0.1],
    "translate_range": [1.0],
    "scale_range": [0.1],
    "flip_prob": [1.0],
}
BATCHES = ("batch", "bank batch")
ELSEWHERE = {"compiled"}  # takes half a minute: tests/transforms/test_batch.py
MATRIX = [
    (form, name, value)
    for form, kind in FORMS.items()
    for name in options_of(kind)
    if name not in ELSEWHERE
    for value in CHOICES[name]
    if (form, value) != ("pair", "skip")  # refused: a pair must have a field
]
PLANAR, VOLUME = (20, 24), (14, 16, 5)


@pytest.fixture(scope="module")
def tiny():
    """A network that draws in milliseconds."""
    torch.manual_seed(1)
    network = VelocityUNet(2, channels=(4, 6)).eval().requires_grad_(False)
    torch.nn.init.normal_(network.out.weight, std=0.1)
    network.card = dataclasses.replace(network.card, working_size=17, steps=2)
    return network


def sample_of(scan, shape, box_mode="standard"):
    """Image, label, landmarks and boxes of one scan."""
    boxes = torch.tensor([[4.0, 5.0, 11.0, 12.0]] if len(shape) == 2 else [[3.0, 4.0, 1.0, 9.0, 10.0, 4.0]])
    return {
        **scan(shape),
        "points": torch.full((1, 2, len(shape)), 2.0),
        "boxes": boxes[:, [0, 2, 1, 3]] if box_mode == "xxyy" else boxes,
        "name": "one",
    }


def build(form, network, sample, **options):
    """A transform of a form that always fires."""
    keyed = {} if form == "array" else {"keys": ["image", "label"], "mode": ["bilinear", "nearest"]}
    if "mode" in options and form != "array":
        options["mode"] = [options["mode"], "nearest"]
    options = keyed | options
    if form.startswith("bank"):
        drawing = {"slice_axis": 2} if sample["image"].ndim == 4 else {}
        bank = DeformationBank.build(
            [sample], id_key="name", network=network, fields_per_image=1, progress=False, **drawing
        )
        kind = RandDRDMBankd if form == "bank" else BatchRandDRDMBankd
        return kind(bank=bank, id_key="name", prob=1.0, **options)
    if form == "given":
        generator, shape = torch.Generator().manual_seed(3), sample["image"].shape[1:]
        small = torch.randn(1, len(shape), *(3 for _ in shape), generator=generator)
        mode = "bilinear" if len(shape) == 2 else "trilinear"
        return ApplyDDFd(ddf=torch.nn.functional.interpolate(small, shape, mode=mode)[0], **options)
    kind = {
        "array": RandDRDMDeform,
        "dictionary": RandDRDMDeformd,
        "batch": BatchRandDRDMDeformd,
        "pair": RandDRDMPaird,
    }[form]
    return kind(network=network, prob=1.0, **options)


def call(form, transform, sample):
    """What a form makes of a sample: a dictionary, and the field that made its image."""
    if form == "array":
        return {"image": transform(sample["image"])}, transform.last.ddf
    if form in BATCHES:
        return transform(list_data_collate([sample, sample])), torch.stack([one.ddf for one in transform.last])
    out = transform(sample)
    if form == "pair":
        return {**out, "image": out["fixed"], "label": out.get("fixed_label")}, transform.last.fixed.ddf
    return out, transform.last.ddf


def inside(values):
    """Without the voxels that a field may have fetched from beyond the border, where libraries differ."""
    return values[(..., *(slice(4, -4) if n > 8 else slice(None) for n in values.shape[-2:]))]


@pytest.mark.parametrize("meta", [False, True], ids=["tensor", "meta"])
@pytest.mark.parametrize(("form", "name", "value"), MATRIX, ids=lambda one: str(one))
def test_every_option_of_every_form(tiny, scan, form, name, value, meta):
    options = {name: value}
    options |= {"point_space": {"point_keys": "points"}, "box_mode": {"box_keys": "boxes"}}.get(name, {})
    sample = sample_of(scan, VOLUME if name == "slice_axis" else PLANAR, options.get("box_mode", "standard"))
    if meta or name == "point_space":
        sample |= {
            key: MetaTensor(sample[key], affine=torch.diag(torch.tensor([2.0, 1, 1, 1]))) for key in ("image", "label")
        }
    if name == "allow_missing_keys":
        del sample["label"]
    before = pickle.loads(pickle.dumps(sample))
    transform = build(form, tiny, sample, **options)
    out, ddf = call(form, transform, sample)
    for key, value_before in before.items():
        assert not isinstance(value_before, torch.Tensor) or torch.equal(sample[key], value_before), key
    moved, given = out["image"].as_tensor(), sample["image"].as_subclass(torch.Tensor)
    assert moved.shape[-given.ndim :] == given.shape
    if moved.ndim == given.ndim:
        moved, ddf = moved[None], ddf[None]
    if (name, value) == ("on_fold", "skip") and torch.equal(moved[0], given):
        assert transform.last.skipped
    elif value == "label":
        assert np.isin(moved.numpy(), given.numpy()).all()
    else:
        mode = value if value in ("nearest", "bicubic") else "bilinear"
        padding = value if value in ("zeros", "reflection") else "border"
        expected = Warp(mode, padding)(given.expand(len(ddf), *given.shape).float(), ddf)
        torch.testing.assert_close(inside(moved), inside(expected), atol=2e-4, rtol=0)
        assert float((moved - given).abs().max()) > 1e-4
    if "label" in sample and form != "array":
        assert set(np.unique(out["label"])) <= set(np.unique(sample["label"]))
    check_inverse(form, transform, out, invertible=options.get("invertible", True), like=sample)


def check_inverse(form, transform, out, *, invertible, like):
    """What the outputs carry brings them back, one by one and out of a batch; without records it is refused."""
    if form == "array":
        inverse, moved = transform.inverse, out["image"]
    else:
        names = {"image": "fixed", "label": "fixed_label"} if form == "pair" else {"image": "image"}
        one = decollate_batch(out)[0] if form in BATCHES else out
        given = {names[key]: one[key] for key in names if one.get(key) is not None}
        transform.point_keys, transform.box_keys, transform.allow_missing_keys = (), (), True
        inverse, moved = transform.inverse, given
    if not invertible:
        with pytest.raises(ValueError, match="carries no record of this transform"):
            inverse(moved)
        return
    back = inverse(moved)
    restored = back if form == "array" else next(iter(back.values()))
    error = (restored.as_tensor() - like["image"].as_subclass(torch.Tensor)).abs().mean()
    assert error < 0.1
    assert restored.applied_operations == []


def test_the_matrix_is_whole():
    """An option that is new must be in it."""
    named = {name for kind in FORMS.values() for name in options_of(kind)}
    assert named == CHOICES.keys() | ELSEWHERE


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


KINDS = {
    "flipped along an axis of length 1": lambda array: np.flip(array, 0),
    "flipped": lambda array: np.flip(np.flip(array, -1).copy(), -1),
    "read-only": read_only,
    "of the other byte order": lambda array: array.astype(array.dtype.newbyteorder()),
    "in Fortran order": np.asfortranarray,
    "broadcast": lambda array: np.broadcast_to(array[0], array.shape),
    "with gaps": lambda array: np.repeat(array, 2, axis=-1)[..., ::2],
}
"""The same values in memory that is laid out otherwise; all of them are for arrays whose first axis has length 1."""


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fires", [True, False], ids=["fires", "idle"])
def test_arrays_of_every_layout(tiny, scan, form, kind, fires):
    """Images, labels, landmarks with their validity, and boxes give what they give as tensors."""
    sample = sample_of(scan, PLANAR) | {"points_valid": torch.tensor([[True, True]])}
    transform = build(form, tiny, sample, **({} if form == "array" else {"point_keys": "points"}))
    if form in ("dictionary", "bank", "given"):
        transform.box_keys = ("boxes",)
    transform.prob = 1.0 if fires else 0.0
    laid_out = {
        key: KINDS[kind](value.numpy()) if isinstance(value, torch.Tensor) else value for key, value in sample.items()
    }
    for key in sample.keys() - {"name"}:
        np.testing.assert_array_equal(laid_out[key], sample[key])
    outs = []
    for one in (sample, laid_out):
        if form in BATCHES:
            one = {key: [value] if key == "name" else value[None] for key, value in one.items()}
        if form != "given":
            transform.set_random_state(2)
        outs.append({"image": transform(one["image"])} if form == "array" else transform(one))
    made = (
        outs[1].keys() - sample.keys()
        if form == "pair"
        else outs[1].keys() & {"image", "label", "points", "points_valid"}
    )
    assert made
    for key in made:
        assert isinstance(outs[1][key], torch.Tensor)
        assert torch.equal(outs[1][key], outs[0][key]), key


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_banks_and_fields_of_arrays_of_every_layout(tiny, scan, kind):
    """Images that a bank is built of, and fields that are given."""
    sample = sample_of(scan, PLANAR)
    laid_out = sample | {"image": KINDS[kind](sample["image"].numpy())}
    settings = {"id_key": "name", "network": tiny, "fields_per_image": 1, "progress": False}
    bank = DeformationBank.build([laid_out], **settings)
    transform = RandDRDMBankd("image", bank=bank, id_key="name", prob=1.0)
    assert torch.equal(transform(sample)["image"], transform(laid_out)["image"])
    ddf = np.stack([np.full(PLANAR, 2.0, np.float32)] * 2)
    expected = ApplyDDFd("image", torch.tensor(ddf))(sample)["image"]
    field = ddf if kind == "broadcast" else KINDS[kind](ddf)  # both components are equal: flipping changes nothing
    assert torch.equal(ApplyDDFd("image", field)(laid_out)["image"], expected)


def test_extended_precision_is_refused_by_name(tiny, scan):
    if np.dtype(np.longdouble).itemsize == 8:
        pytest.skip("long doubles are doubles here")
    with pytest.raises(TypeError, match=r"img must be .*longdouble|img must be .*float128"):
        RandDRDMDeform(tiny)(scan(PLANAR)["image"].numpy().astype(np.longdouble))


@pytest.mark.parametrize("form", FORMS)
def test_what_a_pickled_transform_says_of_its_last_call(tiny, scan, form):
    """As much as one that was never called: nothing, and in the form that is documented."""
    sample = sample_of(scan, PLANAR)
    transform = build(form, tiny, sample)
    before = transform.last
    call(form, transform, sample)
    assert transform.last
    assert pickle.loads(pickle.dumps(transform)).last == before == ([] if form in BATCHES else None)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "array"])
def test_tensors_where_a_dictionary_belongs(tiny, scan, form):
    sample = sample_of(scan, PLANAR)
    image, label = sample["image"][None], sample["label"][None]
    transform = build(form, tiny, sample)
    advice = {"batch": r"transform\.deform\(image, label\)", "given": r"monai_drdm\.fields\.warp"}
    advice = advice.get(form, "RandDRDMDeform deforms one image")
    tensors = (image,) if form == "given" else (image, label)
    for call_it in (lambda: transform(*tensors), lambda: transform.inverse(image)):
        with pytest.raises(TypeError, match=rf"takes a dictionary with the keys .* got Tensor; .*{advice}"):
            call_it()
    if form == "batch":
        moved, moved_label = transform.deform(image, label)
        assert not torch.equal(moved, image)
        assert moved_label.dtype == label.dtype


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"point_keys": "points"}, "'point_keys': .'points',."),
        ({"seed_key": "name"}, "'seed_key': .'name',."),
        ({"image_key": "other"}, "'image_key': .'other',."),
    ],
)
def test_plain_tensors_bring_nothing_but_the_keys(tiny, scan, options, says):
    sample = sample_of(scan, PLANAR)
    transform = build("batch", tiny, sample, **options)
    with pytest.raises(ValueError, match=f"deform takes the values of keys=.* also needs .{says}.* dictionary"):
        transform.deform(sample["image"][None], sample["label"][None])


def test_the_answer_of_a_pair_lies_on_one_device(tiny, scan):
    """Whether or not it fired, or samples of a GPU cannot be collated. Here "meta" stands for another device."""
    transform = build("pair", tiny, sample_of(scan, PLANAR))
    out, _ = call("pair", transform, sample_of(scan, PLANAR))
    synthesis = transform.last.synthesis
    elsewhere = torch.empty(2, *PLANAR, device="meta")
    synthesis.ddf = elsewhere
    synthesis.__dict__["_inverse"] = Inverse(elsewhere[None], torch.tensor([0.25]), torch.tensor([True]))
    answers = [transform._answer(one, elsewhere[:1]) for one in (synthesis, None)]
    for name in (INVERSE_DDF, INVERSE_RESIDUAL):
        assert [one[name].device.type for one in answers] == ["meta", "meta"]
        assert {one[name].dtype for one in answers} == {out[name].dtype} == {torch.float32}


def test_the_hash_of_a_network_in_memory_is_that_of_its_file(tiny, tmp_path):
    """Also after its weights were changed in a way that PyTorch does not count."""
    network = VelocityUNet(2, channels=(4, 6)).eval()
    for number in range(3):
        assert (
            network_sha256(network)
            == network_sha256(network)
            == save_network(network, tmp_path / f"{number}.safetensors")
        )
        if number == 0:
            network.out.weight.data.copy_(torch.randn_like(network.out.weight))
        else:
            network.card = dataclasses.replace(network.card, working_size=33)


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("array", "given")])
def test_a_call_that_is_interrupted(fork, tiny, scan, form):
    """Ctrl-C at any moment inside a call: the next call does what it would have done, and no mode of torch stays on."""
    sample = sample_of(scan, PLANAR)
    transform = build(form, tiny, sample, seed_key="name")

    def interrupted():
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        expected, moments = call(form, transform, sample)[0]["image"].as_tensor(), random.Random(2)
        begun = time.perf_counter()
        call(form, transform, sample)
        duration, count = time.perf_counter() - begun, 0
        for _ in range(15):
            try:
                signal.setitimer(signal.ITIMER_REAL, duration * moments.uniform(0.05, 0.7))
                call(form, transform, sample)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                count += 1
            assert torch.is_grad_enabled()
            again = call(form, transform, sample)[0]["image"].as_tensor()
            assert torch.allclose(again, expected, atol=1e-4)
        assert count > 0

    process = fork(interrupted)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
