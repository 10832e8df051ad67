"""Draw the plots of a report with matplotlib, as SVG whose colours are variables of the page.

Text stays text, so that a plot is sharp at any size, in light and dark mode, and in any script that the
reader's system has fonts for. The same input gives the same bytes.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Colours that no plot uses otherwise, and the variables of the style sheet that they become.
INK, MUTED, GRID = "#010101", "#020202", "#030303"
SERIES = tuple(f"#0a000{index}" for index in range(1, 9))
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line"} | {
    colour: f"--series-{index}" for index, colour in enumerate(SERIES, 1)
}
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))

# Sizes in points; the page shows a point as about 1.35 pixels where it has the room.
HALF, FULL = 370.0, 780.0
FONT = 9.0
MAX_POINTS = 400  # of a line; more are averaged in equal spans


@dataclass(frozen=True)
class Figure:
    """A drawn plot: inline SVG, whether it takes the page's whole width, and a note below it."""

    svg: str
    wide: bool
    note: str = ""


def draw(block: Mapping[str, Any], label: str, colours: Sequence[int] = range(len(SERIES))) -> Figure:
    """Draw a checked block of kind `lines`, `bars` or `heatmap`.

    label: text for screen readers. colours: indices in the palette, one for each series.
    """
    import matplotlib as mpl

    settings = {
        "svg.fonttype": "none", "svg.hashsalt": label, "font.size": FONT, "axes.edgecolor": MUTED,
        "axes.labelcolor": INK, "text.color": INK, "xtick.color": MUTED, "ytick.color": MUTED,
        "xtick.labelcolor": INK, "ytick.labelcolor": INK, "grid.color": GRID, "grid.linewidth": 0.6,
        "axes.grid": False, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "xtick.major.width": 0.6,
        "ytick.major.width": 0.6, "lines.linewidth": 1.5, "legend.frameon": False, "axes.unicode_minus": True,
        "axes.formatter.useoffset": False, "text.parse_math": False, "path.simplify": True,
    }  # fmt: skip
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(settings)
        # The reader's system draws the text, with fonts that matplotlib need not have.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        if block["kind"] == "lines":
            return draw_lines(block, label, colours)
        return draw_bars(block, label, colours) if block["kind"] == "bars" else draw_heatmap(block, label)


def new_axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(width / 72, height / 72), layout="constrained")
    return canvas, canvas.add_subplot()


def finish(canvas: Any, label: str, *, wide: bool, note: str = "") -> Figure:
    file = io.StringIO()
    canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return Figure(inline(file.getvalue(), label), wide, note)


def inline(svg: str, label: str) -> str:
    """Return an SVG document as part of a page: no prologue, no ids, variables for colours, short numbers."""
    from html import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    # A style sheet inside would hold for the whole page, whose own styles cover plots.
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert size is not None
    width, height = (float(number) for number in size.groups())
    head = (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}" '
        f'style="--width:{width:g}">'
    )
    svg = re.sub(
        r"(?<=>)[^<]+(?=<)|<[^>]*>", lambda part: slim(part[0]) if part[0][0] == "<" else part[0], svg
    )
    svg = re.sub(r">\s+<", "><", svg)
    for _ in range(4):
        svg = re.sub(r"<defs></defs>|<g></g>|<g>(<(?:path|use|text)\b[^>]*/>)</g>", r"\1", svg)
    # Last, since the label is no style; not as a replacement text, in which a backslash of the label would be
    # a command.
    svg = re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)
    return svg.strip()


def slim(tag: str) -> str:
    """Return a tag with the page's colours and font, coordinates rounded to a hundredth of a point."""
    tag = tag.replace("xlink:href", "href")
    tag = re.sub(r"font: ?([\d.]+)px [^;\"]*", r"font-size: \1px", tag)
    tag = re.sub(r"font-family:[^;\"]*;? ?| transform=\"rotate\(-0 [^\"]*\"", "", tag)
    if "data:" not in tag:
        tag = re.sub(r"(?<=\d\.\d\d)\d+", "", tag)
        tag = re.sub(r"(?<=\d)\.0+(?=[ \",)])", "", tag)
        tag = re.sub(r"\s+", " ", tag).replace(": ", ":").replace("; ", ";")
    for colour, variable in VARIABLES.items():
        tag = tag.replace(colour, f"var({variable})")
    return tag


def label_axes(axes: Any, block: Mapping[str, Any]) -> None:
    axes.set_xlabel(block["x_label"])
    axes.set_ylabel("\n".join(textwrap.wrap(block["y_label"], 42)))


