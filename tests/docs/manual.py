"""Reading the manual: its fenced blocks, its links, its headings, the `koine` commands that it shows."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")])

NOT_RUN = re.compile(r"^<!-- not run: (?P<reason>\S.*?) -->$")
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,}) *(?P<language>[\w+-]*)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, text and first line, and why it is not run (None: it is)."""

    language: str
    text: str
    line: int
    not_run: str | None


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    position = 0
    while position < len(lines):
        opening = FENCE.match(lines[position])
        if not opening:
            position += 1
            continue
        end = position + 1
        while end < len(lines) and lines[end].strip() != opening["ticks"]:
            end += 1
        if end == len(lines):
            raise ValueError(f"{page}:{position + 1}: the fence is never closed")
        marker = NOT_RUN.match(lines[position - 1].strip()) if position else None
        indent = len(opening["indent"])
        text = "\n".join(line[indent:] for line in lines[position + 1 : end])
        found.append(Block(opening["language"], text, position + 1, marker["reason"] if marker else None))
        position = end + 1
    return found


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    text = page.read_text(encoding="utf-8")
    for block in blocks(page):
        text = text.replace(block.text, "", 1) if block.text else text
    return text


def links(page: Path) -> Iterator[str]:
    """Targets of the page's relative links, `path#anchor` as written."""
    without_code = re.sub(r"`[^`\n]*`", "", prose(page))
    for match in re.finditer(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", without_code):
        if not re.match(r"[a-z]+:", match[1]):
            yield match[1]


def anchors(page: Path) -> set[str]:
    """Anchors that a forge makes of the page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(page), flags=re.MULTILINE):
        plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        count = 0
        while slug in found:
            count += 1
            slug = f"{slug.rstrip('0123456789').rstrip('-')}-{count}"
        found.add(slug)
    return found


def shell_commands(text: str) -> Iterator[list[str]]:
    """The simple commands of a shell text as words; comments, pipes and redirections cut them."""
    joined = text.replace("\\\n", " ")
    for line in joined.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if word and set(word) <= set("();<>|&"):
                if words:
                    yield words
                words = []
            else:
                words.append(word)
        if words:
            yield words


def koine_arguments(words: list[str]) -> list[str] | None:
    """What follows `koine` (or `python -m koine`, `torchrun ... -m koine`) in a command; None for others."""
    for position, word in enumerate(words):
        if Path(word).name == "koine" and (
            position == 0 or words[position - 1] == "-m" or "=" in words[position - 1]
        ):
            return words[position + 1 :]
    return None


def koine_commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Every `koine` command of a page, in blocks (run or not) and in code spans of the prose, with its place."""
    for block in blocks(page):
        if block.language in ("bash", "sh", "console", "shell"):
            for words in shell_commands(block.text):
                if (arguments := koine_arguments(words)) is not None:
                    yield f"{page.name}:{block.line}", arguments
    for span in re.findall(r"(?<!`)`(koine [^`\n]+)`(?!`)", prose(page)):
        for words in shell_commands(span):
            if (arguments := koine_arguments(words)) is not None:
                yield f"{page.name}: `{span}`", arguments
