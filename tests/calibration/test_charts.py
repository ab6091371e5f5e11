"""The pictures are valid XML and show what they were given."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from calibration.charts import RooflinePoint, heatmap_svg, roofline_svg

SVG = "{http://www.w3.org/2000/svg}"


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)  # noqa: S314 - written by ourselves


def texts(picture: ElementTree.Element) -> list[str]:
    return [item.text or "" for item in picture.iter(f"{SVG}text")]


def test_a_roofline_has_its_ceilings_and_points_inside() -> None:
    points = [
        RooflinePoint(f"{rows} rows <b>", 4, rows * 10**8, 5 * 10**7, 0.004 * rows**0.5, rows > 8)
        for rows in (1, 8, 64)
    ]
    picture = parsed(roofline_svg("board & co", 12e9, {4: 90e9, 32: 60e9}, points))
    shown = texts(picture)
    assert shown[0] == "board & co"
    assert "memory read 12.0 GB/s" in shown
    # The fastest point of 4 bits was faster than the ceiling that was measured apart.
    assert "4 bits as executed, at best 200.0 GFLOP/s" in shown
    assert "32 bits as executed, at best 60.0 GFLOP/s" in shown
    marks = [item for item in picture.iter(f"{SVG}circle") if "rows" in (item[0].text or "")]
    assert len(marks) == len(points)
    for mark in marks:
        assert 70 <= float(mark.attrib["cx"]) <= 740
        assert 50 <= float(mark.attrib["cy"]) <= 445
    assert [mark.attrib["fill"] == "#fff" for mark in marks] == [False, False, True]


def test_a_width_has_the_same_colour_in_every_roofline() -> None:
    def colours(*widths: int) -> dict[str, str]:
        picture = parsed(roofline_svg("x", 12e9, {bits: bits * 1e9 for bits in widths}, []))
        return {
            (mark[0].text or "").partition(",")[0]: mark.attrib["fill"]
            for mark in picture.iter(f"{SVG}circle")
        }

    every = colours(2, 3, 4, 5, 6, 8, 16, 32)
    assert len(set(every.values())) == 8
    for widths in ((8,), (4, 32), (16, 32), (2, 4, 6, 8)):
        some = colours(*widths)
        assert len(some) == len(widths)
        assert some.items() <= every.items()


def test_points_say_decode_or_prefill() -> None:
    points = [
        RooflinePoint("decode, 1 rows", 4, 10**8, 5 * 10**7, 0.004, False),
        RooflinePoint("prefill, 64 rows", 4, 64 * 10**8, 5 * 10**7, 0.1, True, prefill=True),
    ]
    picture = parsed(roofline_svg("x", 12e9, {4: 90e9}, points))
    assert {"decode, short context", "prefill, long context"} <= set(texts(picture))
    shapes = {
        item[0].text: item.tag for item in picture.iter() if len(item) and item is not picture
    }
    assert shapes["decode, 1 rows"] == f"{SVG}circle"
    assert shapes["prefill, 64 rows"] == f"{SVG}rect"


@pytest.mark.parametrize("top", [9.9e9, 50e9, 99e9, 990e9])
@pytest.mark.parametrize("read", [1e9, 12e9, 400e9])
def test_the_label_of_the_memory_is_clear_of_its_line_and_of_other_words(
    top: float, read: float
) -> None:
    picture = parsed(roofline_svg("a machine", read, {4: top}, []))
    (memory,) = (t for t in picture.iter(f"{SVG}text") if (t.text or "").startswith("memory read"))
    left, y = float(memory.attrib["x"]), float(memory.attrib["y"])
    right = left + 6.6 * len(memory.text or "")
    for other in picture.iter(f"{SVG}text"):
        if other is memory:
            continue
        wide = 7.5 * len(other.text or "")
        begin = float(other.attrib["x"])
        begin -= {"start": 0.0, "middle": wide / 2, "end": wide}[other.attrib["text-anchor"]]
        apart = begin + wide < left or begin > right
        assert apart or abs(float(other.attrib["y"]) - y) >= 11, other.text
    line = next(item for item in picture.iter(f"{SVG}polyline") if item.attrib["stroke"] == "#222")
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in line.attrib["points"].split())
    at_right = y1 if right >= x1 else y0 + (y1 - y0) * (right - x0) / (x1 - x0)
    assert y <= at_right - 3 or y <= 46


def test_a_roofline_without_points() -> None:
    assert "at best 60.0" in roofline_svg("device", 12e9, {32: 60e9}, [])


def test_a_heat_map_colours_by_magnitude_and_leaves_gaps() -> None:
    values = {(0, 0): 1e-6, (0, 1): 1e-2, (1, 0): 0.0}
    picture = parsed(heatmap_svg("KL", ["a", "b"], ["8 bits", "2 bits"], values))
    boxes = [item.attrib["fill"] for item in picture.iter(f"{SVG}rect")][1:]
    assert len(boxes) == 3
    assert boxes[0] == boxes[2] == "#fff7d6"
    assert boxes[1] == "#5a0a3c"
    assert {"1.0e-06", "1.0e-02", "0", "a", "b", "8 bits", "2 bits"} <= set(texts(picture))


def test_a_heat_map_of_nothing_but_zeros() -> None:
    parsed(heatmap_svg("KL", ["a"], ["16 bits"], {(0, 0): 0.0}))
