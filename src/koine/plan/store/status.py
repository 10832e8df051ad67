"""Decide which artifacts of a plan must be built, with the reasons field by field."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from koine.plan.plan import Node, Plan
from koine.plan.store.publish import check_damage, current_state, record_of

State = Literal["build", "reused", "adopted", "not needed"]
HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Status:
    """The state of one artifact; `reasons` say why a run must build it."""

    state: State
    reasons: tuple[str, ...] = ()


def value_text(value: Any) -> str:
    """Return a value as text for a difference; hashes by their first twelve digits."""
    return value[:12] if isinstance(value, str) and HASH.fullmatch(value) else repr(value)


def differences(old: Any, new: Any, field_name: str = "") -> list[str]:
    """Return `field: old → new` for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines: list[str] = []
        for key in dict.fromkeys([*old, *new]):
            inner = f"{field_name}.{key}" if field_name else str(key)
            lines += differences(old.get(key), new.get(key), inner)
        return lines
    return [] if old == new else [f"{field_name}: {value_text(old)} → {value_text(new)}"]


def why(node: Node) -> list[str]:
    """Return the reasons to run a step: `["new"]`, or each field that changed; empty where up to date.

    Of a step under another name only the names are compared: parameters of two functions have nothing in
    common.

    Raises `UserError` for an artifact that is up to date but damaged, by the sizes of its files.
    """
    old = record_of(node.artifact.path)
    if old is None:
        return ["new"]
    if old["fingerprint"] == node.artifact.fingerprint:
        check_damage(node.artifact.path, old)
        return []
    before = {key: old.get(key) for key in node.identity}
    if before["step"] in node.info.formerly:
        before["step"] = node.identity["step"]
    if before["step"] != node.identity["step"]:
        return [f"was built by another step: {before['step']}, now {node.identity['step']}"]
    return differences(before, node.identity) or ["fingerprint changed"]


def is_adopted(node: Node) -> bool:
    """Return whether the artifact was put in place by `koine adopt`."""
    record = record_of(node.artifact.path)
    if record is None or record["step"] != "adopted":
        return False
    check_damage(node.artifact.path, record)
    return True


def statuses(plan: Plan) -> dict[str, Status]:
    """Return what a run will do about each artifact, in the plan's order.

    An artifact that only adopted artifacts are made from is not needed.
    """
    found: dict[str, Status] = {}
    consumers: dict[str, list[str]] = {name: [] for name in plan.nodes}
    for name, node in plan.nodes.items():
        for parent in node.parents:
            if parent in consumers:
                consumers[parent].append(name)
    exported = {artifact.name for artifact in plan.exports.values()}
    for name, node in reversed(plan.nodes.items()):
        if is_adopted(node):
            found[name] = Status("adopted")
        elif not (reasons := why(node)):
            found[name] = Status("reused")
        elif (
            consumers[name]
            and name not in exported
            and all(found[consumer].state in ("adopted", "not needed") for consumer in consumers[name])
        ):
            found[name] = Status("not needed")
        else:
            current_state(plan.folder, name)
            found[name] = Status("build", tuple(reasons))
    return {name: found[name] for name in plan.nodes}
