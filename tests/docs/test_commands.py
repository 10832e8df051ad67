"""The manual is true: its commands run, in order, from a fresh folder; its links lead somewhere."""

from __future__ import annotations

import linecache
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from koine.cli.main import VERBS, cli

from . import manual

BLOCK_TIMEOUT_SECONDS = 240


def page_name(page: Path) -> str:
    return str(page.relative_to(manual.ROOT))


def run_bash(block: manual.Block, where: Path) -> None:
    """Run a block as a user would, with this environment's `koine` first on PATH and no network for models."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
        "COLUMNS": "80",
    }
    process = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=where,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BLOCK_TIMEOUT_SECONDS,
        check=False,
    )
    assert process.returncode == 0, f"line {block.line}:\n{block.text}\n\n{process.stdout[-4000:]}"


def run_python(block: manual.Block, page: Path, namespace: dict[str, Any]) -> None:
    """Run a block in the namespace that the page's blocks share; its lines show in a traceback."""
    name = f"<{page.name}:{block.line}>"
    linecache.cache[name] = (len(block.text), None, block.text.splitlines(keepends=True), name)
    exec(compile(block.text, name, "exec"), namespace)


@pytest.mark.parametrize("page", manual.PAGES, ids=page_name)
def test_the_blocks_of_a_page_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    namespace: dict[str, Any] = {"__name__": "manual"}
    for block in manual.blocks(page):
        if block.not_run is None and block.language == "bash":
            run_bash(block, tmp_path)
        elif block.not_run is None and block.language == "python":
            run_python(block, page, namespace)


@pytest.mark.parametrize("page", manual.PAGES, ids=page_name)
def test_no_merge_left_its_markers(page: Path) -> None:
    assert not re.findall(r"^(?:<{7}|>{7}|={7})(?: .*)?$", page.read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("page", manual.PAGES, ids=page_name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    dead = []
    for link in manual.links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (
            anchor and target.suffix == ".md" and anchor not in manual.anchors(target)
        ):
            dead.append(link)
    assert dead == []


def unknown_part(arguments: list[str]) -> str | None:
    """The first word that names no verb or option of `koine`, following its groups down; None where all exist."""
    command: click.Command = cli
    context = click.Context(cli, info_name="koine")
    words = iter(arguments)
    for word in words:
        known = {
            name
            for parameter in command.get_params(context)
            for name in (*parameter.opts, *parameter.secondary_opts)
        }
        if re.match(r"--?[A-Za-z]", word):
            if word.partition("=")[0] not in known:
                return word
        elif isinstance(command, click.Group) and not word.startswith("."):
            found = command.get_command(context, word)
            if found is None:
                # A placeholder such as VERB stands for any of them.
                return None if word.isupper() else word
            command = found
            context = click.Context(command, info_name=word, parent=context)
    return None


@pytest.mark.parametrize(
    "page", [page for page in manual.PAGES if page.name != "bad-inputs.md"], ids=page_name
)
def test_every_command_shown_exists_with_its_options(page: Path) -> None:
    wrong = [
        f"{place}: {part} in koine {' '.join(arguments)}"
        for place, arguments in manual.koine_commands(page)
        if (part := unknown_part(arguments)) is not None
    ]
    assert wrong == []


def test_the_manual_is_found_and_mentions_every_verb() -> None:
    shown = {
        arguments[0] for page in manual.PAGES for _, arguments in manual.koine_commands(page) if arguments
    }
    assert set(VERBS) - shown == set()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["doctor", "--measure"], None),
        (["doctor", "--mesure"], "--mesure"),
        (["doctr"], "doctr"),
        (["--help"], None),
    ],
)
def test_the_check_of_commands_sees_a_wrong_word(arguments: list[str], expected: str | None) -> None:
    assert unknown_part(arguments) == expected


def test_reading_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b` c\n\nUse `koine doctor --measure` or [this](#a-b-c).\n\n"
        "<!-- not run: long -->\n```bash\nmake\n```\n\n```bash\nA=1 koine data \\\n  sample | head # no\n```\n"
    )
    first, second = manual.blocks(page)
    assert (first.not_run, first.text, second.not_run) == ("long", "make", None)
    assert list(manual.links(page)) == ["#a-b-c"]
    assert manual.anchors(page) == {"a-b-c"}
    assert [arguments for _, arguments in manual.koine_commands(page)] == [
        ["data", "sample"],
        ["doctor", "--measure"],
    ]
