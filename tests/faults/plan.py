"""Select and order the cases: every group is covered evenly in any given time."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

from tests.faults import corruption, hostile, links
from tests.faults.cases import Call, failures
from tests.faults.stages import BY_NAME, STAGES, Stage

Order = dict[str, Any]
ALWAYS = ("rename", "unlink", "mkdir", "link")
PAIRS = (
    ("tokenizer-train", "data-tokenize"),
    ("data-tokenize", "tokenizer-train"),
    ("merge-linear", "merge-ties"),
    ("upcycle-btx", "merge-linear"),
    ("merge-linear", "upcycle-btx"),
    ("train-pretrain", "merge-linear"),
    ("merge-linear", "train-pretrain"),
    ("evaluate", "merge-search"),
    ("data-sample", "tokenizer-train"),
)
"""Different commands that write to the same place."""


@dataclass(frozen=True)
class Known:
    """Figures of a stage's undisturbed run."""

    calls: list[Call]
    seconds: float
    bytes: int


def group(kind: str, cases: list[Order], *, first: int = 0) -> list[tuple[float, Order]]:
    """Return a group's cases with their places in the whole order.

    The first ones come at once, the others are spread over the time. If time ends early, the tried ones are
    spread over the whole group.
    """
    spread = sorted(
        range(len(cases)), key=lambda index: (_reversed(index, max(1, len(cases)).bit_length()), index)
    )
    ordered = [cases[index] for index in spread]
    return [
        (0.0 if place < first else place / len(cases), {**case, "group": kind})
        for place, case in enumerate(ordered)
    ]


def _reversed(index: int, bits: int) -> int:
    return int(format(index, f"0{bits}b")[::-1], 2)


