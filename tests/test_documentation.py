"""The code of README and of the pages in ``docs/`` runs, and its command lines are ones that the commands take."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, get_track_meta, set_track_meta
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged

from monai_drdm import cli
from monai_drdm.commands import register
from monai_drdm.registration import train as registration_training
from monai_drdm.train import __main__ as recovery_training

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
QUICK = {"fields_per_image=16": "fields_per_image=2"}
"""What is other here than on the pages, so that it takes no minutes."""
TRAINING = {
    "monai-drdm train": recovery_training.main,
    "monai-drdm register": registration_training.main,
    "-m monai_drdm.train": recovery_training.main,
    "-m monai_drdm.registration.train": registration_training.main,
}
UNKNOWN = "a_setting_that_is_not_there"


class Block(NamedTuple):
    page: str
    line: int
    """Of the page, in which the code begins."""
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path, *languages: str) -> list[Block]:
    """The code of a page in these languages; some of it is indented, as in lists."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^ *```(\w+)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [
        Block(str(page.relative_to(ROOT)), text.count("\n", 0, one.start(2)) + 1, one.group(2))
        for one in found
        if one.group(1) in languages
    ]


def command_lines() -> Iterator[Block]:
    """The lines of shell code that call this package."""
    for page in PAGES:
        for block in blocks(page, "bash", "sh", "shell", "console"):
            text = block.text.replace("\\\n", " ")
            for line in text.splitlines():
                if re.search(r"monai-drdm |-m monai_drdm\.", line):
                    yield block._replace(text=line)


RUNNABLE = [page for page in PAGES if blocks(page, "python")]
CALLS = list(command_lines())


@pytest.fixture
def scans(tmp_path, monkeypatch):
    """A working folder with two volumes and their labels, as a page's reader has them, and what is read of them.

    They are long and thin, so that fields are drawn fast: the network's grid has the proportions of the image.
    """
    monkeypatch.chdir(tmp_path)
    y, x, z = np.meshgrid(np.linspace(-1, 1, 40), np.linspace(-1, 1, 12), np.linspace(-1, 1, 3), indexing="ij")
    items = []
    for number in (1, 2):
        disc = (y / (0.5 + 0.1 * number)) ** 2 + (x / 0.6) ** 2 < 1
        image = 400 * disc + 100 * np.sin(9 * y + number) + 50 * z
        item = {"name": f"patient{number:02d}"}
        for key, array in {"image": image.astype(np.float32), "label": disc.astype(np.uint8)}.items():
            item[key] = Path(f"{key}sTr") / f"{item['name']}.nii.gz"
            item[key].parent.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 1.5, 1.0])), item[key])
        items.append(item)
    keys = ["image", "label"]
    dataset = Dataset(items, Compose([LoadImaged(keys), EnsureChannelFirstd(keys)]))
    tracks = get_track_meta()
    yield {"dataset": dataset, "sample": dataset[0], "loader": DataLoader(dataset, batch_size=2)}
    set_track_meta(tracks)


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_code_of_a_page_runs(page, scans):
    """All blocks in their order and in one namespace, which begins with a dataset, a sample and a batch of it."""
    names = {**scans, "batch": next(iter(scans["loader"])), "__name__": "page"}
    torch.manual_seed(0)
    for block in blocks(page, "python"):
        text = block.text
        for slow, quick in QUICK.items():
            text = text.replace(slow, quick)
        exec(compile("\n" * (block.line - 1) + text, page, "exec"), names)


def words_of(line: str) -> list[str]:
    """The arguments of a line, without its comment, and without what stands before the call of this package."""
    words = shlex.split(line, comments=True)
    starts = [i + 1 for i, word in enumerate(words) if word == "monai-drdm" or word.startswith("monai_drdm.")]
    assert starts, line
    return words[starts[0] :]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_command_lines_are_understood(call, capsys):
    """Words, flags, choices and numbers are such as the parsers take; no command is run."""
    words = words_of(call.text)
    two_images = words[0] == "register" and not register.trains(words[1:])
    for begin, train in TRAINING.items():
        if f"{begin} " in call.text and not two_images:
            words = words[1:] if begin.startswith("monai-drdm") else words
            # with a setting that there is not, the run ends when all else is understood, and names what is unknown
            assert train([*words, "--set", f"{UNKNOWN}=1"]) == 1
            assert f"unknown settings ['{UNKNOWN}']" in capsys.readouterr().err
            return
    if "|" in words[0]:
        pytest.skip("a line of alternatives")
    cli._parser().parse_args(words)


def test_pages_have_code_and_command_lines():
    """The patterns above find what they are for."""
    assert {"README.md", "docs/start/first_pipeline.md", "docs/howto/volumes.md"} <= {
        page.relative_to(ROOT).as_posix() for page in RUNNABLE
    }
    assert len(CALLS) > 15
    assert any("monai-drdm train" in call.text for call in CALLS)
    assert words_of("torchrun --nproc_per_node=4 -m monai_drdm.train --out run  # 4 processes") == ["--out", "run"]
