"""What fixes a field: hashes of names, ``seed_key``, and records replayed elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_drdm import RandDRDMDeform, RandDRDMDeformd
from monai_drdm.deformation.seeds import stable_hash
from monai_drdm.networks import save_network
from monai_drdm.transforms import BankedParams, DeformationParams, PairParams


@pytest.fixture(scope="module")
def weights(small_network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_network(small_network(2), path)
    return str(path)


def deform(network, **options):
    options = {"prob": 1.0, "mode": ("bilinear", "nearest"), **options}
    return RandDRDMDeformd(("image", "label"), network=network, **options)


def run_python(code, *arguments, **environment):
    """Standard output of a new Python process."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


VALUES = """[
    "case 1", "", "\\u00f8/\\u6f22", Path("a") / "b.nii.gz", 7, -7, 2**70, np.int64(8), np.uint8(9), True, 0.1, -0.5,
    float("inf"), np.float32(0.25), torch.tensor(11), torch.tensor(0.75), b"", b"raw", np.array(12),
    np.array("text"), np.array([1, 2]), np.array([1.0, 2.0]), np.array([[1, 2]]), np.array([True, False]),
    np.array(["a", "b"]), torch.arange(3), torch.rand(2, generator=torch.Generator().manual_seed(0)), [1, 2], [],
    ["a", 1, [2.5, b"x"]], ("p", np.arange(2)),
]"""


ELSEWHERE = f"""
import json, sys
from dataclasses import dataclass
from pathlib import Path
import numpy as np, torch
from monai_drdm import RandDRDMDeform
from monai_drdm.transforms import DeformationParams
from monai_drdm.deformation.seeds import stable_hash
weights, folder, *threads = sys.argv[1:]
for dims in "23":
    image = torch.from_numpy(np.load(f"{{folder}}/image{{dims}}.npy"))
    record = DeformationParams.from_json(open(f"{{folder}}/record{{dims}}.json").read())
    for number in threads:
        torch.set_num_threads(int(number))
        transform = RandDRDMDeform(weights, prob=0.0, deformation_level=0.1)
        result = transform(image, params=record)
        fields = {{"ddf": transform.last.ddf.numpy(), "image": result.as_tensor().numpy()}}
        np.savez(f"{{folder}}/{{dims}}-{{number}}.npz", **fields)
print([stable_hash(value) for value in {VALUES}], hash("case 1"))
"""


def test_another_process_hashes_and_replays_alike(weights, tmp_path, scan):
    """Also in the C locale of old containers and cluster nodes, where text is not UTF-8."""
    wanted, here = {}, torch.get_num_threads()
    other = 1 if here > 1 else 2
    for dims, shape, slice_axis in ((2, (96, 80), None), (3, (9, 96, 80), 0)):
        image = scan(shape)["image"]
        transform = RandDRDMDeform(weights, prob=1.0, max_displacement_mm=6.0, slice_axis=slice_axis)
        out = transform.set_random_state(4)(image)
        assert transform.last.params.scale < 1
        np.save(tmp_path / f"image{dims}.npy", image.numpy())
        (tmp_path / f"record{dims}.json").write_text(transform.last.params.to_json())
        wanted[dims] = transform.last.ddf.numpy(), out.as_tensor().numpy()
    c_locale = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    patient = {"OMP_WAIT_POLICY": "passive"}  # on a busy machine, threads that wait for each other burn seconds
    said = run_python(ELSEWHERE, weights, tmp_path, here, other, PYTHONHASHSEED="12345", **c_locale, **patient)
    hashes, builtin = said.rsplit(" ", 1)
    assert int(builtin) != hash("case 1")  # Python's own hash is not the same
    expected = [stable_hash(value) for value in eval(VALUES)]  # the list above
    assert json.loads(hashes) == expected
    assert all(0 <= value < 2**32 for value in expected)
    assert len(set(expected)) == len(expected)
    for dims, (ddf, image) in wanted.items():
        with np.load(tmp_path / f"{dims}-{here}.npz") as there:
            np.testing.assert_array_equal(there["ddf"], ddf)
            np.testing.assert_array_equal(there["image"], image)
        with np.load(tmp_path / f"{dims}-{other}.npz") as there:
            np.testing.assert_allclose(there["ddf"], ddf, atol=1e-3, rtol=0)


# ---------------------------------------------------------------------------------------------------- stable_hash


