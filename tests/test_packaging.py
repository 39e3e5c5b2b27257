"""What is published beside the code: addresses, links of the README, and the citation."""

from __future__ import annotations

import configparser
import importlib.util
import re
from pathlib import Path

import pytest
from packaging.version import Version

from monai_drdm import __version__

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def setup():
    spec = importlib.util.spec_from_file_location("setup_of_package", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_of_the_readme_work_outside_the_repository(setup):
    """Each becomes an address of the repository, whose last part is a file or folder that is here."""
    address = setup.repository()
    text = setup.absolute(setup.read("README.md"), address)
    prose = "".join(text.split("```")[::2])
    links = re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', prose)
    ours = [one or other for one, other in links if (one or other).startswith(address)]
    ours.remove(f"{address}/issues")
    assert ours
    assert all((one or other).startswith(("https://", "#")) for one, other in links)
    for link in ours:
        kind, path = re.fullmatch(rf"{address}(?:/(raw|blob)/HEAD/([^#]+)(?:#.*)?)?", link).groups(default="")
        assert (ROOT / path).exists(), link
        assert (kind == "raw") == path.endswith((".png", ".gif", ".svg"))


def test_only_links_are_changed(setup):
    text = '![a](docs/a.png) [b](docs/b.md#c) [d](#e) [f](https://g) <img src="h/i.gif">\n```python\nx["y"](z)\n```\n'
    assert setup.absolute(text, "R") == (
        "![a](R/raw/HEAD/docs/a.png) [b](R/blob/HEAD/docs/b.md#c) [d](#e) [f](https://g) "
        '<img src="R/raw/HEAD/h/i.gif">\n```python\nx["y"](z)\n```\n'
    )


def test_the_citation_is_of_the_latest_release_and_what_comes_after_it_says_so(setup):
    citation, changes = setup.read("CITATION.cff"), setup.read("CHANGELOG.md")
    date = re.search(r'^date-released: "(\d{4}-\d\d-\d\d)"$', citation, re.MULTILINE)[1]
    released = re.search(r"^version: (\S+)$", citation, re.MULTILINE)[1]
    first, second = re.findall(r"^## (.*)$", changes, re.MULTILINE)[:2]
    if first == "Unreleased":
        assert second == f"{released} – {date}"
        assert Version(__version__).is_devrelease
        assert Version(__version__) > Version(released)
    else:
        assert first == f"{__version__} – {date}"
        assert released == __version__
    assert setup.PAPER.endswith(re.search(r"^  doi: (\S+)$", setup.read("CITATION.cff"), re.MULTILINE)[1])


def test_the_oldest_versions_that_are_tested_are_those_that_are_allowed():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    allowed = dict(
        line.lower().split(" >= ") for line in config["options"]["install_requires"].split("\n") if line.strip()
    )
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line)
    for name, version in allowed.items():
        assert f"{tested[name]}.".startswith(f"{version}."), name
