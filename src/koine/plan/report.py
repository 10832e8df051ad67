"""One self-contained HTML file about a run: the answer, curves, tables, samples, and where everything came from."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from koine.files import write_atomically
from koine.plan.report_blocks import Block, is_number
from koine.plan.report_graph import Box, draw_graph
from koine.plan.report_plots import SERIES, draw
from koine.plan.report_run import Member, read_run

PLOTS = ("lines", "bars", "heatmap")
NUMERIC_TEXT = re.compile(r"[+\u2212-]?\d[\d.,\u202f]*( ?%)?( \([^)]*\))?")
LABELS = {
    "loss": "loss, nats per token",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens/s",
    "gradient_norm": "norm of the gradient",
    "ceiling_share": "share of the matmul ceiling",
    "units": "tokens with a loss in a batch",
}


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of the run folder `run` to `out` (by default `run/report.html`) and return its path.

    The page depends on the run's files alone: written twice, it is the same. Raises `UserError` where `run` is no run folder, or
    where a record or a report in it is broken.
    """
    run = Path(run)
    out = run / "report.html" if out is None else Path(out)
    members = read_run(run)
    write_atomically(out, render(run.resolve().name, members))
    return out


@dataclass
class Palette:
    """A series of one name has one colour on the whole page, as far as the colours go."""

    places: dict[str, int] = field(default_factory=dict)

    def of(self, names: Sequence[str]) -> list[int]:
        """The places in the palette of the series of one figure, no two alike where there are enough."""
        chosen: list[int] = []
        for name in names:
            place = self.places.setdefault(name, len(self.places)) % len(SERIES)
            if place in chosen and len(chosen) < len(SERIES):
                place = next(other for other in range(len(SERIES)) if other not in chosen)
            chosen.append(place)
        return chosen


def render(name: str, members: Sequence[Member]) -> str:
    """The page."""
    import jinja2

    palette = Palette()
    answering = [member for member in members if has_verdict(member)]
    answers = [
        {
            "title": member.report.title,
            "link": anchor(member.name),
            "name": member.name,
            "blocks": views(member, palette),
        }
        for member in answering
        if member.report is not None
    ]
    curves = curve_groups(members, palette)
    steps = list(dict.fromkeys(member.step for member in members))
    colours = {step: f"--series-{index % len(SERIES) + 1}" for index, step in enumerate(steps)}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        resources.files("koine.plan").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    return template.render(
        name=name,
        facts=facts(members),
        answers=answers,
        curves=curves,
        graph=draw_graph(boxes(members, colours)),
        steps=colours,
        artifacts=[section(member, members, palette, member in answering) for member in members],
    )


def has_verdict(member: Member) -> bool:
    return member.report is not None and any(block["kind"] == "verdict" for block in member.report.blocks)


def anchor(name: str) -> str:
    """The id of an artifact's section; `/` is the only sign in a name that an id does without."""
    return "artifact-" + name.replace("/", ".")


# Header


def facts(members: Sequence[Member]) -> list[tuple[str, str]]:
    """What the head of the page says of the run; what no artifact recorded is left out."""
    started = [value for member in members if (value := member.number("started")) is not None]
    finished = [value for member in members if (value := member.number("finished")) is not None]
    seconds = [value for member in members if (value := member.number("seconds")) is not None]
    memory = [value for member in members if (value := member.number("peak_memory_bytes")) is not None]
    found: list[tuple[str, str]] = []
    if finished:
        found.append(
            ("Finished", datetime.fromtimestamp(max(finished), UTC).strftime("%-d %B %Y, %H:%M UTC"))
        )
    if started and finished and max(finished) > min(started):
        found.append(("From start to end", duration(max(finished) - min(started))))
    if seconds:
        found.append(("Time in steps", duration(sum(seconds))))
    found.append(("Artifacts", str(len(members))))
    if memory:
        found.append(("Largest step", size(max(memory))))
    if machines := list(dict.fromkeys(text for member in members if (text := machine(member)))):
        found.append(("Machine", "; ".join(machines)))
    versions = {
        str(code["koine"])
        for member in members
        if isinstance(code := member.record.get("code"), dict) and code.get("koine")
    }
    if versions:
        found.append(("Koine", ", ".join(sorted(versions))))
    return found


def machine(member: Member) -> str:
    """The machine of an artifact in a few words."""
    environment = member.record.get("environment")
    if not isinstance(environment, dict):
        return ""
    words = [
        str(environment[key]) for key in ("processor", "accelerator", "platform") if environment.get(key)
    ]
    if is_number(environment.get("cores")):
        words.append(f"{environment['cores']} cores")
    if environment.get("python"):
        words.append(f"Python {environment['python']}")
    return ", ".join(words)


