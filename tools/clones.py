"""Clones of public repositories with scans, at one commit, so that everybody has the same scans."""

from __future__ import annotations

import subprocess
from collections.abc import Collection
from pathlib import Path


def commit_of(clone: Path, wanted: Collection[str]) -> str:
    """The commit of a clone; raise unless it is one of those that are wanted."""
    command = ["git", "-C", str(clone), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603  # git, no shell
    if found not in wanted:
        names = " or ".join(wanted)
        raise SystemExit(f"{clone} must be a clone at commit {names}, got {found or 'no clone'}: git checkout COMMIT")
    return found
