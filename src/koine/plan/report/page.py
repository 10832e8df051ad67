"""Write one self-contained HTML file about a run: results, training curves, samples, lineage, artifacts."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from koine.errors import UserError
from koine.files import write_atomically
from koine.plan.report.blocks import Block, check_block, is_number
from koine.plan.report.graph import Box, draw_graph
from koine.plan.report.plots import SERIES, draw
from koine.plan.report.run import Member, Parent, Run, read_run
from koine.plan.report.text import duration, flat, metric_label, number_text, size, table

PLOTS = ("lines", "bars", "heatmap")


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of the run folder `run` to `out` (by default `run/report.html`) and return its path.

    The page depends on the run's files only: written twice, it has the same bytes.

    Raises `UserError` where `run` is no run folder, a record or a report in it is damaged, or `out` cannot be
    a file.
    """
    run = Path(run)
    content = read_run(run)
    out = run / "report.html" if out is None else Path(out)
    if out.is_dir():
        raise UserError("a folder", where=out, hint="give the file to write, such as report.html")
    if not out.parent.is_dir():
        raise UserError("no such folder", where=out.parent, hint="make it first, or choose another --out")
    write_atomically(out, render(run.resolve().name, content))
    return out


@dataclass
class Palette:
    """Colours by name of a series: one name has one colour on the whole page, as far as possible."""

    places: dict[str, int] = field(default_factory=dict)

    def of(self, names: Sequence[str]) -> list[int]:
        """Return palette indices for the series of one figure, different ones if there are enough."""
        if len(names) == 1 and names[0] not in self.places:
            return [0]  # nothing to tell apart
        chosen: list[int] = []
        for name in names:
            place = self.places.setdefault(name, len(self.places)) % len(SERIES)
            if place in chosen and len(chosen) < len(SERIES):
                place = next(other for other in range(len(SERIES)) if other not in chosen)
            chosen.append(place)
        return chosen


def render(name: str, run: Run) -> str:
    """Return the page of a run."""
    members = run.members
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
    steps = list(dict.fromkeys([*(m.step for m in members), *(node.step for node in run.unfinished)]))
    colours = {step: f"--series-{index % len(SERIES) + 1}" for index, step in enumerate(steps)}
    return page(
        name=name,
        facts=facts(members),
        answers=answers,
        curves=curves,
        warnings=warnings(run),
        graph=draw_graph(boxes(run, colours)),
        steps=colours,
        artifacts=[section(member, run, palette, member in answering) for member in members],
    )


def page(**content: Any) -> str:
    """Return the filled-in template."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        resources.files("koine.plan.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    )
    return template.render(**content)


def write_page(
    out: Path, *, name: str, sections: Sequence[tuple[str, Sequence[Block]]], facts: Sequence[tuple[str, str]]
) -> None:
    """Write a page without a run: titled `sections` of blocks, below a header of `facts`.

    Raises `UserError` where a block is invalid (`check_block`), or `out` cannot be a file.
    """
    if out.is_dir():
        raise UserError("a folder", where=out, hint="give the file to write, such as report.html")
    for title, blocks in sections:
        for number, block in enumerate(blocks, 1):
            check_block(block, f"{title}, block {number}")
    palette = Palette()
    answers = [
        {
            "title": title,
            "name": title,
            "blocks": [view(b, f"{title}, block {n}", palette) for n, b in enumerate(blocks, 1)],
        }
        for title, blocks in sections
    ]
    write_atomically(
        out,
        page(
            name=name,
            facts=list(facts),
            answers=answers,
            curves=[],
            warnings=[],
            graph="",
            steps={},
            artifacts=[],
        ),
    )


def has_verdict(member: Member) -> bool:
    return member.report is not None and any(block["kind"] == "verdict" for block in member.report.blocks)


def anchor(name: str) -> str:
    """Return the id of an artifact's section: its name, with `.` for `/`."""
    return "artifact-" + name.replace("/", ".")


# Header


def facts(members: Sequence[Member]) -> list[tuple[str, str]]:
    """Return the facts in the page's header; facts that no artifact recorded are left out."""
    spans = [
        (start, end)
        for member in members
        if (start := member.number("started")) is not None and (end := member.number("finished")) is not None
    ]
    finished = [value for member in members if (value := member.number("finished")) is not None]
    seconds = [value for member in members if (value := member.number("seconds")) is not None]
    memory = [value for member in members if (value := member.number("peak_memory_bytes")) is not None]
    found: list[tuple[str, str]] = []
    if finished:
        found.append(
            ("Finished", datetime.fromtimestamp(max(finished), UTC).strftime("%-d %B %Y, %H:%M UTC"))
        )
    if spans:
        found.append(("Time", duration(covered(spans))))
    if seconds and not (spans and abs(sum(seconds) - covered(spans)) < 0.02 * sum(seconds)):
        found.append(("Sum of all steps", duration(sum(seconds))))
    found.append(("Artifacts", str(len(members))))
    if memory:
        found.append(("Peak memory of a step", size(max(memory))))
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


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Return the time covered by at least one span: parallel steps count once, pauses not at all."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def warnings(run: Run) -> list[str]:
    """Return the warnings at the top of the page: unfinished, outdated and removed artifacts."""
    found = []
    have = {member.name for member in run.members}
    for node in run.unfinished:
        text = f"{node.name}: {node.status}" + (
            f", see {node.log}" if node.log and node.status == "failed" else ""
        )
        found.append(text + (" (this page shows its earlier result)" if node.name in have else ""))
    current = {member.name: member.fingerprint for member in run.members}
    for member in run.members:
        stale = [parent.name for parent in member.parents if is_stale(parent, current)]
        if stale:
            found.append(f"{member.name} was made from an earlier version of {', '.join(stale)}")
    if run.former:
        found.append(f"no longer in the plan: {', '.join(sorted(run.former))}")
    return found


