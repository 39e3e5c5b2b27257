"""Banks whose files were damaged or edited give the fields they were built with, or an error that names the file."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from monai_drdm import DeformationBank
from monai_drdm.bank.entry import BankEntry, EntryFile
from monai_drdm.bank.settings import BankSettings
from monai_drdm.deformation.stored_field import StoredField

SETTINGS = BankSettings(
    network="net",
    network_sha256="ab" * 32,
    fields_per_image=3,
    deformation_level=(0.3, 0.8),
    sampler="velocity",
    steps=12,
    recovery=1.0,
    image_channel=None,
    max_displacement_mm=None,
    on_fold="rescale",
    max_fold_fraction=1e-4,
    slice_axis=None,
    pixdim=None,
    seed=0,
)


@pytest.fixture
def file(tmp_path):
    """The file of three fields of an image."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 40, 36, generator=generator)
    fields = [
        StoredField.quantised(torch.randn(2, 17, 15, generator=generator) * 3, tuple(image.shape[1:])) for _ in range(3)
    ]
    path = tmp_path / "entry.safetensors"
    BankEntry.of("ward/1", image, (1.0, 1.5), fields, ['{"seed": 1}'] * 3, SETTINGS.digest).save(path)
    return path


def content(path):
    """All that a file says, read through to its last field."""
    entry = EntryFile(path)
    fields = [entry.field(index) for index in range(len(entry))]
    return (
        (entry.identity, entry.shape, entry.spacing, entry.slice_axis, entry.steps, entry.params, entry.settings),
        [(field.step, field.shape, field.slice_axis, field.values.tolist()) for field in fields],
        entry.fingerprint.tolist(),
    )


def edited(path, change):
    """Change what the header says, as an editor of safetensors files would."""
    with safe_open(path, framework="pt") as opened:
        meta = json.loads(opened.metadata()["monai_drdm_bank"])
    change(meta)
    save_file(load_file(path), path, {"monai_drdm_bank": json.dumps(meta)})


@pytest.mark.parametrize("part", ["header", "body"])
def test_no_flipped_bit_gives_another_field(file, part):
    data, whole, rng = file.read_bytes(), content(file), random.Random(0)
    header = 8 * (8 + int.from_bytes(data[:8], "little"))
    refused = 0
    for _ in range(300):
        at = rng.randrange(header) if part == "header" else rng.randrange(header, 8 * len(data))
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        file.write_bytes(flipped)
        try:
            assert content(file) == whole
        except ValueError as error:
            assert str(file) in str(error)  # noqa: PT017  # most of 300 raise, and all that do name the file
            refused += 1
    assert refused > 290


@pytest.mark.parametrize("steps", [10.0, -1.0, 0.0, float("nan"), float("inf"), "1", None])
def test_edited_steps_are_refused(file, steps):
    edited(file, lambda meta: meta.update(steps=[steps] * 3))
    with pytest.raises(ValueError, match=r"entry\.safetensors cannot be read as a whole file"):
        EntryFile(file)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("identity", "ward/2"),
        ("shape", [36, 40]),
        ("shape", "wide"),
        ("spacing", [1.0]),
        ("slice_axis", 7),
        ("params", ["{}"] * 3),
        ("settings", "0" * 64),
        ("grid", [15, 17]),
        ("crc32", [0, 0, 0]),
        ("format", "three"),
    ],
)
def test_everything_else_in_the_header_is_under_its_checksum(file, name, value):
    edited(file, lambda meta: meta.update({name: value}))
    with pytest.raises(ValueError, match=r"entry\.safetensors cannot be read as a whole file"):
        EntryFile(file)
    edited(file, lambda meta: meta.clear())
    with pytest.raises(ValueError, match=r"entry\.safetensors cannot be read as a whole file"):
        EntryFile(file)


@pytest.fixture
def bank(small_network, tmp_path):
    """The folder of a bank of one image, and how it was built."""
    item = {"image": torch.rand(1, 24, 20, generator=torch.Generator().manual_seed(0)), "name": "one"}
    options = {"id_key": "name", "network": small_network(2), "fields_per_image": 1, "progress": False}

    def build():
        return DeformationBank.build([item], path=tmp_path / "bank", **options)

    build()
    return tmp_path / "bank", build


@pytest.mark.parametrize("change", [{"seed": 1}, {"max_fold_fraction": 0.5}, {"on_fold": "keep"}, {"pixdim": [2, 2]}])
def test_edited_settings_are_refused(bank, change):
    folder, build = bank
    path = folder / "bank.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for opened in (lambda: DeformationBank(folder), build):
        with pytest.raises(ValueError, match=r"bank\.json .*wrong checksum"):
            opened()


def test_no_flipped_bit_of_the_settings_passes(bank):
    path, rng = bank[0] / "bank.json", random.Random(0)
    data, settings = path.read_bytes(), DeformationBank(bank[0]).settings
    for _ in range(300):
        at = rng.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        path.write_bytes(flipped)
        try:
            assert DeformationBank(bank[0]).settings == settings  # white space
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017  # most of 300 raise, and all that do name the file


def test_banks_of_earlier_versions_say_that_they_must_be_built_again(bank):
    folder, build = bank
    path = folder / "bank.json"
    settings = {name: value for name, value in json.loads(path.read_text()).items() if name != "sha256"}
    path.write_text(json.dumps(settings | {"format": 2}))
    before = {one.name: one.read_bytes() for one in folder.iterdir()}
    for opened in (lambda: DeformationBank(folder), build):
        with pytest.raises(ValueError, match=r"bank\.json .*format 2, .*Build the bank again, in a new folder"):
            opened()
    assert {one.name: one.read_bytes() for one in folder.iterdir()} == before


def test_a_setting_that_comes_later_leaves_old_banks_as_they_are():
    @dataclass(frozen=True)
    class Later(BankSettings):
        softness: float = 0.0

    opened = Later.from_json(SETTINGS.to_json())
    assert opened.softness == 0.0
    assert opened.digest == SETTINGS.digest
    softer = Later(**{**opened.__dict__, "softness": 1.0})
    assert softer.digest != SETTINGS.digest
    assert Later.from_json(softer.to_json()) == softer
    with pytest.raises(ValueError, match="softness"):
        BankSettings.from_json(softer.to_json())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fields_per_image", 0),
        ("deformation_level", [0.3, 7]),
        ("recovery", float("nan")),
        ("symmetry", 2.0),
        ("on_fold", "hope"),
        ("slice_axis", 5),
        ("pixdim", [0, 1]),
        ("seed", 1.5),
        ("network", None),
    ],
)
def test_settings_that_cannot_be_are_named(name, value):
    wrong = BankSettings(**{**SETTINGS.__dict__, name: tuple(value) if isinstance(value, list) else value})
    with pytest.raises(ValueError, match=name):
        BankSettings.from_json(wrong.to_json())
