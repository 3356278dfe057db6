"""The picture in README.md is what its script draws, and every room in it exists."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pipeline_svg
import pytest
from pipeline_svg import ARROWS, BOXES, PICTURE, ROOT, Box

SVG = "{http://www.w3.org/2000/svg}"


def test_the_committed_picture_is_what_the_script_draws() -> None:
    assert PICTURE.read_text(encoding="utf-8") == pipeline_svg.picture()


@pytest.mark.parametrize("box", [box for box in BOXES if box.room], ids=lambda box: box.title)
def test_every_room_exists(box: Box) -> None:
    assert (ROOT / box.room).exists()


def test_every_arrow_joins_two_boxes_and_every_box_has_one() -> None:
    keys = {box.key for box in BOXES}
    joined = {key for arrow in ARROWS for key in arrow}
    assert joined == keys
    assert len(keys) == len(BOXES)


def test_text_is_text() -> None:
    shown = [text.text for text in ElementTree.parse(PICTURE).iter(f"{SVG}text")]
    assert all(line in shown for box in BOXES for line in (box.title, box.room, box.note) if line)


def test_readme_shows_it() -> None:
    assert f"({PICTURE.relative_to(ROOT).as_posix()})" in Path(ROOT, "README.md").read_text(encoding="utf-8")
