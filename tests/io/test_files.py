import os
import shutil
import time

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch

from monai_drdm.io import load_ddf, load_image, save_ddf, stem_of
from monai_drdm.io.files import atomically, is_taken, locked, suffix_of
from monai_drdm.train.data import find_scans, load_bank

SUFFIXES = (".nii", ".nii.gz", ".mha")


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.nii", ".nii"),
        ("a.nii.gz", ".nii.gz"),
        ("A.NII.GZ", ".nii.gz"),
        ("a.b.mha", ".mha"),
        ("a.nii.mha", ".mha"),
        ("folder.mha/a.nii", ".nii"),
    ],
)
def test_suffix(tmp_path, name, suffix):
    assert suffix_of(name, SUFFIXES, "f") == suffix
    assert suffix_of(tmp_path / name, SUFFIXES, "f") == suffix
    assert suffix_of(name, SUFFIXES[::-1], "f") == suffix


@pytest.mark.parametrize("name", ["a", "a.gz", "a.nii.bz2", "nii", ".nii", ".nii.gz", "a.mhd", "a.nii/b", ""])
def test_unknown_suffix(name):
    with pytest.raises(ValueError, match=r"f: the file must end in one of .*\.mha"):
        suffix_of(name, SUFFIXES, "f")


@pytest.mark.parametrize(
    ("path", "stem"),
    [
        ("a.nii", "a"),
        ("/x/y.z/a.nii.gz", "a"),
        ("a.b.nii.gz", "a.b"),
        ("A.NII.GZ", "A"),
        ("a.b.mha", "a.b"),
        ("a.gz", "a"),
        ("a", "a"),
    ],
)
def test_stem(path, stem):
    assert stem_of(path) == stem


def write(text):
    def to(part):
        with open(part, "w") as file:
            file.write(text)

    return to


@pytest.mark.parametrize("as_string", [True, False])
def test_new_file_and_replacement(tmp_path, as_string):
    path = tmp_path / "a.nii.gz"
    for text in ("first, and longer", "second"):
        atomically(str(path) if as_string else path, write(text))
        assert path.read_text() == text
        assert os.listdir(tmp_path) == ["a.nii.gz"]


def test_part_has_the_suffix_and_the_folder(tmp_path):
    seen = []
    atomically(tmp_path / "a.nii.gz", lambda part: (seen.append(part), write("x")(part)))
    assert seen[0].endswith(".nii.gz")
    assert os.path.dirname(seen[0]) == str(tmp_path)  # else os.replace would cross file systems
    assert os.path.basename(seen[0]) != "a.nii.gz"


def test_old_file_is_whole_until_the_end(tmp_path):
    path = tmp_path / "a.nii"
    path.write_text("old")

    def look(part):
        write("new, half")(part)
        assert path.read_text() == "old"

    atomically(path, look)
    assert path.read_text() == "new, half"


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (OSError(28, "No space left on device"), OSError),
        (RuntimeError("sitk\nfull"), OSError),
        (KeyError("k"), KeyError),
    ],
)
def test_failure_leaves_the_old_file_alone(tmp_path, raised, expected):
    path = tmp_path / "a.nii"
    path.write_text("old")

    def fail(part):
        write("half")(part)
        raise raised

    with pytest.raises(expected) as caught:
        atomically(path, fail)
    if expected is OSError:
        assert str(path) in str(caught.value)
        assert caught.value.errno == getattr(raised, "errno", None)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.nii"]


def test_failure_of_a_new_file_leaves_nothing(tmp_path):
    def fail(part):
        write("half")(part)
        raise RuntimeError("no")

    with pytest.raises(OSError, match="cannot be written"):
        atomically(tmp_path / "a.nii", fail)
    assert os.listdir(tmp_path) == []


def test_target_is_a_folder(tmp_path):
    target = tmp_path / "a.nii"
    target.mkdir()
    with pytest.raises(OSError, match="cannot be written"):
        atomically(target, write("x"))
    assert os.listdir(tmp_path) == ["a.nii"]
    assert os.listdir(target) == []


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="cannot be written"):
        atomically(tmp_path / "none" / "a.nii", write("x"))


def test_nothing_was_written(tmp_path):
    (tmp_path / "a.nii").write_text("old")
    with pytest.raises(FileNotFoundError, match="cannot be written"):
        atomically(tmp_path / "a.nii", lambda part: None)
    assert (tmp_path / "a.nii").read_text() == "old"


