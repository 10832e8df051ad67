"""Draw the lineage of a run as a layered graph in inline SVG.

Layers follow the longest path from the sources, the order in a layer the barycentres of the neighbours
(Sugiyama,
Tagawa and Toda 1981), and positions least squares under a minimum distance, which is isotonic regression.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

BOX, HEIGHT, GAP, RISE, MARGIN = 148.0, 56.0, 16.0, 32.0, 6.0
BEND = 14.0  # the room that a passing edge takes in a layer
SWEEPS = 12

Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """An artifact in the graph: `text` is shown below its name, `colour` is a CSS variable, `link` an id."""

    name: str
    parents: tuple[str, ...]
    text: str
    title: str
    colour: str
    link: str = ""


def needed_edges(parents: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the parents without those that are ancestors of another parent (transitive reduction).

    `parents` lists every node, parents before children.
    """
    ancestors: dict[str, set[str]] = {}
    for name, above in parents.items():
        ancestors[name] = {name}.union(*(ancestors[parent] for parent in above))
    return {
        name: [
            parent
            for parent in above
            if not any(parent in ancestors[other] for other in above if other != parent)
        ]
        for name, above in parents.items()
    }


def layers_of(parents: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Return each node's layer: the longest path from a source; sources are right above their first child."""
    depth: dict[str, int] = {}
    for name, above in parents.items():
        depth[name] = max((depth[parent] + 1 for parent in above), default=0)
    for name, above in parents.items():
        children = [depth[child] for child, its in parents.items() if name in its]
        if not above and children:
            depth[name] = min(children) - 1
    return depth


def isotonic(wanted: Sequence[float]) -> list[float]:
    """Return the non-decreasing sequence nearest to `wanted` in least squares (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in wanted:
        total, count = value, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            before, many = pools.pop()
            total, count = total + before, count + many
        pools.append((total, count))
    return [total / count for total, count in pools for _ in range(count)]


def layout(
    parents: Mapping[str, Sequence[str]],
) -> tuple[dict[str, Point], dict[tuple[str, str], list[Point]]]:
    """Return the centres of the nodes, and for each edge (parent, child) the points between the two.

    `parents` lists every node, parents before children.
    """
    depth = layers_of(parents)
    rows: list[list[str]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for name in parents:
        rows[depth[name]].append(name)
    chains: dict[tuple[str, str], list[str]] = {}
    above: dict[str, list[str]] = {name: [] for name in parents}
    for child, its in parents.items():
        for parent in its:
            bends = [f"{parent}\0{child}\0{layer}" for layer in range(depth[parent] + 1, depth[child])]
            for layer, bend in enumerate(bends, depth[parent] + 1):
                rows[layer].append(bend)
                above[bend] = []
            chain = [parent, *bends, child]
            chains[parent, child] = bends
            for upper, lower in pairwise(chain):
                above[lower].append(upper)
    below: dict[str, list[str]] = {name: [] for name in above}
    for lower, uppers in above.items():
        for upper in uppers:
            below[upper].append(lower)

    rows = least_crossings(rows, above, below)
    width = {name: BEND if "\0" in name else BOX for name in above}
    x: dict[str, float] = {}
    for row in rows:
        offsets = spread(row, width)
        x |= {name: offset - offsets[-1] / 2 for name, offset in zip(row, offsets, strict=True)}
    for sweep in range(3 * SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            place(row, x, width, lambda name: [*above[name], *below[name]])
    left = min((x[name] - width[name] / 2 for name in x), default=0.0)
    y = {name: index * (HEIGHT + RISE) + HEIGHT / 2 for index, row in enumerate(rows) for name in row}
    at = {name: (x[name] - left + MARGIN, y[name] + MARGIN) for name in x}
    return {name: at[name] for name in parents}, {
        edge: [at[bend] for bend in bends] for edge, bends in chains.items()
    }


def crossings(rows: Sequence[Sequence[str]], above: Mapping[str, Sequence[str]]) -> int:
    """Count the crossing pairs of edges between neighbouring layers."""
    total = 0
    for upper, lower in pairwise(rows):
        rank = {name: index for index, name in enumerate(upper)}
        ends = [(rank[parent], index) for index, name in enumerate(lower) for parent in above[name]]
        total += sum(
            (a - c) * (b - d) < 0 for number, (a, b) in enumerate(ends) for c, d in ends[number + 1 :]
        )
    return total


def least_crossings(
    rows: list[list[str]], above: Mapping[str, Sequence[str]], below: Mapping[str, Sequence[str]]
) -> list[list[str]]:
    """Return the order with the fewest crossings, sorting layers by the mean rank of their neighbours.

    Sweeps go downwards and upwards in turn.
    """
    best, fewest = [list(row) for row in rows], crossings(rows, above)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        neighbours = above if down else below
        order = range(1, len(rows)) if down else range(len(rows) - 2, -1, -1)
        for index in order:
            rank = {name: number for number, name in enumerate(rows[index - 1 if down else index + 1])}
            own = {name: number for number, name in enumerate(rows[index])}

            mean = {}
            for name, number in own.items():
                near = [rank[other] for other in neighbours[name]]
                mean[name] = sum(near) / len(near) if near else float(number)
            rows[index] = sorted(rows[index], key=mean.__getitem__)
        count = crossings(rows, above)
        if count < fewest:
            best, fewest = [list(row) for row in rows], count
    return best


def spread(row: Sequence[str], width: Mapping[str, float]) -> list[float]:
    """Return the smallest distances of a layer's nodes from the first one."""
    offsets = [0.0] if row else []
    for left, right in pairwise(row):
        offsets.append(offsets[-1] + (width[left] + width[right]) / 2 + GAP)
    return offsets


def place(
    row: Sequence[str],
    x: dict[str, float],
    width: Mapping[str, float],
    neighbours: Callable[[str], Sequence[str]],
) -> None:
    """Move the nodes of a layer towards the mean of their neighbours, keeping order and distances."""
    offsets = spread(row, width)
    wanted = []
    for name, offset in zip(row, offsets, strict=True):
        near = [x[other] for other in neighbours(name)]
        wanted.append((sum(near) / len(near) if near else x[name]) - offset)
    for name, offset, shift in zip(row, offsets, isotonic(wanted), strict=True):
        x[name] = shift + offset


def draw_graph(boxes: Sequence[Box]) -> str:
    """Return the graph as inline SVG; `boxes` has parents before children, and only parents among them."""
    parents = needed_edges({box.name: box.parents for box in boxes})
    at, bends = layout(parents)
    width = max((x for x, _ in at.values()), default=0.0) + BOX / 2 + MARGIN
    width = max([width, *(x + MARGIN for points in bends.values() for x, _ in points)])
    height = max((y for _, y in at.values()), default=0.0) + HEIGHT / 2 + MARGIN
    parts = [
        f'<svg class="graph" viewBox="0 0 {width:.0f} {height:.0f}" style="--width: {width:.0f}" '
        f'role="group" '
        f'aria-label="Lineage: {len(boxes)} artifacts, each below its parents">'
    ]
    for (parent, child), points in bends.items():
        (x0, y0), (x1, y1) = at[parent], at[child]
        # Vertical through the layers between, so that no edge runs behind a box.
        between = [(x, y + side * HEIGHT / 2) for x, y in points for side in (-1, 1)]
        path = [(x0, y0 + HEIGHT / 2), *between, (x1, y1 - HEIGHT / 2 - 1)]
        parts.append(f'<path class="edge" d="{curve(path)}"/>')
    for box in boxes:
        parts.append(draw_box(box, at[box.name][0] - BOX / 2, at[box.name][1] - HEIGHT / 2))
    return "\n".join([*parts, "</svg>"])


def draw_box(box: Box, x: float, y: float) -> str:
    """Return a box with its upper left corner at (x, y): folder, last part of the name, text."""
    folder, _, last = box.name.rpartition("/")
    top = y + (16 if folder else 9)
    lines = [("small", f"{folder}/", 23, 0.0)] if folder else []
    lines += [("name", last, 17, 15.0), ("small", box.text, 23, 29.0)]
    inner = (
        f"<title>{escape(box.title)}</title>"
        f'<rect class="{"box" if box.link else "box outside"}" x="{x:.1f}" y="{y:.1f}" width="{BOX:g}" '
        f'height="{HEIGHT:g}" rx="6"/>'
        f'<rect x="{x + 6:.1f}" y="{y + 9:.1f}" width="4" height="{HEIGHT - 18:g}" rx="2" '
        f'style="fill:var({box.colour})"/>'
    )
    for kind, text, limit, down in lines:
        place = f'x="{x + 18:.1f}" y="{top + down:.1f}"'
        inner += f'<text class="{kind}" {place}>{escape(shorten(text, limit))}</text>'
    return f'<a href="#{escape(box.link)}">{inner}</a>' if box.link else f"<g>{inner}</g>"


def shorten(text: str, limit: int) -> str:
    """Return a long text with its middle cut out."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2 - 1]}…{text[-(limit - limit // 2) :]}"


def curve(path: Sequence[Point]) -> str:
    """Return an SVG path that passes every point vertically."""
    text = f"M{path[0][0]:.1f} {path[0][1]:.1f}"
    for (x0, y0), (x1, y1) in pairwise(path):
        middle = (y0 + y1) / 2
        text += f"C{x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {y1:.1f}"
    return text
