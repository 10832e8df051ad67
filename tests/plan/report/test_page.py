"""The report of a run: self-contained, equal to the files, with clear errors."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import warnings
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import networkx
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from koine.cli.report import report
from koine.errors import UserError
from koine.plan.report.blocks import check_block
from koine.plan.report.graph import BOX, GAP, HEIGHT, isotonic, layout, needed_edges
from koine.plan.report.page import covered, write_report
from koine.plan.report.plots import MAX_POINTS, decade_text, draw, thin
from koine.plan.report.text import duration, flat, size, table
from tests.plan.sample_run import SAMPLES, fingerprint, write_sample_run

VOID = {"meta", "link", "br", "wbr", "img", "input", "hr"}


class Page(HTMLParser):
    """Tags opened and closed, attributes and text; a tag closed in the wrong order is an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open and self.open[-1] in ("script", "style") else self.text).append(data)

    def values(self, *names: str) -> list[str]:
        return [value for _, given in self.tags for name in names if (value := given.get(name)) is not None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample_run(tmp_path_factory.mktemp("runs") / "quickstart")


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_the_page_loads_nothing_from_anywhere(html: str, page: Page) -> None:
    for value in page.values("src", "href", "xlink:href", "action", "data", "poster", "srcset", "background"):
        assert value.startswith(("#", "data:image/")), value
    assert all(tag not in ("link", "iframe", "object", "embed", "base", "form") for tag, _ in page.tags)
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert "@import" not in html
    assert "://" not in html, "not even the name of a namespace points outside"


def test_every_link_has_its_target_and_every_id_is_one(page: Page) -> None:
    ids = Counter(page.values("id"))
    # A clip path or marker may come twice only where two plots of one label are the same in content.
    assert [name for name, count in ids.items() if count > 1] == []
    assert {value[1:] for value in page.values("href") if value.startswith("#")} <= ids.keys()


def test_the_page_has_the_answer_first_and_every_artifact(html: str, page: Page) -> None:
    places = [
        html.index(text) for text in ("2.31 times as fast", 'id="training"', 'id="lineage"', 'id="artifacts"')
    ]
    assert places == sorted(places)
    text = " ".join(page.text)
    for _, question, answer in SAMPLES:
        assert question in text
        assert answer in text
    for name in ("tokenizer/universal", "evaluation/cluster/chat", "model-cluster"):
        assert f'id="artifact-{name.replace("/", ".")}"' in html
        assert fingerprint(name) in text
    assert (
        "7 min 47 s" in text
    )  # the sum of the seconds that the fixture records: 11.2 + 2 * (6.4 + ... ) + 0.3
    assert "Burmese" in text
    assert "half" not in {value.removeprefix("artifact-") for value in page.values("id")}, (
        "work in progress is no artifact"
    )


def test_the_page_is_readable_by_a_screen_reader(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes["role"] in ("img", "group")
            assert attributes["aria-label"]
    tags = Counter(tag for tag, _ in page.tags)
    assert tags["table"] == tags["caption"] > 0
    bubbles = [given for _, given in page.tags if (given.get("class") or "").startswith("bubble")]
    assert len(bubbles) == 2 * len(SAMPLES)
    assert all(bubble["dir"] == "auto" for bubble in bubbles)


def test_the_same_run_gives_the_same_bytes_in_another_process(run: Path, html: str, tmp_path: Path) -> None:
    out = tmp_path / "again.html"
    code = "import sys; from pathlib import Path; from koine.plan.report.page import write_report as w; w(Path(sys.argv[1]), Path(sys.argv[2]))"
    subprocess.run(
        [sys.executable, "-c", code, run, out], check=True, env={"PYTHONHASHSEED": "7", "PATH": ""}
    )
    assert out.read_text(encoding="utf-8") == html


def test_a_sample_names_its_language_and_whether_it_is_right(tmp_path: Path) -> None:
    folder = artifact(tmp_path / "run", "a")
    asked = [{"role": "user", "content": "国:日本。通貨は何ですか。"}]
    samples = [
        {"title": "Japanese (ja)", "language": "ja", "messages": asked, "right": True, "answer": "円"},
        {"title": "Thai (th)", "language": "th", "text": "?", "right": False, "answer": "เยน", "note": "Yen"},
        {"text": "neither"},
    ]
    blocks = [
        {"kind": "samples", "samples": samples},
        {"kind": "terms", "terms": [["recall", "known facts"]]},
    ]
    (folder / "report.json").write_text(json.dumps({"title": "t", "blocks": blocks}), encoding="utf-8")
    page = Page(write_report(tmp_path / "run").read_text(encoding="utf-8"))
    # The browser chooses the font of the language: Han letters differ in Chinese and Japanese.
    assert [given.get("lang") for _, given in page.tags if given.get("class") == "text"] == ["ja", "th", None]
    words = [text.strip() for text in page.text if text.strip()]
    assert (words.count("✓ right"), words.count("✗ wrong")) == (1, 1)
    assert "円" not in words, "a right answer stands there once, as the model's"
    assert words[words.index("Right answer:") + 1] == "เยน"
    assert words[words.index("recall") + 1] == "known facts"


def test_a_page_stays_small(html: str) -> None:
    # 27 plots, 3 tables and 22 artifacts; a browser opens it at once.
    assert len(html.encode()) < 1_000_000


def artifact(run: Path, name: str, **record: Any) -> Path:
    folder = run / name
    folder.mkdir(parents=True)
    (folder / "artifact.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def test_fields_that_are_absent_are_left_out(tmp_path: Path) -> None:
    artifact(tmp_path / "run", "bare")
    text = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "bare" in text
    for absent in ("None", "nan", "Finished", "Machine", "Provenance"):
        assert absent not in text


def test_text_of_the_user_is_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>&<b>'
    folder = artifact(tmp_path / "run", "a", step=f"m:{evil}", parameters={evil: evil}, metrics={evil: 1})
    blocks = [
        {"kind": "verdict", "title": evil, "text": evil},
        {"kind": "table", "columns": [evil], "rows": [[evil]], "caption": evil, "title": evil},
        {"kind": "bars", "categories": [evil], "series": [{"name": evil, "values": [1]}], "x_label": evil, "y_label": evil, "title": evil},
        {"kind": "samples", "samples": [{"title": evil, "text": evil, "language": evil, "answer": evil, "right": False, "note": evil}]},
        {"kind": "terms", "title": evil, "terms": [[evil, evil]]},
    ]  # fmt: skip
    (folder / "report.json").write_text(json.dumps({"title": evil, "blocks": blocks}), encoding="utf-8")
    page = Page(write_report(tmp_path / "run").read_text(encoding="utf-8"))
    assert sum("alert" in script for script in page.scripts) == 0
    assert sum(tag == "b" for tag, _ in page.tags) == 0
    assert "".join(page.text).count(evil) >= 10


def test_unfinished_and_outdated_artifacts_are_reported(tmp_path: Path) -> None:
    run = tmp_path / "run"
    artifact(run, "data", step="m:data", fingerprint="new")
    artifact(
        run,
        "model",
        step="m:train",
        fingerprint="b",
        inputs={"d": {"artifact": "data", "inside": "x", "fingerprint": "old"}},
    )
    artifact(run, "gone", step="m:train", fingerprint="c")
    nodes = [
        {"name": "data", "step": "m:data", "status": "built", "parents": []},
        {"name": "model", "step": "m:train", "status": "reused", "parents": ["data"]},
        {"name": "test", "step": "m:test", "status": "failed", "parents": ["model"], "log": "logs/test.log"},
    ]
    (run / "plan.json").write_text(json.dumps({"nodes": nodes}), encoding="utf-8")
    text = " ".join(Page(write_report(run).read_text(encoding="utf-8")).text)
    assert "test: failed, see logs/test.log" in text
    assert "model was made from an earlier version of data" in text
    assert "no longer in the plan: gone" in text


def test_a_copy_that_the_plan_exported_is_not_a_second_artifact(tmp_path: Path) -> None:
    run = tmp_path / "run"
    artifact(run, "chat/model", artifact="chat/model")
    artifact(run, "model", artifact="chat/model")
    text = write_report(run).read_text(encoding="utf-8")
    assert 'id="artifact-chat.model"' in text
    assert 'id="artifact-model"' not in text


def block(kind: str, **keys: Any) -> dict[str, Any]:
    return {"kind": kind, **keys}


AXES = {"x_label": "x", "y_label": "y"}
BAD_BLOCKS = [
    ([], "must be an object with a 'kind'"),
    (block("tabel", columns=[], rows=[]), "did you mean 'table'"),
    (block("text", txet="a"), "has no key 'txet'; did you mean 'text'"),
    (block("verdict", title="a"), "lacks 'text'"),
    (block("text", text=3), "'text' must be text"),
    (block("table", columns=["a", "b"], rows=[[1]]), "row 1 of the table must have 2 cells"),
    (block("table", columns=["a"], rows=[[{}]]), "a cell must be text, a number or null"),
    (block("table", columns=[], rows=[]), "'columns' must be a list of names"),
    (block("lines", series=[], **AXES), "at least one"),
    (block("lines", series=[{"name": "s", "x": [1]}], **AXES), "series 1 must have name, x, y"),
    (block("lines", series=[{"name": "s", "x": [1, 2], "y": [1]}], **AXES), "'y' is not as long as 'x'"),
    (block("lines", series=[{"name": "s", "x": [1], "y": [float("nan")]}], **AXES), "finite numbers"),
    (block("lines", series=[{"name": "s", "x": [0], "y": [1]}], log_x=True, **AXES), "positive numbers only"),
    (block("lines", series=[{"name": "s", "x": [1], "y": [1]}], x_label="x"), "lacks 'y_label'"),
    (block("bars", categories=["a"], series=[{"name": "s", "values": [1, 2]}], **AXES), "1 categories need"),
    (
        block("bars", categories=["a"], series=[{"name": "s", "values": [1], "intervals": [[1]]}], **AXES),
        "[low, high]",
    ),
    (block("heatmap", rows=["a"], columns=["b"], values=[[1, 2]]), "1 rows of 1"),
    (block("heatmap", rows=[], columns=["b"], values=[]), "needs a row and a column"),
    (block("terms", terms=[["a"]]), "[term, meaning]"),
    (block("samples", samples=[{"text": "a", "right": "yes"}]), "true or false"),
    (block("samples", samples=[{"text": "a", "language": 7}]), "are text"),
    (block("samples", samples=[{"title": "a"}]), "either 'text' or 'messages'"),
    (block("samples", samples=[{"messages": [{"role": "usr", "content": ""}]}]), "did you mean 'user'"),
]


@pytest.mark.parametrize(("bad", "line"), BAD_BLOCKS, ids=[line for _, line in BAD_BLOCKS])
def test_a_block_that_is_wrong_is_named_with_its_place(tmp_path: Path, bad: Any, line: str) -> None:
    folder = artifact(tmp_path / "run", "a")
    blocks = [{"kind": "text", "text": "fine"}, bad]
    (folder / "report.json").write_text(json.dumps({"title": "t", "blocks": blocks}), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        write_report(tmp_path / "run")
    assert line in str(caught.value)
    assert "report.json: block 2" in str(caught.value)
    assert not (tmp_path / "run" / "report.html").exists()


def test_folders_that_are_no_run_are_refused(tmp_path: Path) -> None:
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "plan.json").write_text(
        '{"nodes": [{"name": "a"}]}', encoding="utf-8"
    )
    for wrong in ("quikstart", "runs/quickstat"):
        with pytest.raises(UserError, match="no such run folder; did you mean '.*/runs/quickstart'"):
            write_report(tmp_path / wrong)
    with pytest.raises(UserError, match="no such run folder; build one"):
        write_report(tmp_path / "something")
    with pytest.raises(UserError, match="no artifact is finished yet"):
        write_report(tmp_path / "runs" / "quickstart")
    (tmp_path / "quickstart").mkdir()
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path / "quickstart")
    folder = artifact(tmp_path / "quickstart", "a")
    with pytest.raises(UserError, match="an artifact, not a run folder"):
        write_report(folder)
    (folder / "artifact.json").write_text('{"step": ', encoding="utf-8")
    with pytest.raises(UserError, match="not valid JSON"):
        write_report(tmp_path / "quickstart")
    (folder / "artifact.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="not an artifact's record"):
        write_report(tmp_path / "quickstart")


def test_a_damaged_curve_is_named_by_line(tmp_path: Path) -> None:
    folder = artifact(tmp_path / "run", "a")
    (folder / "metrics.jsonl").write_text('{"step": 0, "loss": 1}\n{"step": 1, "lo', encoding="utf-8")
    with pytest.raises(UserError, match="line 2 is not a JSON object with a step"):
        write_report(tmp_path / "run")


def test_the_command_writes_to_the_given_file(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    result = CliRunner().invoke(report, [str(run), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert str(out) in result.output
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(UserError, match="no such folder"):
        write_report(run, tmp_path / "absent" / "page.html")


# The drawing of the graph


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, list[str]]:
    """Names with their parents, parents first."""
    count = draw(st.integers(1, 14))
    names = [f"n{index}" for index in range(count)]
    return {
        name: draw(st.lists(st.sampled_from(names[:index]), unique=True, max_size=4)) if index else []
        for index, name in enumerate(names)
    }


def edges(parents: dict[str, list[str]]) -> set[tuple[str, str]]:
    return {(parent, child) for child, above in parents.items() for parent in above}


@given(graphs())
@settings(max_examples=60, deadline=None)
def test_edges_that_are_drawn_are_the_transitive_reduction(parents: dict[str, list[str]]) -> None:
    graph = networkx.DiGraph(edges(parents))
    assert edges(needed_edges(parents)) == set(networkx.transitive_reduction(graph).edges)


@given(graphs())
@settings(max_examples=60, deadline=None)
def test_boxes_never_overlap_and_children_stand_below(parents: dict[str, list[str]]) -> None:
    parents = needed_edges(parents)
    at, bends = layout(parents)
    places = list(at.values())
    for index, (x0, y0) in enumerate(places):
        assert x0 >= BOX / 2
        for x1, y1 in places[index + 1 :]:
            assert abs(y0 - y1) >= HEIGHT or abs(x0 - x1) >= BOX + GAP - 1e-6
    for (parent, child), between in bends.items():
        heights = [at[parent][1], *(y for _, y in between), at[child][1]]
        assert all(b - a > HEIGHT for a, b in zip(heights, heights[1:], strict=False))


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=8))
def test_isotonic_regression_is_the_nearest_rising_sequence(wanted: list[float]) -> None:
    def distance(values: list[float]) -> float:
        return sum((a - b) ** 2 for a, b in zip(values, wanted, strict=True))

    found = isotonic(wanted)
    assert found == sorted(found)
    best = distance(found)
    # A convex problem: no rising sequence nearby, and none further off, may be nearer.
    chance = random.Random(0)
    for scale in (1e-3, 1.0, 50.0):
        for _ in range(20):
            other = sorted(value + chance.gauss(0, scale) for value in found)
            assert distance(other) >= best - 1e-6 * (1 + best)


# Plots and numbers


def test_thinning_keeps_means_and_extremes() -> None:
    y: list[float | None] = [float(index % 7) for index in range(10 * MAX_POINTS)]
    y[5] = None
    x, mean, low, high = thin(list(range(len(y))), y)
    assert len(x) <= MAX_POINTS
    assert (min(low), max(high)) == (0.0, 6.0)
    assert all(a <= b <= c for a, b, c in zip(low, mean, high, strict=True))
    assert mean[-1] == pytest.approx(
        sum(index % 7 for index in range(len(y) - 9, len(y))) / 9
    )  # the last run is one short


def test_plots_keep_their_text_and_use_no_fixed_colour() -> None:
    words = ["żółw", "中文", "<&>", "3.14159"]
    series = [
        {"name": "s", "values": [1.0, None, 2.0, -1.0], "intervals": [[0.5, 1.5], None, None, None]},
        {"name": "t", "values": [1, 1, 1, 1]},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's own fonts have no Chinese, and need none
        svg = draw(block("bars", categories=words, series=series, **AXES), "label").svg
    page = Page(svg)
    text = "".join(page.text)
    assert all(word in text for word in words), "as text, unshortened"
    assert "font-family" not in svg
    assert "var(--series-1)" in svg
    assert not re.search(r"(?:fill|stroke): ?#[0-9a-f]{6}", svg), "colours are the page's, for light and dark"


@pytest.mark.parametrize("kind", ["bars", "lines", "heatmap"])
def test_plot_labels_are_never_parsed_as_markup(kind: str) -> None:
    r"""A backslash is no group of a regular expression (`\g<1>`), dollars are no formula, an underscore hides no name."""
    odd = [r"\q \1 \g<x>", r"$\frac{a}$ $", "_hidden", "a\nb", "^{x}"]
    if kind == "bars":
        drawn = block(kind, categories=odd, series=[{"name": one, "values": [1] * 5} for one in odd], **AXES)
    elif kind == "lines":
        drawn = block(kind, series=[{"name": one, "x": [1, 2], "y": [1, 2]} for one in odd], **AXES)
    else:
        drawn = block(kind, rows=odd, columns=odd, values=[[1.0] * 5] * 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = draw(drawn, r"title \q $x$ \g<0> _a").svg
    text = "".join(Page(svg).text)
    assert all(one.replace("\n", "") in text.replace("\n", "") for one in odd)
    assert r'aria-label="title \q $x$ \g&lt;0&gt; _a"' in svg


def test_a_missing_value_is_not_a_bar_of_zero() -> None:
    def bars(values: list[float | None]) -> int:
        svg = draw(
            block("bars", categories=["a", "b"], series=[{"name": "", "values": values}], **AXES), "l"
        ).svg
        return svg.count("fill:var(--series-1)")

    assert bars([1.0, 0.0]) == 2
    assert bars([1.0, None]) == 1


@pytest.mark.parametrize(
    "given_block",
    [
        block("heatmap", rows=["a"], columns=["b"], values=[[None]]),
        block("heatmap", rows=["a", "b"], columns=["long name of a column", "c"], values=[[1, 1], [1, None]]),
        block("lines", series=[{"name": "", "x": [], "y": []}], **AXES),
        block("lines", series=[{"name": "s", "x": [1], "y": [1e-9]}], log_x=True, log_y=True, **AXES),
        block(
            "bars",
            categories=["$a$"],
            series=[{"name": "_hidden", "values": [None]}],
            x_label="$x",
            y_label="y_1$",
        ),
    ],
)
def test_plots_of_extreme_values_are_drawn(given_block: dict[str, Any]) -> None:
    check_block(given_block, "here")
    svg = draw(given_block, "label").svg
    Page(svg)
    if given_block["kind"] == "bars":
        assert "$a$" in svg
        assert "_hidden" in svg


def test_numbers_are_formatted_for_people() -> None:
    assert [decade_text(value) for value in (0.05, 200.0, 1e6, 2e-7)] == ["0.05", "200", "10⁶", "2·10⁻⁷"]
    assert [duration(seconds) for seconds in (0.04, 0.06, 9.96, 59.6, 185, 8040)] == [
        "< 0.1 s",
        "0.1 s",
        "10 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 14 min",
    ]
    assert [size(count) for count in (12, 2048, 5 * 2**20, 3 * 2**29)] == [
        "12 B",
        "2 KiB",
        "5 MiB",
        "1.5 GiB",
    ]
    assert covered([(0, 2), (1, 3), (10, 11)]) == 4
    assert flat({"a": {"b": [1, 2], "c": [{"d": 1}]}, "e": None, "f": []}) == [
        ("a.b", "1, 2"),
        ("a.c", '[{"d": 1}]'),
        ("e", None),
        ("f", "–"),
    ]
    shown = table(
        {
            "columns": ["n", "x", "p"],
            "rows": [["de", 1.5, "12% (10%–14%)"], ["fr", 2.125, None], ["3", None, "–"]],
        }
    )
    assert [column["number"] for column in shown["columns"]] == [False, True, True]
    assert [row[1] for row in shown["rows"]] == ["1.500", "2.125", "–"]
