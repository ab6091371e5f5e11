"""Each package's README.md names files that exist."""

import re
from pathlib import Path

import pytest

from tests.words import PACKAGES, ROOT

READMES = [
    path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("README.md"))
    if any(path.parent.glob("*.py"))
]
MANY = 12
"""A folder with more modules says why it is one folder."""


def test_the_packages_have_readmes() -> None:
    assert {path.parent.name for path in READMES} >= {
        *(
            "model",
            "backends",
            "agent",
            "calibration",
            "testbed",
            "coordinator",
            "api",
            "cli",
            "evaluation",
            "compression",
        )
    }


def modules(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.py")} - {"__init__.py", "__main__.py"}


NAMES = {path: str(path.parent.relative_to(ROOT)) for path in READMES}


@pytest.mark.parametrize("readme", READMES, ids=NAMES.get)
def test_a_readme_names_files_that_exist(readme: Path) -> None:
    names = re.findall(r"`([\w/]+\.\w+)`", readme.read_text(encoding="utf-8"))
    files = [name for name in names if name.endswith((".py", ".md", ".toml", ".txt"))]
    assert files
    missing = [
        name for name in files if not ((readme.parent / name).exists() or (ROOT / name).exists())
    ]
    assert not missing


@pytest.mark.parametrize("readme", READMES, ids=NAMES.get)
def test_a_readme_names_each_module_of_its_folder(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    assert {name for name in modules(readme.parent) if f"`{name}`" not in text} == set()


def test_a_folder_of_many_modules_says_why_it_is_one() -> None:
    folders = {
        path.parent
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if len(modules(path.parent)) > MANY
    }
    assert len(folders) > 10
    silent = [
        str(folder.relative_to(ROOT))
        for folder in sorted(folders)
        if "**Why one folder:**" not in _text(folder / "README.md")
    ]
    assert silent == []


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
