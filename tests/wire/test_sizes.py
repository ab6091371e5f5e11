from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("17", 17),
        ("17B", 17),
        ("1K", 1024),
        ("512M", 512 << 20),
        ("1.5G", 3 << 29),
        ("1.5g", 3 << 29),
        ("200MiB", 200 << 20),
        ("200 mib", 200 << 20),
        ("200MB", 200_000_000),
        (" 2T ", 2 << 40),
        ("0.0001K", 0),
        ("1.1K", 1126),
    ],
)
def test_sizes_as_people_write_them(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    ["", "G", "-1G", "1,5G", "1.G", ".5G", "1e9", "nan", "1 G B", "1X", "1GiBs", "٣M", "9" * 40],
)
def test_anything_else_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match="expected a number and a unit") as caught:
        parse_size(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 << 29, "1.5 GiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_sizes_are_shown_in_the_largest_unit(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@given(st.integers(0, 1 << 49))
def test_what_is_shown_can_be_parsed(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == pytest.approx(size_bytes, rel=0.06, abs=1)