# Blocks


def views(member: Member, palette: Palette) -> list[dict[str, Any]]:
    """The blocks of an artifact as the template wants them."""
    if member.report is None:
        return []
    return [
        view(block, f"{member.name}, block {number}", palette)
        for number, block in enumerate(member.report.blocks, 1)
    ]


def view(block: Block, place: str, palette: Palette) -> dict[str, Any]:
    kind = block["kind"]
    title = block.get("title", "")
    if kind in PLOTS:
        axes = f"{block['y_label']} by {block['x_label']}" if kind != "heatmap" else block.get("label", "")
        label = ": ".join(text for text in (title or place, axes) if text)
        names = [item["name"] for item in block["series"]] if kind != "heatmap" else []
        figure = draw(block, label, palette.of(names) or [0])
        return {"kind": "figure", "title": title, "svg": figure.svg, "wide": figure.wide, "note": figure.note}
    if kind == "table":
        return {"kind": kind, "title": title, "caption": block.get("caption", ""), **table(block)}
    return {**block, "title": title}


def table(block: Block) -> dict[str, Any]:
    """Columns with their alignment, and cells as text: the numbers of a column with equally many decimals."""
    columns = list(zip(*block["rows"], strict=True)) or [() for _ in block["columns"]]
    cells = [column_cells(column) for column in columns]
    return {
        "columns": [
            {"name": name, "number": bool(column) and all(is_numeric(cell) for cell in column)}
            for name, column in zip(block["columns"], columns, strict=True)
        ],
        "rows": [list(row) for row in zip(*cells, strict=True)],
    }


def is_numeric(cell: Any) -> bool:
    """Whether a cell stands on the right: a number, text that is one (`12 % (10–14)`), or nothing."""
    if isinstance(cell, str):
        return cell in ("", "–") or NUMERIC_TEXT.fullmatch(cell) is not None
    return not isinstance(cell, bool)


def column_cells(column: Sequence[Any]) -> list[str]:
    fractions = [cell for cell in column if isinstance(cell, float) and is_number(cell)]
    decimals = max((decimals_of(value) for value in fractions), default=0)
    return [
        "–" if cell is None
        else f"{cell:,.{decimals}f}" if isinstance(cell, float) and is_number(cell) and decimals <= 4
        else number_text(cell) if not isinstance(cell, str)
        else cell
        for cell in column
    ]  # fmt: skip


def decimals_of(value: float) -> int:
    """The decimals that four significant digits of a number need; more than 4 asks for exponents."""
    text = f"{value:.4g}"
    return 9 if "e" in text else len(text.partition(".")[2])


def number_text(value: Any) -> str:
    """A number for reading."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if 10_000 <= abs(value) < 1e15 else f"{value:.4g}"
    return "–" if value is None else str(value)


# Curves


def curve_groups(members: Sequence[Member], palette: Palette) -> list[dict[str, Any]]:
    """The curves of the trainings, those of one step and one folder overlaid: loss and evaluations first, then the rest."""
    groups: dict[tuple[str, str], list[Member]] = {}
    for member in members:
        if member.curves:
            folder = member.name.partition("/")[0] if "/" in member.name else ""
            groups.setdefault((member.step, folder), []).append(member)
    shown = []
    for (step, folder), group in groups.items():
        metrics = list(dict.fromkeys(metric for member in group for metric in member.curves))
        first = [m for m in metrics if m == "loss" or "bits_per_byte" in m or m.startswith("evaluation/")]
        names = {member.name: member.name.removeprefix(f"{folder}/") for member in group}

        def figure(
            metric: str, group: list[Member] = group, names: dict[str, str] = names, step: str = step
        ) -> Any:
            block = {
                "kind": "lines",
                "title": "",
                "x_label": "step",
                "y_label": metric_label(metric),
                "series": [
                    {
                        "name": names[member.name],
                        "x": list(member.curves[metric][0]),
                        "y": list(member.curves[metric][1]),
                    }
                    for member in group
                    if metric in member.curves
                ],
            }
            return view(block, f"{step}, {', '.join(member.name for member in group)}", palette)

        shown.append(
            {
                "title": folder or ", ".join(names.values()),
                "step": step,
                "links": [(member.name, anchor(member.name)) for member in group],
                "figures": [figure(metric) for metric in first],
                "rest": [figure(metric) for metric in metrics if metric not in first],
            }
        )
    return shown


def metric_label(metric: str) -> str:
    """A metric's name for an axis."""
    if metric in LABELS:
        return LABELS[metric]
    words = metric.removeprefix("evaluation/")
    for known in ("bits_per_byte", "bits per byte"):
        rest = words.removeprefix(known).strip("_/ ")
        if words.startswith(known):
            return "bits per byte" + (f", {rest.replace('_', ' ')}" if rest else "")
    return words.replace("_", " ")


