"""Whatever is wrong with a text of ours comes out as one error that names the file and says what to do."""

import json
import os

import pytest
import torch
from safetensors.torch import save as to_safetensors

from monai_drdm import RandDRDMDeform
from monai_drdm.augment import AugmentSettings, PairSettings
from monai_drdm.augment.output_folder import OutputFolder
from monai_drdm.bank import DeformationBank
from monai_drdm.deformation.record import BankedParams, DeformationParams, PairParams
from monai_drdm.documents import Document
from monai_drdm.io import Case, read_cases
from monai_drdm.networks import convert_published, load_network
from monai_drdm.registration.data import load_pairs
from monai_drdm.registration.networks import load_registration
from monai_drdm.train import TrainConfig
from monai_drdm.train.data import find_scans
from monai_drdm.training.reports import Reports
from monai_drdm.training.run_folder import check_same_data, lock_run_folder
from monai_drdm.training.settings import read_config

HUGE = 10**400
DEEP = "[" * 100_000
NESTED = "[" * 900 + "]" * 900
"""Deep enough for functions that go down it, not for the parser."""

TEXTS = {
    "empty": b"",
    "deep": DEEP.encode(),
    "deep mapping": b'{"a": ' * 100_000,
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "a list": b"[1]",
    "no number": b"null",
    "digits": b'{"a": 1' + b"0" * 5000 + b"}",
    "torn": b'{"training": [{"image": "a.nii',
    "other entries": b'{"other": 1}',
}


def resume(path):
    with lock_run_folder(path.parent, TrainConfig(), resume=True):
        pass


def in_weights(load, key):
    """A reader of weights whose metadata hold a text."""

    def read(path):
        metadata = {key: path.read_bytes().decode("latin-1")}
        weights = path.with_suffix(".safetensors")
        weights.write_bytes(to_safetensors({"a": torch.zeros(1)}, metadata))
        load(weights)

    return read


READERS = {
    "settings": ("settings.json", lambda path: read_config(TrainConfig, path)),
    "settings of a run": ("config.json", resume),
    "datalist": ("datalist.json", read_cases),
    "datalist to train on": ("datalist.json", find_scans),
    "datalist of pairs": ("datalist.json", lambda path: load_pairs(path, spatial_dims=2)),
    "bank": ("bank.json", lambda path: DeformationBank(path.parent)),
    "card": ("card", in_weights(load_network, "monai_drdm")),
    "structure": ("card", in_weights(load_registration, "monai_drdm_registration")),
}


def check_explained(said):
    assert "\n" not in said
    assert said.endswith(".")
    assert len(said) < 2000


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("reader", READERS)
def test_faults_are_explained_with_the_name_of_the_file(tmp_path, reader, text):
    name, read = READERS[reader]
    (tmp_path / name).write_bytes(TEXTS[text])
    with pytest.raises(ValueError, match=r"\S") as caught:
        read(tmp_path / name)
    check_explained(str(caught.value))
    assert str(tmp_path) in str(caught.value) or (reader, text) == ("settings", "other entries")


ENTRIES = {
    "numbers beyond floats": {"image": "a.nii", "moving": "a.nii", "fixed": "a.nii", "ddf": "a.nii", "weight": HUGE},
    "nested": {"image": json.loads(NESTED), "moving": json.loads(NESTED)},
    "numbers for files": {"image": 3, "moving": 3},
    "no mapping": [3],
}