def label_decades(axis: Any, low: float, high: float) -> None:
    """Set the ticks of a logarithmic axis: decades, or steps within a decade if it spans few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    decades = math.log10(high / low)
    steps = (1, 1.5, 2, 3, 4, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2 else (1,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: decade_text(value)))
    axis.set_minor_formatter(NullFormatter())


def decade_text(value: float) -> str:
    """Return a tick label: `0.05`, `200`, `10⁶`, `2·10⁶`."""
    if 1e-3 <= value < 1e4:
        return f"{value:g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    power = "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    factor = f"{value / 10.0**exponent:.3g}"
    return power if factor == "1" else f"{factor}·{power}"


def legend(axes: Any, marks: Sequence[Any], names: Sequence[str], width: float) -> None:
    """Add a legend above the plot, in as many columns as fit; a single unnamed series gets none."""
    if len(names) == 1 and not names[0]:
        return
    axes.legend(
        marks,
        [name or " " for name in names],
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=legend_columns(names, width),
        borderaxespad=0.2,
        handlelength=1.8,
        columnspacing=1.4,
    )


def legend_columns(names: Sequence[str], width: float) -> int:
    longest = max(len(name) for name in names) * FONT * 0.58 + 34
    return max(1, min(len(names), int((width - 50) / longest)))


def legend_rows(names: Sequence[str], width: float) -> int:
    return math.ceil(len(names) / legend_columns(names, width))


def thin(
    x: Sequence[float], y: Sequence[float | None]
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Return at most `MAX_POINTS` points: means over equal runs, with each run's minimum and maximum."""
    points = [(a, b) for a, b in zip(x, y, strict=True) if b is not None]
    size = math.ceil(len(points) / MAX_POINTS) or 1
    runs = [points[start : start + size] for start in range(0, len(points), size)]
    return (
        [sum(a for a, _ in run) / len(run) for run in runs],
        [sum(b for _, b in run) / len(run) for run in runs],
        [min(b for _, b in run) for run in runs],
        [max(b for _, b in run) for run in runs],
    )


def draw_lines(block: Mapping[str, Any], label: str, colours: Sequence[int]) -> Figure:
    series = block["series"]
    names = [item["name"] for item in series]
    canvas, axes = new_axes(HALF, 215 + 14 * legend_rows(names, HALF))
    if block.get("log_x"):
        axes.set_xscale("log")
    if block.get("log_y"):
        axes.set_yscale("log")
    thinned = 0
    marks: list[Any] = []
    for index, item in enumerate(series):
        colour = SERIES[colours[index % len(colours)] % len(SERIES)]
        # A curve equal to an earlier one is dashed, so that both are visible.
        same = any((item["x"], item["y"]) == (other["x"], other["y"]) for other in series[:index])
        dash = DASHES[1] if same else DASHES[index // len(SERIES) % len(DASHES)]
        x, y, low, high = thin(item["x"], item["y"])
        size = math.ceil(len(item["x"]) / MAX_POINTS)
        if size > 1:
            thinned = max(thinned, size)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        marker = {"marker": "o", "markersize": 3.2} if len(x) <= 25 else {}
        marks += axes.plot(x, y, color=colour, linestyle=dash, **marker)
        if item.get("lower") and item.get("upper"):
            band = [
                triple
                for triple in zip(item["x"], item["lower"], item["upper"], strict=True)
                if None not in triple
            ]
            axes.fill_between(
                [a for a, _, _ in band], [b for _, b, _ in band], [c for _, _, c in band],
                color=colour, alpha=0.18, linewidth=0,
            )  # fmt: skip
    axes.grid(visible=True)
    axes.margins(x=0.02)
    if not block.get("log_x") and all(value == int(value) for item in series for value in item["x"]):
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 5, 10], integer=True))
    for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        if axis.get_scale() == "log":
            label_decades(axis, *limits)
    label_axes(axes, block)
    legend(axes, marks, names, HALF)
    note = (
        f"Each point is the mean of up to {thinned} measurements; the band shows their minimum and maximum."
        if thinned
        else ""
    )
    return finish(canvas, label, wide=False, note=note)