@pytest.mark.parametrize(
    ("one", "same"),
    [
        (3, np.int64(3)),
        (3, np.uint8(3)),
        (3, 3.0),
        (3, torch.tensor(3)),
        (3, torch.tensor(3, dtype=torch.uint8)),
        (3, np.array(3)),
        (3, MetaTensor(torch.tensor(3))),
        (0.5, np.float32(0.5)),
        (0.5, torch.tensor(0.5)),
        (0, -0.0),
        ("a/b", Path("a/b")),
        ("a", np.str_("a")),
        ("a", np.array("a")),
        (b"a", np.bytes_(b"a")),
        ([1, 2], (1, 2)),
        (["a", "b"], np.array(["a", "b"])),
        (np.array([1, 2]), torch.tensor([1, 2])),
        (np.array([1, 2], "<i4"), np.array([1, 2], ">i4")),
        (np.array([[1, 2], [3, 4]]), np.array([[1, 2], [3, 4]], order="F")),
        (np.arange(3), np.arange(6)[::2] // 2),
        (torch.tensor([0.5, 1.0]), torch.tensor([0.5, 1.0], requires_grad=True)),
    ],
)
def test_what_a_collated_or_converted_value_hashes_to(one, same):
    """MONAI turns numbers into arrays and tensors on the way; the value stays the same."""
    assert stable_hash(one) == stable_hash(same)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1", 1),
        ("a", b"a"),
        ("a", ["a"]),
        ("a", "a "),
        ("a", "A"),
        (1, 2**32 + 1),
        (2**53, 2**53 + 1),
        (0.1, float(np.float32(0.1))),
        (0, ""),
        ([], ""),
        ([1, 23], [12, 3]),
        (["ab", "c"], ["a", "bc"]),
        ([[1], 2], [1, [2]]),
        ([1, 2], [2, 1]),
        (np.array([1, 2]), np.array([[1, 2]])),
        (np.array([1, 2]), np.array([1.0, 2.0])),
        (np.zeros((2, 3)), np.zeros((3, 2))),
    ],
)
def test_different_values_hash_differently(one, other):
    assert stable_hash(one) != stable_hash(other)


