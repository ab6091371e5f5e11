"""The import graph of the product: no circle, and no folder that has most of the code."""

from __future__ import annotations

import functools
import graphlib
import re
from collections import Counter

import grimp

from tests.words import PACKAGES, ROOT

PRODUCT = [name for name in PACKAGES if (ROOT / name / "__init__.py").exists()]
MOST = 0.17
"""The largest share of the code that one folder may have, with its subfolders."""


@functools.cache
def imports() -> dict[str, set[str]]:
    """The modules that each module imports. Imports for types alone do not count."""
    graph = grimp.build_graph(*PRODUCT, cache_dir=None, exclude_type_checking_imports=True)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert len(imports()) > 400
    graphlib.TopologicalSorter(imports()).prepare()


def test_no_package_imports_itself_by_way_of_others() -> None:
    packages: dict[str, set[str]] = {name: set() for name in PRODUCT}
    for module, imported in imports().items():
        own, *_ = module.split(".")
        packages[own] |= {name.split(".")[0] for name in imported} - {own}
    graphlib.TopologicalSorter(packages).prepare()


def test_names_of_our_packages_come_by_from() -> None:
    """After ``import model.hub``, ``model.text`` would work where another module imported it."""
    statements = re.compile(rf"^\s*import .*\b({'|'.join(PRODUCT)})\b(?!.* as )", re.MULTILINE)
    for package in PRODUCT:
        for path in (ROOT / package).rglob("*.py"):
            assert not statements.search(path.read_text(encoding="utf-8")), path


def test_no_folder_has_most_of_the_code() -> None:
    lines = Counter[str]()
    for package in PRODUCT:
        for path in (ROOT / package).rglob("*.py"):
            lines[package] += len(path.read_text(encoding="utf-8").splitlines())
    ((largest, count),) = lines.most_common(1)
    assert count / lines.total() < MOST, largest
