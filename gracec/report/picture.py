"""A drawing of a model's parts: what it works on, how large it is, how much of it is quantized."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gracec.directories import cannot_write, replace_file, room_beside
from gracec.report.memory import size
from gracec.report.partition import Inspection, PartSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Fill and line of each modality; dark text on them is readable in print and without colour vision.
COLOURS = {
    "vision": ("#cfe8ef", "#1f7a8c"),
    "text": ("#fbe3bd", "#b8741a"),
    "fused": ("#e2d8f3", "#6a4c9c"),
}
INK, QUIET, QUANTIZED = "#222222", "#666666", "#2e8b57"
WIDTH, HEIGHT = 2.1, 1.25
TOP, BOTTOM, MIDDLE = 2.55, 0.45, 1.5


def draw_picture(inspection: Inspection, path: Path) -> None:
    """Write the partition as SVG, PNG or PDF, by the ending of the path.

    Raises:
        GracecError: if the path cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    parts = {part.part: part for part in inspection.parts}
    # Text stays text: small, searchable, in the reader's own font; no date, so equal input gives
    # equal files.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "gracec", "text.parse_math": False}):
        figure = Figure(figsize=(13.4, 5.2))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, 13.4), ylim=(-0.75, 4.45))
        axes.set_axis_off()
        _title(axes, inspection)
        _draw(axes, inspection, parts)
        try:
            with room_beside(path) as new:
                plain = {"Date": None} if path.suffix == ".svg" else {}
                figure.savefig(new / path.name, dpi=140, metadata=plain)
                replace_file(new / path.name, path)
        except (OSError, ValueError) as error:
            raise cannot_write(path, error) from error


def _draw(axes: Axes, inspection: Inspection, parts: dict[str, PartSummary]) -> None:
    _word(axes, 0.62, TOP, "pixels")
    _word(axes, 0.62, BOTTOM, "token ids")
    columns = {"vision": 2.35, "projector": 5.0}
    for name, x in columns.items():
        _part(axes, x, TOP, name, parts.get(name))
    tied = bool(inspection.tied) and "embedding" not in parts
    note = "shared with the head" if tied else "no parameters"
    _part(axes, 3.67, BOTTOM, "embedding", parts.get("embedding"), note)
    _circle(axes, 6.85, MIDDLE)
    decoder = f"decoder, {inspection.blocks} blocks"
    _part(axes, 8.85, MIDDLE, decoder, parts.get("decoder"), stacked=True)
    _part(axes, 11.6, MIDDLE, "head", parts.get("head"))
    _word(axes, 13.05, MIDDLE, "logits")
    half = WIDTH / 2
    _arrow(axes, (0.95, TOP), (2.35 - half, TOP), "vision")
    _arrow(axes, (2.35 + half, TOP), (5.0 - half, TOP), "vision")
    _arrow(axes, (5.0 + half, TOP), (6.74, MIDDLE + 0.22), "vision")
    _arrow(axes, (1.05, BOTTOM), (3.67 - half, BOTTOM), "text")
    _arrow(axes, (3.67 + half, BOTTOM), (6.74, MIDDLE - 0.22), "text")
    _arrow(axes, (7.1, MIDDLE), (8.85 - half, MIDDLE), "fused")
    _arrow(axes, (8.85 + half + 0.16, MIDDLE), (11.6 - half, MIDDLE), "fused")
    _arrow(axes, (11.6 + half, MIDDLE), (12.82, MIDDLE), "fused")
    footnotes = [
        f"{part.part}: {_count(part.parameters)} parameters, {size(part.bytes)}, {why}"
        for name, why in (
            ("text", "used by the text alone"),
            ("other", "outside the flow above"),
            ("unused", "the logits do not depend on them"),
        )
        if (part := parts.get(name)) is not None
    ]
    if footnotes:
        axes.text(0.25, -0.55, "   ·   ".join(footnotes), fontsize=10, color=QUIET, va="center")