# Lineage and the artifacts


def boxes(members: Sequence[Member], colours: Mapping[str, str]) -> list[Box]:
    """The nodes of the graph; inputs from outside of the run come first."""
    names = {member.name for member in members}
    outside = {
        parent.name: parent for member in members for parent in member.parents if parent.name not in names
    }
    drawn = [
        Box(
            name,
            (),
            (name, "input"),
            f"{name}\nfrom outside of the run\nfingerprint {parent.fingerprint[:12]}",
            "--muted",
            "",
        )
        for name, parent in outside.items()
    ]
    known = set(outside)
    for member in members:
        seconds = member.number("seconds")
        title = [member.name, f"step {member.step}"]
        if member.fingerprint:
            title.append(f"fingerprint {member.fingerprint[:12]}")
        title += [f"{key}: {number_text(value)}" for key, value in flat(member.metrics)[:12]]
        drawn.append(
            Box(
                member.name,
                tuple(dict.fromkeys(parent.name for parent in member.parents if parent.name in known)),
                (member.name, member.step if seconds is None else f"{member.step}, {duration(seconds)}"),
                "\n".join(title),
                colours[member.step],
                anchor(member.name),
            )
        )
        known.add(member.name)
    return drawn


def section(member: Member, members: Sequence[Member], palette: Palette, above: bool) -> dict[str, Any]:
    """What the page says of one artifact; `above`: its blocks stand at the top of the page already."""
    record = member.record
    current = {other.name: other.fingerprint for other in members}
    seconds, memory = member.number("seconds"), member.number("peak_memory_bytes")
    argv, files = record.get("argv"), record.get("files")
    finished = member.number("finished")
    provenance: list[tuple[str, str]] = [("step", str(record["step"]))] if record.get("step") else []
    if record.get("version") is not None:
        provenance.append(("version of the step", str(record["version"])))
    if member.fingerprint:
        provenance.append(("fingerprint", member.fingerprint))
    if finished is not None:
        provenance.append(
            ("finished", datetime.fromtimestamp(finished, UTC).strftime("%Y-%m-%d %H:%M:%S UTC"))
        )
    if isinstance(argv, list):
        provenance.append(("command", shlex.join(str(word) for word in argv)))
    for key in ("code", "environment"):
        provenance += [(name, number_text(value)) for name, value in flat(record.get(key) or {}, key)]
    return {
        "id": anchor(member.name),
        "name": member.name,
        "step": member.step,
        "title": member.report.title if member.report else "",
        "time": "" if seconds is None else duration(seconds),
        "memory": "" if memory is None else size(memory),
        "above": above,
        "blocks": [] if above else views(member, palette),
        "metrics": [(key, number_text(value)) for key, value in flat(member.metrics)],
        "parameters": [(key, number_text(value)) for key, value in flat(record.get("parameters") or {})],
        "parents": [
            {
                "name": parent.name + (f"/{parent.inside}" if parent.inside else ""),
                "link": anchor(parent.name) if parent.name in current else "",
                "fingerprint": parent.fingerprint[:12],
                "stale": parent.name in current and current[parent.name] not in ("", parent.fingerprint),
            }
            for parent in member.parents
        ],
        "provenance": provenance,
        "files": [(str(name), file_hash(value)) for name, value in files.items()]
        if isinstance(files, dict)
        else [],
    }


def file_hash(value: Any) -> str:
    """The first digits of a file's sha256, which may stand alone or in an object."""
    return str(value.get("sha256", "") if isinstance(value, dict) else value)[:12]


def flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested objects under dotted names; lists as one leaf."""
    if isinstance(value, dict):
        return [
            leaf
            for key, item in value.items()
            for leaf in flat(item, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(value, list):
        plain = all(item is None or isinstance(item, str | int | float) for item in value)
        value = (
            ", ".join(number_text(item) for item in value) if plain else json.dumps(value, ensure_ascii=False)
        )
    return [(prefix, value)] if prefix else []


def duration(seconds: float) -> str:
    """Seconds for reading: `0.4 s`, `12 s`, `3 min 05 s`, `2 h 14 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left:02} min" if hours else f"{minutes} min {rest:02} s"


def size(count: float) -> str:
    """Bytes for reading, in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
