"""Each package's README.md names files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
READMES = sorted(
    path for path in ROOT.glob("*/README.md") if (path.parent / "__init__.py").exists()
)


def test_the_packages_have_readmes() -> None:
    assert {path.parent.name for path in READMES} >= {
        *(
            "model",
            "backends",
            "agent",
            "calibration",
            "testbed",
            "coordinator",
            "cli",
            "evaluation",
            "compression",
        )
    }


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_a_readme_names_files_that_exist(readme: Path) -> None:
    names = re.findall(r"`([\w/]+\.\w+)`", readme.read_text(encoding="utf-8"))
    files = [name for name in names if name.endswith((".py", ".md", ".toml", ".txt"))]
    assert files
    missing = [
        name for name in files if not ((readme.parent / name).exists() or (ROOT / name).exists())
    ]
    assert not missing