def is_stale(parent: Parent, current: Mapping[str, str]) -> bool:
    """Return whether the parent has been rebuilt since."""
    return parent.name in current and current[parent.name] not in ("", parent.fingerprint)


def machine(member: Member) -> str:
    """Return the machine of an artifact in a few words."""
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
    """Return the blocks of an artifact in the form of the template."""
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
        note = " ".join(text for text in (block.get("caption", ""), figure.note) if text)
        return {"kind": "figure", "title": title, "svg": figure.svg, "wide": figure.wide, "note": note}
    if kind == "table":
        return {"kind": kind, "title": title, "caption": block.get("caption", ""), **table(block)}
    if kind == "samples":
        empty = {**dict.fromkeys(("title", "language", "answer", "note"), ""), "right": None}
        return {"kind": kind, "title": title, "samples": [{**empty, **sample} for sample in block["samples"]]}
    return {**block, "title": title}


# Curves


def curve_groups(members: Sequence[Member], palette: Palette) -> list[dict[str, Any]]:
    """Return the training curves, overlaid by step and folder: loss and evaluations first, then the rest."""
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


# Lineage and the artifacts


def boxes(run: Run, colours: Mapping[str, str]) -> list[Box]:
    """Return the nodes of the graph; inputs from outside the run come first."""
    order = run.order
    outside = {
        parent.name: parent for member in run.members for parent in member.parents if parent.name not in order
    }
    drawn = {
        name: Box(
            name,
            (),
            "input",
            f"{name}\nfrom outside the run\nfingerprint {parent.fingerprint[:12]}",
            "--muted",
        )
        for name, parent in outside.items()
    }
    members = {member.name: member for member in run.members}
    unfinished = {node.name: node for node in run.unfinished}
    for name in order:
        if name in members:
            member, seconds = members[name], members[name].number("seconds")
            above: Sequence[str] = [parent.name for parent in member.parents]
            title = [name, f"step {member.step}"]
            if member.fingerprint:
                title.append(f"fingerprint {member.fingerprint[:12]}")
            title += [f"{key}: {number_text(value)}" for key, value in flat(member.metrics)[:12]]
            text = member.step if seconds is None else f"{member.step}, {duration(seconds)}"
            step, link = member.step, anchor(name)
        else:
            node = unfinished[name]
            above, step, text, link = node.parents, node.step, node.status, ""
            title = [name, f"step {step}", node.status]
        parents = tuple(dict.fromkeys(parent for parent in above if parent in drawn))
        drawn[name] = Box(name, parents, text, "\n".join(title), colours[step], link)
    return list(drawn.values())


def section(member: Member, run: Run, palette: Palette, above: bool) -> dict[str, Any]:
    """Return the section of one artifact; above: its blocks are at the top of the page already."""
    record = member.record
    current = {other.name: other.fingerprint for other in run.members}
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
    if (attempts := member.number("attempts")) is not None and attempts > 1:
        provenance.append(("attempts", f"{attempts:.0f}"))
    if expected := expectation(record.get("estimate")):
        provenance.append(("estimate", expected))
    for key in ("code", "environment"):
        provenance += [
            ("uncommitted changes" if name == "dirty" else name, number_text(value))
            for name, value in flat(record.get(key) or {})
            if value is not None
        ]
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
                "stale": is_stale(parent, current),
            }
            for parent in member.parents
        ],
        "provenance": provenance,
        "files": [(str(name), file_hash(value)) for name, value in files.items()]
        if isinstance(files, dict)
        else [],
    }


def expectation(estimate: Any) -> str:
    """Return the step's estimate in words; empty where there was none."""
    words = []
    if isinstance(estimate, dict) and is_number(estimate.get("seconds")):
        words.append(duration(estimate["seconds"]))
    if isinstance(estimate, dict) and is_number(estimate.get("memory_bytes")):
        words.append(size(estimate["memory_bytes"]))
    return ", ".join(words)


def file_hash(value: Any) -> str:
    """Return the first digits of a file's sha256, which may be text or an object."""
    return str(value.get("sha256", "") if isinstance(value, dict) else value)[:12]
