"""The pictures are valid XML and show what they were given."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

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
