"""What entries of a datalist may say, to every reader of datalists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from monai.data import load_decathlon_datalist

from monai_drdm.io import read_cases
from monai_drdm.registration.data import load_images, load_pairs
from monai_drdm.train.data import find_scans

READERS = {
    "augment": read_cases,
    "train": find_scans,
    "images": lambda path: load_images(path, spatial_dims=2),
    "pairs": lambda path: load_pairs(path, spatial_dims=2),
}


@pytest.fixture
def listed(tmp_path):
    """Write a datalist of entries."""

    def write(*entries, section="training"):
        path = tmp_path / "list.json"
        path.write_text(json.dumps({section: entries}))
        return path

    return write


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("value", ["", " ", "a\0b.nii", "a\ud800b.nii", None, 7, {}, [], [""], ["a.nii", 7]])
def test_what_names_no_file_is_an_error_that_names_the_entry(listed, reader, value):
    """Also where all other entries are right; an empty name once meant every image beside the datalist."""
    key = "fixed" if reader == "pairs" else "image"
    whole = {"image": "a.nii", "moving": "a.nii", "fixed": "a.nii", "ddf": "a.nii"}
    path = listed(whole, {**whole, key: value})
    with pytest.raises(ValueError, match=rf"list\.json: entry 1 of 'training'.*{key}"):
        READERS[reader](path)


@pytest.mark.parametrize("value", ["", "a\0b.nii", 7, "."])
def test_labels_too(listed, value):
    with pytest.raises(ValueError, match=r"list\.json: entry 0 of 'training', label must name a file"):
        read_cases(listed({"image": "a.nii", "label": value}))


@pytest.mark.parametrize("reader", ["augment", "images", "pairs"])
@pytest.mark.parametrize("value", [".", "sub", "./sub/", "sub/.."])
def test_folders_are_no_files(listed, tmp_path, reader, value):
    (tmp_path / "sub").mkdir()
    path = listed({"image": value, "moving": value, "fixed": "a.nii", "ddf": "a.nii"})
    with pytest.raises(ValueError, match=r"entry 0 of 'training'.* is a folder"):
        READERS[reader](path)


@pytest.mark.parametrize("reader", ["train", "images", "pairs"])
def test_lists_of_images_are_refused_where_one_is_needed(listed, reader):
    several = ["a.nii", "b.nii"]
    with pytest.raises(ValueError, match=r"entry 0 of 'training'.*must name"):
        READERS[reader](listed({"image": several, "moving": several, "fixed": "a.nii", "ddf": "a.nii"}))
    with pytest.raises(ValueError, match="must name one image, got the list"):
        read_cases(listed({"image": several}))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("entries", [[3], [None], [["a.nii"]]])
def test_entries_that_are_none(listed, reader, entries):
    with pytest.raises(ValueError, match=r"list\.json: entry 0 of 'training'"):
        READERS[reader](listed(*entries))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("text", ["", "[]", "{}", '{"training": {"a": 1}}', '{"training": "all"}', '{"training": []}'])
def test_what_is_no_datalist(tmp_path, reader, text):
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(ValueError, match=r"list\.json.*training"):
        READERS[reader](tmp_path / "list.json")


def test_files_are_where_monai_looks_for_them(listed, tmp_path):
    names = ["a.nii", "sub/../b.nii", "./c d.nii", str(tmp_path / "else" / "d.nii"), "ä.nii", "caf\udce9.nii"]
    path = listed(*({"image": name, "label": name} for name in names))
    expected = load_decathlon_datalist(path, is_segmentation=True)
    assert [str(case.image) for case in read_cases(path)] == [one["image"] for one in expected]
    assert [str(case.label) for case in read_cases(path)] == [one["label"] for one in expected]
    assert [str(scan.path) for scan in find_scans(path)] == [one["image"] for one in expected]


def test_test_sections_list_their_images_without_keys(listed):
    path = listed("a.nii", "b.nii", section="test")
    expected = load_decathlon_datalist(path, is_segmentation=True, data_list_key="test")
    assert [{"image": str(case.image)} for case in read_cases(path, "test")] == expected


def test_several_images_of_an_entry(listed, tmp_path):
    path = listed({"image": ["t1.nii", "sub/t2.nii"], "label": "l.nii"}, {"image": ["one.nii"]})
    first, second = read_cases(path, several_images=True)
    assert (first.image, first.others, first.label) == (
        tmp_path / "t1.nii",
        (tmp_path / "sub" / "t2.nii",),
        tmp_path / "l.nii",
    )
    assert (second.name, second.image, second.others) == ("one", Path(tmp_path / "one.nii"), ())


def test_the_scans_of_a_listed_folder_are_its_dicom_series_alone(listed, tmp_path):
    """Not whatever images lie there."""
    from PIL import Image

    from monai_drdm.train.data import load_bank

    Image.linear_gradient("L").save(tmp_path / "beside.png")
    for folder in (".", str(tmp_path)):
        with pytest.raises(ValueError, match="is a folder without a DICOM series"):
            load_bank(find_scans(listed({"image": folder})), spatial_dims=2, working_size=33)
