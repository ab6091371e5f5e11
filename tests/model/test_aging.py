"""The order in which files of a cache make room."""

from __future__ import annotations

import os
import time
from pathlib import Path

from model.aging import by_use

YEAR_S = 365 * 86400


def test_the_file_used_longest_ago_comes_first_whatever_became_of_the_clock(tmp_path: Path) -> None:
    used = {"of a wrong clock": YEAR_S, "old": -YEAR_S, "now": -1, "of another clock": 60}
    for name, age_s in used.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() + age_s, time.time() + age_s))
    assert [path.name for path in by_use(tmp_path.iterdir())] == list(used)


def test_what_was_removed_since_it_was_listed_is_left_out(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.touch()
    assert by_use([tmp_path / "removed", kept]) == [kept]
