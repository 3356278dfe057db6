"""Draw docs/pipeline.svg, the picture of the pipeline in README.md: every step with the room that it is in.

    python tools/pipeline_svg.py

The picture is written with the standard library's ElementTree, so its bytes depend on this file alone, its text stays
text, and a test can compare it anywhere. Boxes bring their own background: the picture reads the same on a light and on
a dark page.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "pipeline.svg"
WIDTH = 174  # of a box, in pixels
HEIGHT = 74
COLUMN = 206  # from the left edge of a box to that of the next
ROW = 118
MARGIN = 8
FONT = "Helvetica, Arial, 'DejaVu Sans', sans-serif"
STRUCTURE = "#dbeafe"
STEP = "#e7e5e4"
INK = "#1c1917"
LINE = "#85807b"


@dataclass(frozen=True)
class Box:
    """A step or a structure of the pipeline.

    Attributes:
        key: What arrows name the box by.
        title: The step, or the structure that one step hands to the next.
        room: The file or folder of the checkout that it is in; "" where it comes from outside.
        note: What happens there, in a few words.
        column: Its place from the left.
        row: Its place from the top.
        step: Whether something is done here; otherwise the box is a structure.
    """

    key: str
    title: str
    room: str
    note: str
    column: int
    row: int
    step: bool = False


BOXES = (
    Box("checkpoint", "checkpoint", "h1export/checkpoint/", note="safetensors, tokenizer", column=0, row=0),
    Box("config", "FalconH1Config", "h1export/model/falcon_h1/", note="the architecture", column=1, row=0),
    Box("trace", "trace", "graphs/trace.py", note="the model, no weights", column=2, row=0, step=True),
    Box("program", "Program", "graphs/program.py", note="graph, explicit states", column=3, row=0),
    Box("passes", "passes", "graphs/passes/", note="µP folded, products fused", column=4, row=0, step=True),
    Box("store", "WeightStore", "h1export/checkpoint/", note="rows, on demand", column=0, row=1),
    Box("quantize", "quantize", "h1export/quantize/", note="one set of integers", column=1, row=1, step=True),
    Box("lower", "Target.lower", "targets/", note="the runtime's own files", column=4, row=1, step=True),
    Box("artifact", "Artifact", "h1export/artifact/", note="a folder and its manifest", column=4, row=2),
    Box("runner", "Runner", "h1export/runtime/", note="step, states, sessions", column=3, row=2),
    Box("validate", "validate", "validate/accuracy/", note="logits, states, integers", column=2, row=2, step=True),
    Box("report", "Report", "h1export/report/", note="rows with verdicts", column=1, row=2),
    Box("reference", "transformers", "", note="FalconH1ForCausalLM", column=2, row=1),
)
ARROWS = (
    ("checkpoint", "config"),
    ("config", "trace"),
    ("trace", "program"),
    ("program", "passes"),
    ("passes", "lower"),
    ("checkpoint", "store"),
    ("store", "quantize"),
    ("lower", "artifact"),
    ("artifact", "runner"),
    ("runner", "validate"),
    ("reference", "validate"),
    ("validate", "report"),
)
# the weights pass above the box of the reference on their way to the target
WEIGHTS = ("quantize", "lower", "weights, row block by row block")


def corner(box: Box) -> tuple[int, int]:
    """Return the left upper corner of a box, in pixels."""
    return MARGIN + box.column * COLUMN, MARGIN + box.row * ROW


def ends(start: Box, end: Box) -> tuple[int, int, int, int]:
    """The two ends (x, y, x, y) of an arrow between neighbours: from the edge of one to the edge of the other."""
    (x0, y0), (x1, y1) = corner(start), corner(end)
    if start.column == end.column:
        x = x0 + WIDTH // 2
        return x, y0 + HEIGHT, x, y1 - 4
    y = y0 + HEIGHT // 2
    return (x0 + WIDTH, y, x1 - 4, y) if x1 > x0 else (x0, y, x1 + WIDTH + 4, y)


def draw_box(picture: ElementTree.Element, box: Box) -> None:
    """Add the rectangle and the lines of text of a box."""
    x, y = corner(box)
    group = ElementTree.SubElement(picture, "g", id=box.key)
    look = {"rx": "6", "fill": STEP if box.step else STRUCTURE, "stroke": LINE}
    if not box.room:
        look["stroke-dasharray"] = "4 3"
    ElementTree.SubElement(group, "rect", x=str(x), y=str(y), width=str(WIDTH), height=str(HEIGHT), **look)
    lines = [(22, "15", "bold", box.title), (42, "12", "normal", box.room), (61, "12", "normal", box.note)]
    for offset, size, weight, line in lines:
        if line:
            font = {"font-size": size, "font-weight": weight, "text-anchor": "middle", "fill": INK}
            text = ElementTree.SubElement(group, "text", x=str(x + WIDTH // 2), y=str(y + offset), **font)
            text.text = line


def picture() -> str:
    """The picture as SVG, with a line break at the end."""
    boxes = {box.key: box for box in BOXES}
    width = 2 * MARGIN + max(box.column for box in BOXES) * COLUMN + WIDTH
    height = 2 * MARGIN + max(box.row for box in BOXES) * ROW + HEIGHT
    size = {"viewBox": f"0 0 {width} {height}", "width": str(width), "height": str(height)}
    svg = ElementTree.Element(
        "svg", {"xmlns": "http://www.w3.org/2000/svg", **size, "font-family": FONT, "role": "img"}
    )
    ElementTree.SubElement(svg, "title").text = "The pipeline of h1export, and the room of each step"
    head = {"id": "head", "viewBox": "0 0 8 8", "refX": "7", "refY": "4", "markerWidth": "8", "markerHeight": "8"}
    marker = ElementTree.SubElement(ElementTree.SubElement(svg, "defs"), "marker", {**head, "orient": "auto"})
    ElementTree.SubElement(marker, "path", d="M0 0 L8 4 L0 8 z", fill=LINE)
    stroke = {"stroke": LINE, "stroke-width": "1.6", "fill": "none", "marker-end": "url(#head)"}
    for start, end in ARROWS:
        x0, y0, x1, y1 = ends(boxes[start], boxes[end])
        ElementTree.SubElement(svg, "path", {"d": f"M{x0} {y0} L{x1} {y1}", **stroke})
    start, end, label = WEIGHTS
    (x0, y0), (x1, y1) = corner(boxes[start]), corner(boxes[end])
    bend = x0 + WIDTH + 16
    above = y1 - 14
    path = f"M{x0 + WIDTH} {y0 + HEIGHT // 2} H{bend} V{above} H{x1 - 16} V{y1 + HEIGHT // 2} H{x1 - 4}"
    ElementTree.SubElement(svg, "path", {"d": path, **stroke})
    text = ElementTree.SubElement(
        svg, "text", {"x": str(bend + 8), "y": str(above - 6), "font-size": "12", "fill": LINE}
    )
    text.text = label
    for box in BOXES:
        draw_box(svg, box)
    ElementTree.indent(svg)
    return ElementTree.tostring(svg, encoding="unicode") + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    print(f"wrote {PICTURE.relative_to(ROOT)}")