@pytest.mark.skipif(os.name == "nt", reason="names are no bytes there")
def test_paths_that_are_not_utf8_are_errors_and_not_the_end_of_the_process(tmp_path, fork):
    """ITK aborts on them; so this is done in a fork. In training they are skipped and named."""
    latin = os.fsdecode(b"caf\xe9")
    nib.save(
        nib.Nifti1Image(np.random.default_rng(0).random((20, 20)).astype(np.float32), np.eye(4)), tmp_path / "a.nii"
    )
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.eye(20)), str(tmp_path / "a.mha"))
    (tmp_path / latin).mkdir()
    for suffix in (".nii", ".mha"):
        shutil.copy(tmp_path / f"a{suffix}", tmp_path / f"{latin}{suffix}")
        shutil.copy(tmp_path / f"a{suffix}", tmp_path / latin / f"a{suffix}")
    (tmp_path / latin / "a.dcm").write_bytes(b"")

    def read():
        for suffix in (".nii", ".mha"):
            for path in (tmp_path / f"{latin}{suffix}", tmp_path / latin / f"a{suffix}"):
                for reader in (load_image, load_ddf):
                    with pytest.raises(ValueError, match=r"paths in UTF-8\. Rename"):
                        reader(path)
                with pytest.raises(ValueError, match=r"paths in UTF-8\. Rename"):
                    save_ddf(torch.zeros(2, 8, 8), np.eye(4), path)
        bank = load_bank(find_scans(tmp_path), spatial_dims=2, working_size=17)
        assert bank.report().count("UTF-8") == 3, bank.report()

    process = fork(read)
    _, said = process.communicate()
    assert process.returncode == 0, said


def test_without_replacement_the_first_one_stays(tmp_path, monkeypatch):
    """Also if it comes while the other is being written, and on file systems that have no links."""
    path = tmp_path / "a.json"
    atomically(path, write("first"), replace=False)
    atomically(path, write("second"), replace=False)
    assert path.read_text() == "first"
    path.unlink()
    atomically(path, lambda part: (write("late")(part), path.write_text("first")), replace=False)
    assert path.read_text() == "first"

    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    atomically(path, write("second"), replace=False)
    assert path.read_text() == "first"
    path.unlink()
    atomically(path, write("second"), replace=False)
    assert path.read_text() == "second"
    assert os.listdir(tmp_path) == ["a.json"]


# locks


def hold(fork, folder, shared=False):
    """A process that holds the lock of a folder until it is killed."""

    def run():
        with locked(folder, shared=shared):
            print("held")
            time.sleep(60)

    child = fork(run)
    while not (child.said[0].exists() and "held" in child.said[0].read_text()):
        assert child.poll() is None
        time.sleep(0.005)
    return child


def is_locked(folder, shared=False):
    try:
        with locked(folder, shared=shared):
            assert not is_taken(folder)
    except FileExistsError:
        return True
    return False


def test_a_lock_keeps_others_out_and_ends_with_the_process(fork, tmp_path):
    child = hold(fork, tmp_path)
    assert is_locked(tmp_path)
    assert is_locked(tmp_path, shared=True)
    assert not is_taken(tmp_path)
    child.kill()
    child.communicate()
    assert [path.name for path in tmp_path.iterdir()] == [".lock-whole"]  # which nobody holds any more
    assert not is_taken(tmp_path)
    assert not is_locked(tmp_path, shared=True)
    assert not is_locked(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_shared_locks_admit_each_other_and_no_whole_run(fork, tmp_path):
    children = [hold(fork, tmp_path, shared=True) for _ in range(2)]
    for child in children:
        assert is_locked(tmp_path)
        assert not is_locked(tmp_path, shared=True)
        child.kill()
        child.communicate()
    assert not is_locked(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_called_like_a_lock_is_content(tmp_path):
    for name in (".lockfile", ".lock-mine", "a.lock"):
        (tmp_path / name).touch()
        assert is_taken(tmp_path)
        (tmp_path / name).unlink()


def test_no_two_processes_hold_a_lock_at_once(fork, tmp_path):
    """Processes that take and leave the lock as fast as they can, and find the mark of another one never."""
    folder, mark, rounds = tmp_path / "run", tmp_path / "mark", 40
    folder.mkdir()

    def run():
        done = 0
        while done < rounds:
            try:
                with locked(folder):
                    os.close(os.open(mark, os.O_CREAT | os.O_EXCL))  # fails if another process is inside
                    time.sleep(0.0005)
                    mark.unlink()
                    done += 1
            except FileExistsError as error:
                if error.errno is not None:
                    raise

    children = [fork(run) for _ in range(3)]
    assert [(child.communicate(), child.returncode)[1] for child in children] == [0, 0, 0]
    assert list(folder.iterdir()) == []
