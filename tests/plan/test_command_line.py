"""The command line in a run's record has no passwords; commands for the user work in their shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from koine.plan.command_line import recorded_command, shown_path


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("quickstart", "quickstart"),
        ("url=https://me:pass@word@host/v1", "url=https://***@host/v1"),
        ("https://host/v1?api_key=abc&n=1", "https://host/v1?api_key=***&n=1"),
        ("https://host/v1?n=1&access-token=abc#x", "https://host/v1?n=1&access-token=***#x"),
        ("https://host/a@b", "https://host/a@b"),
        ("tokenizer=mine", "tokenizer=mine"),
        ("", ""),
    ],
)
def test_passwords_in_addresses_are_masked(word: str, kept: str) -> None:
    assert recorded_command([word]) == [kept]


def test_the_command_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["koine", "run", "x", "--set", "url=http://u:p@h"])
    assert recorded_command() == ["koine", "run", "x", "--set", "url=http://***@h"]


PROGRAM = """\
import sys
from pathlib import Path
from koine.plan.command_line import shell_command
print(shell_command(*sys.argv[1:-1], Path(sys.argv[-1])))
"""


def started_as(place: Path, line: str, *, on_path: bool) -> str:
    """Return the command that a `koine` in `.venv/bin` prints, started by a line of a shell in `place`."""
    script = place / ".venv" / "bin" / "koine"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(f"#!{sys.executable}\n{PROGRAM}")
    script.chmod(0o755)
    path = "/usr/bin:/bin" + (f":{script.parent}" if on_path else "")
    environment = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        ["/bin/sh", "-c", line], cwd=place, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_commands_begin_as_the_shell_can_start_them(tmp_path: Path) -> None:
    outside = started_as(tmp_path, ".venv/bin/koine chat runs/x/model", on_path=False)
    assert outside == ".venv/bin/koine chat runs/x/model"
    assert started_as(tmp_path, "koine chat runs/x/model", on_path=True) == "koine chat runs/x/model"
    # Found by the shell, though started by its path
    assert started_as(tmp_path, ".venv/bin/koine chat m", on_path=True) == "koine chat m"
    absolute = started_as(tmp_path, f"cd /usr; {tmp_path}/.venv/bin/koine chat m", on_path=False)
    assert absolute == f"{tmp_path}/.venv/bin/koine chat m"
    assert started_as(tmp_path, "cd .venv/bin; ./koine chat m", on_path=False) == "./koine chat m"


def test_what_was_printed_can_be_typed(tmp_path: Path) -> None:
    """Words that the shell would split, and folders with spaces, are quoted."""
    place = tmp_path / "my folder"
    place.mkdir()
    first = started_as(
        place, "cd /usr; '" + str(place) + "/.venv/bin/koine' chat --once \"Don't?\" m", on_path=False
    )
    assert started_as(place, first, on_path=False).endswith("""chat --once 'Don'"'"'t?' m""")


def test_a_module_or_program_names_the_command_beside_the_interpreter(tmp_path: Path) -> None:
    line = f"{sys.executable} -c '{PROGRAM}' chat m"
    beside = Path(sys.executable).with_name("koine")
    expected = str(beside) if beside.exists() else f"{sys.executable} -m koine"
    assert started_as(tmp_path, line, on_path=False) == f"{expected} chat m"


def test_paths_below_the_working_directory_are_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert shown_path(tmp_path / "here" / "runs" / "x") == "runs/x"
    assert shown_path(Path("runs/x")) == "runs/x"
    assert shown_path(Path("../runs/x")) == "../runs/x"
    assert shown_path(tmp_path / "runs" / "x") == str(tmp_path / "runs" / "x")