def draw_bars(block: Mapping[str, Any], label: str, colours: Sequence[int]) -> Figure:
    """Draw vertical bars; horizontal ones if the categories' names are long or many."""
    from matplotlib.patches import Patch

    categories, series = block["categories"], block["series"]
    marks: list[Any] = []
    names = [item["name"] for item in series]
    bars = len(categories) * len(series)
    longest = max(len(name) for name in categories)
    wide = bars > 16
    width = FULL if wide else HALF
    step = (width - 60) / len(categories)
    horizontal = longest * FONT * 0.6 > step
    rows = legend_rows(names, width)
    height = (
        70 + 14 * rows + len(categories) * max(14.0, 8.0 * len(series) + 4) if horizontal else 200 + 14 * rows
    )
    if horizontal:
        wide, width = longest > 24, FULL if longest > 24 else HALF
    canvas, axes = new_axes(width, height)
    thickness = 0.8 / len(series)
    for index, item in enumerate(series):
        places = [number + (index - (len(series) - 1) / 2) * thickness for number in range(len(categories))]
        shown = [
            (place, value) for place, value in zip(places, item["values"], strict=True) if value is not None
        ]
        draw_one = axes.barh if horizontal else axes.bar
        colour = SERIES[colours[index % len(colours)] % len(SERIES)]
        draw_one([place for place, _ in shown], [value for _, value in shown], thickness * 0.92, color=colour)
        marks.append(Patch(color=colour))
        for place, value, interval in zip(
            places, item["values"], item.get("intervals") or [None] * len(categories), strict=True
        ):
            if value is not None and interval is not None:
                (axes.hlines if horizontal else axes.vlines)(place, *interval, color=INK, linewidth=0.9)
            if value is None:
                x, y = (0.0, place) if horizontal else (place, 0.0)
                side = "left" if horizontal else "center"
                axes.text(x, y, "–", color=MUTED, ha=side, va="center" if horizontal else "bottom")
    ticks = range(len(categories))
    if horizontal:
        axes.set_yticks(ticks, categories)
        axes.invert_yaxis()
        axes.grid(visible=True, axis="x")
        axes.margins(y=0.01)
        axes.set_xlabel(block["y_label"])
        axes.set_ylabel(block["x_label"])
    else:
        axes.set_xticks(ticks, categories)
        axes.grid(visible=True, axis="y")
        axes.margins(x=0.01)
        label_axes(axes, block)
    (axes.tick_params)(axis="y" if horizontal else "x", length=0)
    legend(axes, marks, names, width)
    has_intervals = any(any(item.get("intervals") or []) for item in series)
    note = "Thin lines: intervals." if has_intervals and not block.get("caption") else ""
    return finish(canvas, label, wide=wide, note=note)


def draw_heatmap(block: Mapping[str, Any], label: str) -> Figure:
    """Draw cells from dark (minimum) to bright (maximum), with numbers if they fit; null cells are empty."""
    import matplotlib as mpl
    import numpy as np

    rows, columns = block["rows"], block["columns"]
    values = np.array(
        [[np.nan if value is None else value for value in row] for row in block["values"]], dtype=float
    )
    longest = max(len(name) for name in rows) * FONT * 0.6
    wide = len(columns) > 9
    width = FULL if wide else HALF
    cell = (width - longest - 70) / len(columns)
    heads = [textwrap.wrap(name, max(1, int(cell / FONT / 0.6)), break_long_words=False) for name in columns]
    turned = max((len(word) for head in heads for word in head), default=0) * FONT * 0.6 > cell
    lines = max(len(head) for head in heads)
    top = max(len(name) for name in columns) * FONT * 0.6 if turned else 3 + 11 * lines
    names = columns if turned else ["\n".join(head) for head in heads]
    canvas, axes = new_axes(width, 30 + top + len(rows) * 17)
    least, greatest = (0.0, 1.0) if np.isnan(values).all() else (np.nanmin(values), np.nanmax(values))
    colours = mpl.colormaps["cividis"]
    mesh = axes.pcolormesh(
        values,
        cmap=colours,
        vmin=least,
        vmax=greatest if greatest > least else least + 1,
        linewidth=0.2,
        edgecolors="face",
    )
    if cell >= 24:
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if not np.isnan(value):
                    share = (value - least) / (greatest - least) if greatest > least else 0.0
                    axes.text(
                        j + 0.5, i + 0.5, f"{value:.2g}", ha="center", va="center", fontsize=FONT - 2,
                        color="#ffffff" if share < 0.55 else "#000000",
                    )  # fmt: skip
    axes.set_xticks([j + 0.5 for j in range(len(columns))], names, rotation=90 if turned else 0)
    axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
    axes.xaxis.tick_top()
    axes.invert_yaxis()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = canvas.colorbar(mesh, ax=axes, pad=0.01, aspect=max(8, len(rows)), label=block.get("label", ""))
    bar.outline.set_visible(False)
    bar.solids.set_edgecolor("face")
    return finish(canvas, label, wide=wide)