@pytest.mark.parametrize("reader", ["datalist", "datalist to train on", "datalist of pairs"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_faults_in_entries_of_a_datalist(tmp_path, reader, entry):
    path = tmp_path / "datalist.json"
    path.write_text(json.dumps({"training": [ENTRIES[entry]]}))
    if entry == "numbers beyond floats" and reader != "datalist to train on":
        return  # it alone reads weights
    with pytest.raises(ValueError, match=r"datalist\.json") as caught:
        READERS[reader][1](path)
    check_explained(str(caught.value))


CARD = {"name": "a", "kind": "recresacnet", "spatial_dims": 2, "working_size": 32}


@pytest.mark.parametrize(
    "change",
    [
        {"level": [HUGE, HUGE]},
        {"input_range": [0, HUGE]},
        {"level": 3},
        {"level": [1]},
        {"gates": json.loads(NESTED)},
        {"gates": {"a": json.loads(NESTED)}},
        {"steps": HUGE},
        {"kind": [1]},
        {"channels": json.loads(NESTED)},
        {"sampler": {}},
    ],
)
def test_faults_in_a_card_name_the_weights_file(tmp_path, change):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(to_safetensors({"a": torch.zeros(1)}, {"monai_drdm": json.dumps(CARD | change)}))
    with pytest.raises(ValueError, match=r"mine\.safetensors") as caught:
        load_network(path)
    check_explained(str(caught.value))


@pytest.mark.parametrize(
    "change", [{"channels": HUGE}, {"channels": 10**7}, {"depth": 3.5}, {"kind": [1]}, {"more": 1}]
)
def test_faults_in_a_structure_name_the_file_and_take_no_memory(tmp_path, change):
    path = tmp_path / "mine.safetensors"
    structure = {"kind": "voxelmorph", "spatial_dims": 2} | change
    path.write_bytes(to_safetensors({"a": torch.zeros(1)}, {"monai_drdm_registration": json.dumps(structure)}))
    with pytest.raises(ValueError, match=r"mine\.safetensors") as caught:
        load_registration(path)
    check_explained(str(caught.value))


def test_safetensors_headers_that_are_no_cards_name_the_file(tmp_path):
    """All that may stand in the header of a file that safetensors itself reads."""
    path = tmp_path / "mine.safetensors"
    for metadata in (None, {}, {"other": "1"}, {"monai_drdm": "{}", "other": "1"}):
        path.write_bytes(to_safetensors({"a": torch.zeros(1)}, metadata))
        with pytest.raises(ValueError, match=r"mine\.safetensors cannot be read as"):
            load_network(path)


RECORD = {
    "seed": 1,
    "deformation_level": 0.5,
    "network": "a",
    "network_sha256": "",
    "sampler": "fast",
    "steps": 1,
    "recovery": 1.0,
    "precision": "float32",
    "image_channel": None,
    "slice_axis": None,
    "scale": 1.0,
    "version": "1",
}


@pytest.mark.parametrize("kind", [DeformationParams, BankedParams, PairParams])
@pytest.mark.parametrize("text", [*TEXTS, "nested", "huge"])
def test_faults_in_records_are_explained(kind, text):
    made = {"nested": f'{{"augmentation": null, "synthesis": {NESTED}}}', "huge": json.dumps(RECORD | {"scale": HUGE})}
    content = made[text] if text in made else TEXTS[text].decode("latin-1")
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.from_json|DeformationParams\.from_json") as caught:
        kind.from_json(content)
    check_explained(str(caught.value))


def test_settings_of_a_run_over_a_data_set_that_are_not_text(tmp_path):
    (tmp_path / "settings.json").write_bytes(b"\xff\xfe")
    output = OutputFolder(tmp_path, AugmentSettings(network="anatomy-2d"), None)
    with pytest.raises(ValueError, match=r"settings\.json.*UTF-8"), output.open(False, shared=False):
        pass


def test_a_digest_that_is_not_text(tmp_path):
    (tmp_path / "data.sha256").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"data\.sha256.*UTF-8"):
        check_same_data(tmp_path, "0", resume=True)


@pytest.mark.parametrize("line", ['{"loss": 1}', '{"step": []}', "3}", '{"step": 1} {"step": 2}'])
def test_metrics_that_are_damaged(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl") as caught:
        Reports(tmp_path).drop_after(1)
    check_explained(str(caught.value))


@pytest.mark.parametrize("left_out", ["name", "files", "source", "inputs_sha256"])
def test_records_of_a_run_without_what_is_needed_are_drawn_again(tmp_path, left_out):
    output = OutputFolder(tmp_path, AugmentSettings(network="anatomy-2d", levels=(0.5,)), None)
    record = {"name": "a", "files": {}, "source": {"image": "a"}, "inputs_sha256": {}, "params": {}, "statistics": {}}
    record["settings_sha256"] = output.settings_sha256
    case = Case("a", tmp_path / "a.png", None)
    (tmp_path / "records").mkdir()
    path = tmp_path / "records" / f"{output.settings.draws_of('a')[0].name}.json"
    record["name"] = path.stem
    path.write_text(json.dumps(record))
    assert not output.unfinished(case, {})
    for damaged in ({k: v for k, v in record.items() if k != left_out}, record | {left_out: [1]}):
        path.write_text(json.dumps(damaged))
        with pytest.warns(UserWarning, match="cannot be read as the record of a draw"):
            assert len(output.unfinished(case, {})) == 1
        with pytest.warns(UserWarning, match="cannot be read as the record of a draw"):
            output.write_datalist([case])


def test_numbers_beyond_every_float_in_settings(tmp_path):
    for text in (f"learning_rate={HUGE}", f"scale={HUGE}", f"seed={HUGE}", "learning_rate=1e400"):
        with pytest.raises((TypeError, ValueError), match=text.split("=", maxsplit=1)[0]):
            read_config(TrainConfig, settings=[text])


@pytest.mark.parametrize(
    "make",
    [
        lambda: RandDRDMDeform(deformation_level=HUGE),
        lambda: RandDRDMDeform(recovery=HUGE),
        lambda: RandDRDMDeform(prob=HUGE),
        lambda: RandDRDMDeform(pixdim=(HUGE, 1)),
        lambda: AugmentSettings(levels=(HUGE,)),
        lambda: PairSettings(synthesis_level=(0.1, HUGE)),
    ],
)
def test_numbers_beyond_every_float_as_arguments(make):
    with pytest.raises(ValueError, match=r"must"):
        make()


def test_values_that_refer_to_each_other_are_shown_in_short(tmp_path):
    """References of YAML let a small file stand for more values than there are atoms."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 40)]
    path = tmp_path / "settings.yaml"
    path.write_text("\n".join([*lines, "channels: *a39"]))
    with pytest.raises(ValueError, match="unknown settings"):
        read_config(TrainConfig, path)
    path.write_text("\n".join([f"channels: {text}" for text in ["&a [*a]"]]))
    with pytest.raises(TypeError, match="channels must be a list of integers"):
        read_config(TrainConfig, path)


@pytest.mark.skipif(os.name != "posix", reason="sparse files and pipes are those of POSIX")
def test_files_that_are_too_large_or_none(tmp_path):
    kind = Document("a text", "Choose another.")
    path = tmp_path / "sparse.json"
    with path.open("wb") as file:
        file.truncate(5 << 30)
    with pytest.raises(ValueError, match=r"sparse\.json.*256 MiB"):
        kind.read_json(path)
    with pytest.raises(ValueError, match=r"sparse\.json must be a published file of at most 64 MiB"):
        convert_published(path)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match=r"pipe\.json.*not a file"):
        kind.read_json(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match="not a file"):
        kind.read_json(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.json, expected a text"):
        kind.read_json(tmp_path / "none.json")


def test_texts_of_windows_editors_are_read(tmp_path):
    path = tmp_path / "datalist.json"
    path.write_text('{"training": [{"image": "å.nii"}]}', encoding="utf-8-sig")
    assert read_cases(path)[0].image == tmp_path / "å.nii"


def test_an_error_that_is_explained_stays_as_it_is():
    kind = Document("a text", "Choose another.")
    said = r"^inner cannot be read as a text: there is no entry 'a'\. Choose another\.$"
    with pytest.raises(ValueError, match=said), kind.reading("outer"), kind.reading("inner"):
        raise KeyError("a")
    with pytest.raises(OSError, match="gone"), kind.reading("outer"):
        raise OSError("gone")