def of_stage(stage: Stage, known: Known) -> list[tuple[float, Order]]:
    """Yield kills, failing calls, foreign folders and second writers at the calls of one stage."""
    name, calls = stage.name, known.calls
    always = [call for call in calls if call.kind in ALWAYS]
    others = [call for call in calls if call.kind not in ALWAYS]
    kills = [{"case": "kill", "stage": name, "at": call.number} for call in always]
    found = group("kill", kills, first=len(kills))
    found += group("kill", [{"case": "kill", "stage": name, "at": call.number} for call in others], first=2)
    torn = [call for call in calls if call.kind == "write"]
    found += group(
        "kill", [{"case": "kill", "stage": name, "at": call.number, "torn": True} for call in torn], first=1
    )
    by_errno: dict[str, list[Order]] = {}
    for call, error in failures(calls):
        by_errno.setdefault(f"{error} {call.kind}", []).append(
            {"case": "fail", "stage": name, "at": call.number, "errno": error}
        )
    for cases in by_errno.values():
        found += group("fail", cases, first=1)
    found += group(
        "writers", [{"case": "appear", "stage": name, "at": call.number} for call in always], first=4
    )
    found += group("writers", [{"case": "appear", "stage": name, "at": call.number} for call in others])
    twice = [
        0,
        *(call.number for call in always),
        *(call.number for call in others[:: max(1, len(others) // 12)]),
    ]
    found += group(
        "writers", [{"case": "two", "stage": name, "other": name, "at": number} for number in twice], first=3
    )
    pages = sorted(
        {max(1, known.bytes * part // 100 // 4096) for part in (0, 5, 15, 30, 45, 60, 75, 90, 100, 110, 140)}
    )
    found += group("full disk", [{"case": "disk", "stage": name, "pages": count} for count in pages], first=3)
    limits = sorted({2048, 4096, 8192, *(max(2048, known.bytes * part // 100) for part in (10, 30, 50, 80))})
    found += group("full disk", [{"case": "limit", "stage": name, "bytes": size} for size in limits], first=2)
    if stage.begins_as is None:
        whats = [] if stage.shape == "run" else list(links.OUTPUTS)
        found += group("links", [{"case": "output", "stage": name, "what": what} for what in whats], first=8)
        reads = [
            {"case": "read", "stage": name, "what": what, "which": which}
            for which in links.inputs_of(stage)
            for what in links.INPUTS
            if not which.endswith(".py")
        ]
        found += group("links", reads)
    return found


def of_pairs(known: dict[str, Known]) -> list[tuple[float, Order]]:
    """Yield pairs of different commands with one `--out`."""
    found = []
    for first, second in PAIRS:
        if first in known and second in known:
            at = [0, *(call.number for call in known[first].calls if call.kind in ALWAYS)]
            orders = [{"case": "two", "stage": first, "other": second, "at": number} for number in at]
            found += group("writers", orders, first=2)
    return found


def of_folders() -> list[tuple[float, Order]]:
    """Yield folders of data with odd contents, and moved artifacts."""
    orders = [
        {"case": "data", "what": what, "command": command}
        for what in links.DATA_FOLDERS
        for command in links.FOLDER_COMMANDS
    ]
    return group("links", orders, first=24) + group(
        "links", [{"case": "moved", "what": what} for what in links.MOVES], first=99
    )


def of_server(port: int) -> list[tuple[float, Order]]:
    """Yield every behaviour of the hostile server."""
    return group(
        "hostile server",
        [{"case": "hostile", "what": trick, "port": port} for trick in hostile.TRICKS],
        first=999,
    )


def of_damage(files: dict[str, list[tuple[str, int]]], count: int) -> list[tuple[float, Order]]:
    """Yield flipped bits and truncation in all files that readers read; `count` per file."""
    found = []
    for reader in corruption.READERS:
        for file, size in files.get(reader.name, []):
            names = [
                name
                for name, _ in corruption.spoils(size, f"{reader.name} {file}", int(count * reader.weight))
            ]
            orders = [{"case": "spoil", "reader": reader.name, "file": file, "what": name} for name in names]
            found += group("damage", orders, first=3)
    return found


def in_order(found: list[tuple[float, Order]]) -> list[Order]:
    """Return all cases in a fixed order: the first ones of each group, then slow and fast ones mixed."""

    def key(entry: tuple[float, Order]) -> tuple[float, int]:
        return entry[0], zlib.crc32(repr(sorted(entry[1].items(), key=str)).encode())

    return [order for _, order in sorted(found, key=key)]


def again(order: Order) -> str:
    """Return the command that runs one case alone."""
    place = order.get("stage") or order.get("reader") or ""
    words = {
        "repeat": f"{place} --repeat",
        "kill": f"{place} --{'torn' if order.get('torn') else 'kill'}-at {order.get('at')}",
        "fail": f"{place} --fail-at {order.get('at')} --errno {order.get('errno')}",
        "appear": f"{place} --appear-at {order.get('at')}",
        "two": f"{place} --two-at {order.get('at')} --other {order.get('other')}",
        "disk": f"{place} --pages {order.get('pages')}",
        "limit": f"{place} --bytes {order.get('bytes')}",
        "output": f"{place} --output {order.get('what')}",
        "read": f"{place} --read {order.get('what')} --which {order.get('which')}",
        "data": f"data --what {order.get('what')} --command {order.get('command')}",
        "moved": f"moved --what {order.get('what')}",
        "spoil": f"damage --reader {place} --file {order.get('file')} --what {order.get('what')}",
        "hostile": f"hostile --what {order.get('what')}",
    }
    return f"python -m tests.faults {words[order['case']]}"


def needed(names: list[str]) -> list[Stage]:
    """Return the stages that these need, in an order in which each finds its initial files."""
    wanted = [stage for stage in STAGES if stage.name in names]
    for stage in list(wanted):
        if stage.begins_as is not None and BY_NAME[stage.begins_as] not in wanted:
            wanted.insert(0, BY_NAME[stage.begins_as])
    return sorted(
        wanted,
        key=lambda stage: (
            stage.begins_as is not None or "@halfway" in stage.command or "@finished" in stage.command
        ),
    )
