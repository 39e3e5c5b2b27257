"""The tools that write scans of public repositories for the benchmarks."""

from __future__ import annotations

import importlib
import subprocess
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    return importlib.import_module


def phantom():
    """A limb with a long bone on the table of a scanner, in HU, and where the bone is."""
    x, y = np.meshgrid(np.arange(80) - 40, np.arange(70) - 30, indexing="ij")
    radius, marrow = np.hypot(x, y), np.hypot(x + 2, y)
    plane = np.full((80, 70), -1000.0)
    plane[radius < 28] = 50
    plane[radius < 12] = 900
    plane[marrow < 7] = -50
    plane[:, 62:64] = 600  # the table, thinner than a bone
    plane[60:63, 5:8] = 800  # something small that is hard
    return np.repeat(plane[..., None], 20, axis=2), np.repeat((radius < 12)[..., None], 20, axis=2)


def test_bones_are_filled_and_the_table_is_left_out(tool):
    values, bone = phantom()
    found = tool("limb_data").bones(values)
    assert 2 * (found & bone).sum() / (found.sum() + bone.sum()) > 0.98
    assert found[40, 30].all(), "marrow belongs to the bone"
    assert not found[:, 60:].any()
    assert not found[58:65, 3:10].any()


def test_a_clone_at_another_commit_is_refused(tool, tmp_path):
    commit_of = tool("clones").commit_of
    with pytest.raises(SystemExit, match="no clone"):
        commit_of(tmp_path / "absent", ["0" * 40])
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", str(tmp_path), *who, "commit", "-q", "--allow-empty", "-m", "one"], check=True)
    head = subprocess.run(
        ["git", "-C", str(tmp_path), "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert commit_of(tmp_path, [head, "f" * 40]) == head
    with pytest.raises(SystemExit, match=f"{'0' * 40}, got {head}"):
        commit_of(tmp_path, ["0" * 40])
