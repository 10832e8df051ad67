"""A kill between the two renames of a publication loses no artifact."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from koine.errors import UserError
from koine.plan.store.publish import (
    current_state,
    leftovers,
    mark_of,
    prepare_work,
    publish,
    recover,
    work_folder,
)


def built(run: Path, text: str) -> None:
    work, _ = prepare_work(run, "a/b", text)
    (work / "content").write_text(text)
    publish(run, "a/b", {"fingerprint": text}, current_state(run, "a/b"))


def test_the_earlier_artifact_comes_back_when_the_new_one_did_not_get_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(tmp_path, "old")
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self == work_folder(tmp_path, "a/b"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path, "new")
    monkeypatch.undo()
    assert not (tmp_path / "a/b").exists()
    recover(tmp_path, "a/b")
    assert (tmp_path / "a/b/content").read_text() == "old"
    assert leftovers(tmp_path, "a/b") == []
    # What was built is still there to go on from.
    assert prepare_work(tmp_path, "a/b", "new")[1] == 2
    assert (work_folder(tmp_path, "a/b") / "content").read_text() == "new"


def test_the_earlier_artifact_is_removed_when_the_new_one_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(tmp_path, "old")

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path, "new")
    monkeypatch.undo()
    assert len(leftovers(tmp_path, "a/b")) == 1
    recover(tmp_path, "a/b")
    assert (tmp_path / "a/b/content").read_text() == "new"
    assert leftovers(tmp_path, "a/b") == []


def test_a_work_folder_of_another_fingerprint_is_discarded_even_if_its_removal_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, _ = prepare_work(tmp_path, "a", "first")
    (work / "1").write_text("half")
    (work / "2").write_text("half")

    def killed(path: Path) -> None:
        (path / "1").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare_work(tmp_path, "a", "second")
    monkeypatch.undo()
    assert not mark_of(tmp_path, "a").exists()
    work, attempt = prepare_work(tmp_path, "a", "first")
    assert attempt == 1
    assert list(work.iterdir()) == []


def test_a_damaged_mark_is_named(tmp_path: Path) -> None:
    prepare_work(tmp_path, "a", "first")
    mark_of(tmp_path, "a").write_text("{")
    with pytest.raises(UserError, match="a.json"):
        prepare_work(tmp_path, "a", "first")