def _title(axes: Axes, inspection: Inspection) -> None:
    total = sum(part.parameters for part in inspection.parts)
    name = Path(inspection.model).resolve().name
    axes.text(
        0.25, 4.12, f"{name}  ·  {inspection.architecture}", fontsize=14, color=INK, va="center"
    )
    loaded = size(sum(part.bytes for part in inspection.parts))
    compiled = size(inspection.memory.weights["compiled"])
    axes.text(
        0.25,
        3.74,
        f"{_count(total)} parameters, {loaded} in {inspection.dtype}, "
        f"{compiled} with recipe {inspection.recipe}",
        fontsize=11,
        color=QUIET,
        va="center",
    )
    x = 9.0
    for label, (fill, line) in COLOURS.items():
        _box(axes, x, 4.12, 0.26, 0.2, fill, line)
        axes.text(x + 0.22, 4.12, label, fontsize=10.5, color=INK, va="center")
        x += 1.05
    _box(axes, x, 4.12, 0.26, 0.1, QUANTIZED, QUANTIZED)
    axes.text(x + 0.22, 4.12, "quantized", fontsize=10.5, color=INK, va="center")


def _part(
    axes: Axes,
    x: float,
    y: float,
    title: str,
    part: PartSummary | None,
    note: str = "no parameters",
    *,
    stacked: bool = False,
) -> None:
    """A box centred at (x, y): name, size, and a bar for the share that is quantized."""
    modality = {"embedding": "text", "vision": "vision", "projector": "vision"}.get(title, "fused")
    fill, line = COLOURS[modality]
    if stacked:
        for step in (0.16, 0.08):
            _box(axes, x + step, y + step, WIDTH, HEIGHT, fill, line)
    _box(axes, x, y, WIDTH, HEIGHT, fill, line)
    left = x - WIDTH / 2 + 0.15
    axes.text(left, y + 0.4, title, fontsize=12, color=INK, va="center", weight="bold")
    if part is None:
        axes.text(left, y + 0.08, note, fontsize=10.5, color=INK, va="center")
        return
    text = f"{_count(part.parameters)} · {size(part.bytes)}"
    axes.text(left, y + 0.08, text, fontsize=11, color=INK, va="center")
    share = part.quantized_bytes / part.bytes if part.bytes else 0.0
    label = f"{share:.1%} quantized" if share else "kept as it is"
    axes.text(left, y - 0.2, label, fontsize=10, color=INK, va="center")
    bar = WIDTH - 0.3
    _box(axes, x, y - 0.44, bar, 0.1, "white", line, rounded=0.0)
    if share:
        centre = left + bar * share / 2
        _box(axes, centre, y - 0.44, bar * share, 0.1, QUANTIZED, QUANTIZED, rounded=0.0)


def _box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    fill: str,
    line: str,
    rounded: float = 0.06,
) -> None:
    from matplotlib.patches import FancyBboxPatch

    style = f"round,pad=0,rounding_size={min(rounded, height / 3)}" if rounded else "square,pad=0"
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(
        FancyBboxPatch(
            corner, width, height, boxstyle=style, facecolor=fill, edgecolor=line, lw=1.3
        )
    )


def _circle(axes: Axes, x: float, y: float) -> None:
    from matplotlib.patches import Circle

    fill, line = COLOURS["fused"]
    axes.add_patch(Circle((x, y), 0.25, facecolor=fill, edgecolor=line, lw=1.3))
    axes.text(x, y - 0.01, "+", fontsize=17, color=INK, ha="center", va="center")
    axes.text(x, y - 0.45, "merge", fontsize=10.5, color=INK, ha="center", va="center")


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], modality: str) -> None:
    style: dict[str, Any] = {"arrowstyle": "-|>", "color": COLOURS[modality][1], "lw": 1.6}
    axes.annotate("", xy=end, xytext=start, arrowprops={**style, "shrinkA": 0, "shrinkB": 0})


def _word(axes: Axes, x: float, y: float, text: str) -> None:
    axes.text(x, y, text, fontsize=11.5, color=INK, ha="center", va="center", style="italic")


def _count(number: int) -> str:
    """ "62.1M"."""
    value, units = float(number), ["", "k", "M", "B"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g}{units[0]}"