def test_no_collisions_beyond_chance():
    texts = [f"case_{i}" for i in range(10_000)]
    numbers = list(range(10_000))
    for values in (texts, numbers):
        hashes = [stable_hash(value) for value in values]
        # 10,000² / 2 / 2³² = 0.01 pairs are expected to collide
        assert len(set(hashes)) >= len(values) - 1
        counts = np.bincount(np.array(hashes) // 2**28, minlength=16)  # spread over the whole range
        assert counts.sum() == 10_000
        assert (np.abs(counts - 625) < 5 * 625**0.5).all()


@pytest.mark.parametrize(
    "value",
    [None, {}, {"a": 1}, {1}, object(), 1j, torch.tensor(1j), np.array([1j, 2]), [None], ["a", {}],
     np.datetime64("2020"), np.array([None]), lambda: 1, slice(3)],
)  # fmt: skip
def test_values_without_a_hash(value):
    with pytest.raises(TypeError, match="seed_key"):
        stable_hash(value)


@pytest.mark.parametrize(
    "value", [10**400, "\udcff", float("nan"), float("-inf")], ids=["integer", "surrogate", "nan", "infinity"]
)
def test_numbers_and_texts_at_the_edge_have_a_hash(value):
    """Names of files that are not UTF-8, and numbers that are no float."""
    assert 0 <= stable_hash(value) < 2**32


# ------------------------------------------------------------------------------------------------------- seed_key


def test_same_value_same_field_whatever_came_before(weights, scan):
    sample = scan((40, 48))
    fields = []
    for seed, before in ((0, []), (0, ["x", "y"]), (77, ["b"])):
        transform = deform(weights, seed_key="id").set_random_state(seed)
        for name in before:
            transform({**sample, "id": name})
        out = transform({**sample, "id": "a"})
        fields.append((transform.last.ddf, out["image"].as_tensor(), transform.last.params))
    for ddf, image, params in fields[1:]:
        assert torch.equal(ddf, fields[0][0])
        assert torch.equal(image, fields[0][1])
        assert params == fields[0][2]


def test_different_values_give_different_levels_and_fields(weights, scan):
    transform = deform(weights, seed_key="id").set_random_state(0)
    fields, levels, seeds = [], set(), set()
    for value in ("a", "b", 1, 2, [1, "x"]):
        transform({**scan((32, 32)), "id": value})
        fields.append(transform.last.ddf)
        levels.add(transform.last.params.deformation_level)
        seeds.add(transform.last.params.seed)
    assert len(levels) == len(seeds) == 5
    for i, one in enumerate(fields):
        assert all((one - other).abs().max() > 0.1 for other in fields[:i])


def test_the_image_still_counts(weights, scan):
    """The value replaces the random state, not the image that the network sees."""
    transform = deform(weights, seed_key="id")
    first, second = scan((32, 32)), scan((32, 32))
    second["image"] = second["image"].flip(1)
    transform({**first, "id": "a"})
    params, ddf = transform.last.params, transform.last.ddf
    transform({**second, "id": "a"})
    assert transform.last.params == params
    assert not torch.equal(transform.last.ddf, ddf)


@pytest.mark.parametrize("prob", [0.0, 0.3, 1.0])
def test_probability_is_respected(weights, prob):
    transform = deform(weights, prob=prob, seed_key="id")
    fired = []
    for value in range(400):
        transform.randomize(f"case {value}")
        fired.append(transform._do_transform)
    sigma = (prob * (1 - prob) / 400) ** 0.5
    assert abs(np.mean(fired) - prob) <= 4 * sigma
    again = []
    for value in reversed(range(400)):
        transform.randomize(f"case {value}")
        again.append(transform._do_transform)
    assert again[::-1] == fired


def test_whether_it_fires_shows_on_the_data(weights, scan):
    sample = scan((16, 16))
    transform = deform(weights, prob=0.5, seed_key="id", steps=1, sampler="fast")
    outcomes = []
    for value in range(12):
        out = transform({**sample, "id": value})
        outcomes.append(transform.last is not None)
        assert torch.equal(out["image"].as_tensor(), sample["image"]) == (transform.last is None)
    assert True in outcomes
    assert False in outcomes


def test_missing_seed_key(weights, scan):
    with pytest.raises(KeyError, match="seed_key 'patient'"):
        deform(weights, seed_key="patient")(scan((16, 16)))
    with pytest.raises(KeyError, match="seed_key 'patient'"):
        deform(weights, seed_key="patient", prob=0.0)(scan((16, 16)))


@pytest.mark.parametrize("value", [{"a": 1}, object(), None])
def test_value_without_a_hash_at_seed_key(weights, scan, value):
    """A missing name (None) must not silently fall back to the random state."""
    with pytest.raises(TypeError, match="seed_key"):
        deform(weights, seed_key="id")({**scan((16, 16)), "id": value})


@pytest.mark.parametrize("prob", [0.0, 0.5])
def test_the_random_state_advances_alike(weights, prob):
    """A seed_key must not change what the transforms after it draw."""
    plain, keyed = (deform(weights, prob=prob, seed_key=key).set_random_state(3) for key in (None, "id"))
    start = plain.R.get_state()
    for step in range(5):
        plain.randomize(None)
        keyed.randomize(f"case {step}")
        for one, other in zip(plain.R.get_state(), keyed.R.get_state()):
            np.testing.assert_array_equal(one, other)
    assert plain.R.get_state()[2] != start[2]


# --------------------------------------------------------------------------------------------------------- replay


@pytest.mark.parametrize(
    "options",
    [
        {"max_displacement_mm": 0.25},
        {"deformation_level": 0.05, "prob": 0.0},
        {"on_fold": "raise", "max_fold_fraction": 0.0},
        {"sampler": "fast", "steps": 1},
        {"image_channel": 0},
        {"pixdim": (1.0, 1.0), "device": "cpu"},
    ],
    ids=str,
)
def test_the_record_counts_not_this_transforms_limits(weights, scan, options):
    sample = scan((40, 48))
    source = deform(weights, max_displacement_mm=5.0, deformation_level=0.7).set_random_state(2)
    out = source(sample)
    assert source.last.ddf.norm(dim=0).max() > 4
    other = deform(weights, **options).set_random_state(9)
    state = other.R.get_state()
    again = other(sample, params=DeformationParams.from_json(source.last.params.to_json()))
    assert torch.equal(other.last.ddf, source.last.ddf)
    assert torch.equal(again["label"].as_tensor(), out["label"].as_tensor())
    assert other.last.params == source.last.params
    assert other.last.statistics.scale == source.last.params.scale
    for one, same in zip(other.R.get_state(), state):  # a replay draws nothing
        np.testing.assert_array_equal(one, same)


def test_replay_with_another_network_or_channel(weights, small_network, scan):
    sample = scan((24, 24))
    source = deform(weights).set_random_state(1)
    source(sample)
    with pytest.raises(ValueError, match="network"):
        deform(small_network(2, working_size=16))(sample, params=source.last.params)
    two = deform(weights, image_channel=1).set_random_state(1)
    two({**sample, "image": sample["image"].repeat(2, 1, 1)})
    with pytest.raises(ValueError, match="image_channel"):
        deform(weights)(sample, params=two.last.params)


def test_replay_of_a_stack_needs_a_volume(weights, scan):
    source = deform(weights, slice_axis=1).set_random_state(1)
    source(scan((24, 5, 24)))
    with pytest.raises(ValueError, match="slice_axis"):
        deform(weights)(scan((24, 24)), params=source.last.params)


@pytest.fixture(scope="module")
def record(weights):
    transform = RandDRDMDeform(weights, prob=1.0).set_random_state(1)
    transform(torch.rand(1, 24, 24, generator=torch.Generator().manual_seed(0)))
    return json.loads(transform.last.params.to_json())


def test_json_is_plain_and_returns(record):
    assert DeformationParams.from_json(json.dumps(record)) == DeformationParams(**record)
    assert json.loads(DeformationParams(**record).to_json()) == record
    assert len(record["network_sha256"]) == 64


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"record"', "{}", "not json"])
def test_not_a_record(text):
    with pytest.raises(ValueError, match=r"DeformationParams\.from_json"):
        DeformationParams.from_json(text)


def test_entries_missing_or_foreign(record):
    for name in set(record) - {"format", "symmetry"}:
        rest = {key: value for key, value in record.items() if key != name}
        with pytest.raises(ValueError, match="from_json"):
            DeformationParams.from_json(json.dumps(rest))
    with pytest.raises(ValueError, match="from_json"):
        DeformationParams.from_json(json.dumps({**record, "extra": 1}))
    with pytest.raises(ValueError, match="format 2, this version reads 1; update monai_drdm"):
        DeformationParams.from_json(json.dumps({**record, "format": 2}))


def test_records_of_before_an_entry_came_are_records(record):
    """They have its default; versions before it say which version wrote what they do not know."""

    @dataclass(frozen=True)
    class Later(DeformationParams):
        softness: float = 0.5

    oldest = {name: value for name, value in record.items() if name != "format"}
    assert Later.from_json(json.dumps(oldest)) == Later(**record)
    assert DeformationParams.from_json(json.dumps(oldest)) == DeformationParams(**record)
    later = Later(**{**record, "version": "9.9", "softness": 0.1})
    assert Later.from_json(later.to_json()) == later
    with pytest.raises(ValueError, match=r"\['softness'\] unknown; version '9\.9' of monai_drdm wrote it"):
        DeformationParams.from_json(later.to_json())
    pair = PairParams(None, DeformationParams(**record))
    old = {"augmentation": None, "synthesis": oldest}
    assert PairParams.from_json(json.dumps(old)) == pair
    banked = BankedParams("one", 0, 1.0, None, "ab", json.dumps(oldest), "0.1.0")
    old = {name: value for name, value in json.loads(banked.to_json()).items() if name != "format"}
    assert BankedParams.from_json(json.dumps(old)) == banked
    for name, value in (("index", -1), ("scale", float("nan")), ("identity", 3), ("matrix", [[1.0, 0.0]])):
        with pytest.raises(ValueError, match=name):
            BankedParams.from_json(json.dumps({**old, name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", "x"),
        ("seed", None),
        ("seed", [1]),
        ("seed", 3.7),
        ("steps", 2.5),
        ("steps", None),
        ("deformation_level", "high"),
        ("deformation_level", None),
        ("scale", {}),
        ("scale", float("nan")),
        ("scale", float("inf")),
        ("deformation_level", float("nan")),
        ("deformation_level", 7.0),
        ("deformation_level", 0.0),
        ("image_channel", "first"),
        ("slice_axis", 1.5),
        ("slice_axis", 5),
        ("steps", 0),
        ("sampler", "unknown"),
        ("network", None),
    ],
)
def test_damaged_entries_are_refused_before_anything_moves(weights, record, name, value):
    """At the latest when replayed; a damaged record must not give another field."""
    text = json.dumps({**record, name: value})
    image = torch.rand(1, 24, 24, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError):  # noqa: PT011  # the message depends on where it is noticed
        RandDRDMDeform(weights)(image, params=DeformationParams.from_json(text))
