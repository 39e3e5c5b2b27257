"""What setup.cfg cannot say: everything that contains the address of the repository, which stands in CITATION.cff."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
PAPER = "https://doi.org/10.1016/j.media.2026.103987"
PICTURES = (".png", ".gif", ".jpg", ".svg")
RELATIVE_LINK = re.compile(r'(\]\(|src=")([\w./-]+)(?=[)#"])')


def read(name: str) -> str:
    """A text file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def repository() -> str:
    """The address of the repository."""
    found = re.search(r"^repository-code: (\S+)$", read("CITATION.cff"), re.MULTILINE)
    if found is None:
        raise ValueError("CITATION.cff must have a line 'repository-code: ADDRESS'.")
    return found[1]


def absolute(text: str, address: str) -> str:
    """Markdown whose relative links and pictures also work outside the repository; blocks of code stay as they are."""

    def replace(link: re.Match[str]) -> str:
        kind = "raw" if link[2].endswith(PICTURES) else "blob"
        return f"{link[1]}{address}/{kind}/HEAD/{link[2]}"

    parts = text.split("```")
    parts[::2] = [RELATIVE_LINK.sub(replace, part) for part in parts[::2]]
    return "```".join(parts)


if __name__ == "__main__":
    home = repository()
    setup(
        long_description=absolute(read("README.md"), home),
        long_description_content_type="text/markdown",
        project_urls={
            "Homepage": home,
            "Documentation": f"{home}/tree/HEAD/docs",
            "Source": home,
            "Changelog": f"{home}/blob/HEAD/CHANGELOG.md",
            "Issues": f"{home}/issues",
            "Paper": PAPER,
        },
    )
