"""`--json` of every command: one JSON object on standard output; with `--quiet`, nothing on standard error."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from koine.cli.main import cli
from koine.combine.merging.methods import METHODS
from koine.errors import UserError
from tests.bad_inputs import worlds

from .test_commands import LEAVES, WITHOUT_ANSWER

PLAN = """
from pathlib import Path
from koine.plan import Plan, step

@step(version=1)
def write(*, text: str, out: Path) -> None:
    (out / "text").write_text(text)

def words(plan: Plan, *, text: str = "a", rate: float = 0.25) -> None:
    plan.step(write, name="one", text=text)
"""
CLOSING = """
@step(version=1)
def judge(*, out: Path) -> None:
    from koine.files import write_json
    block = {"kind": "verdict", "title": "was it faster?", "text": "Yes: twice."}
    write_json(out / "report.json", {"title": "Judgement", "blocks": [block]})

def judged(plan: Plan) -> None:
    plan.closing(lambda run, one: f"The page: {run.path(run.folder / 'report.html')}\\nmore: {one.name}",
                 one=plan.step(judge, name="one"))
"""
ASKED = (
    '{"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}], '
    '"answer": "2", "language": "en", "domain": "sums"}\n'
)
TRAINING = "--data tokens --steps 2 --batch-size 2 --sequence-length 32 --tokenizer tokenizer"
EXPERTS = "--seed-model model --experts branch --out new"

# command -> a small run of it, and keys of its answer
COMMANDS: dict[str, tuple[str, ...]] = {
    "align reward --model model --data pairs --evaluate-pairs pairs --steps 2 --batch-size 2 --sequence-length 64 --out new": (
        "written", "steps", "best", "evaluation",
    ),
    "adopt tokens --run r --name one": ("written",),
    "align watch model branch --data pairs.jsonl --limit 1 --max-new-tokens 4 --out new": ("written", "verdict", "figures"),
    "align score completions.jsonl --reward answer --out new.jsonl": ("scored", "mean", "failures", "written"),
    "align online --model model --prompts prompts.jsonl --reward length:most=2 --loss rloo:beta=0 --k 2 --prompts-per-step 1 "
    "--steps 1 --max-new-tokens 4 --out new": ("written", "rounds"),
    "align online --model model --prompts prompts.jsonl --reward length:most=2 --loss rloo --out new --dry-run": ("completions",),
    "align revise --model model --prompts prompts.jsonl --revision Again --max-new-tokens 4 --out new.jsonl": (
        "answers", "changed", "written",
    ),
    "align inspect pairs --model model --held-out pairs --device cpu --no-identify-languages": (
        "kind", "languages", "total", "displacing",
    ),
    "data sample --languages de --documents-per-language 5 --questions-per-language 5 --code-bytes 0 --out new": (
        "languages", "code", "written",
    ),
    "data tokenize text.jsonl --tokenizer tokenizer --out new": ("languages", "formats", "left_out", "bad_records", "written"),
    "data inspect text.jsonl": ("groups", "formats", "left_out", "bad_records", "bad_examples"),
    "data inspect pairs.jsonl --format preference --take rejected": ("groups", "formats"),
    "data at-step trained 0": ("step", "slices"),
    "doctor": ("versions", "support", "machine", "packages", "extras"),
    "doctor --constraints": ("constraints",),
    "evaluate model --data text.jsonl": ("overall", "languages"),
    "evaluate model --questions asked.jsonl --training-questions asked.jsonl": ("questions",),
    "extend mixture --expert third=branch --reset-router --out new": ("experts", "parameters", "written"),
    "lineage r/one": ("name", "fingerprint", "parents"),
    "merge linear model branch --weights 0.5,0.5 --out new": ("tensors", "config", "written"),
    "merge linear model branch --out new --dry-run": ("estimate", "threads"),
    "merge search model branch --data text.jsonl --limit 2 --parts 1 --rounds 0": ("best", "front", "trials"),
    "model describe": ("presets",),
    "model describe koine-8m": ("parameters", "flops_per_token", "cache_bytes"),
    "model export exportable --format gguf --out new.gguf": ("written", "bytes"),
    "model export checkpoint --format safetensors --out new": ("written",),
    "model merge-adapter model adapter --out new": ("written",),
    "model import gguf/model.gguf --out new": ("architecture", "tensors", "bytes", "vocabulary", "written"),
    "model import gguf/model.gguf --out new --dry-run": ("architecture", "quantisation", "dtype", "chat_template"),
    "report run --out page.html": ("written",),
    "run": ("recipes",),
    "run plan.py:words --list-parameters": ("plan", "parameters"),
    "run plan.py:words --dry-run": ("artifacts", "seconds", "critical_path", "disk_bytes", "without_estimate"),
    "run plan.py:words": ("run", "seconds", "artifacts", "stages", "verdicts", "report", "notes"),
    "tokenizer adapt model --tokenizer tokenizer --out new": ("tokens", "reversible", "written"),
    "tokenizer extend tokenizer --data text.jsonl --tokens 3 --out new": ("added_tokens", "measures", "written"),
    "tokenizer measure tokenizer --data text.jsonl": ("tokenizer",),
    "tokenizer predict tokenizer --data text.jsonl --primary en": ("languages",),
    "tokenizer train --data text.jsonl --vocab-size 300 --min-frequency 2 --out new": ("tokens", "written"),
    "tokenizer weights --data text.jsonl": ("scheme", "languages"),
    f"train pretrain --preset koine-0.5m {TRAINING} --out new": ("written", "steps", "best"),
    f"train pretrain --preset koine-0.5m {TRAINING} --out new --dry-run": ("parameters", "flops", "seconds", "disk_bytes", "basis"),
    "upcycle btx " + EXPERTS: ("experts", "active_parameters", "written"),
    "upcycle bam " + EXPERTS: ("experts", "active_parameters", "written"),
    "upcycle nexus --router linear " + EXPERTS: ("experts", "active_parameters", "written"),
}  # fmt: skip
LIKE_ANOTHER = {
    ("train", "sft"),
    ("align", "train"),
    ("merge", "cross-modal"),
    *(("merge", name) for name in METHODS),
}
"""Commands that print by the code of one above, or whose inputs are large."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that the commands read."""
    from tests.plan.sample_run import write_sample_run

    worlds.having(
        "tokenizer",
        "text",
        "tokens",
        "pairs",
        "model",
        "branch",
        "mixture",
        "exportable",
        "gguf",
        "trained",
        "adapter",
    )(tmp_path)
    write_sample_run(tmp_path / "run")
    shutil.copytree(worlds.built("halfway") / "checkpoints" / "step-000001", tmp_path / "checkpoint")
    (tmp_path / "plan.py").write_text(PLAN)
    (tmp_path / "pairs.jsonl").write_text(
        '{"prompt": "Hi", "chosen": "Hello", "rejected": "Go", "language": "en"}\n'
    )
    (tmp_path / "asked.jsonl").write_text(ASKED)
    (tmp_path / "completions.jsonl").write_text('{"prompt": "1 + 1?", "completion": "2", "answer": "2"}\n')
    (tmp_path / "prompts.jsonl").write_text('{"id": "one", "prompt": "1 + 1?", "language": "en"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answer(command: str, *more: str) -> dict[str, Any]:
    """What a command prints with `--json`."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    result = CliRunner().invoke(
        cli, [*shlex.split(command), "--json", *more], prog_name="koine", catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    if "--quiet" in more:
        assert result.stderr == ""
    found = json.loads(result.stdout, parse_constant=refuse)
    assert isinstance(found, dict)
    return found


def test_every_command_with_an_answer_is_run_here() -> None:
    words = {tuple(shlex.split(command)[:length]) for command in COMMANDS for length in (1, 2)}
    assert LEAVES.keys() - words - WITHOUT_ANSWER - LIKE_ANOTHER == set()


@pytest.mark.filterwarnings("ignore::koine.errors.KoineWarning")
@pytest.mark.parametrize("command", COMMANDS, ids=lambda text: " ".join(text.split()[:3]))
def test_the_answer_is_one_json_object_and_nothing_else(command: str, place: Path) -> None:
    if command.startswith("lineage"):
        answer("adopt tokens --run r --name one --runs .")
    found = answer(command, "--quiet")
    assert set(COMMANDS[command]) <= found.keys()
    if "written" in found:
        assert Path(found["written"]).exists()


def test_the_answer_of_an_evaluation_is_what_out_writes(place: Path) -> None:
    found = answer("evaluate model --data text.jsonl --out result.json")
    assert found == json.loads(Path("result.json").read_text())
    assert isinstance(found["overall"]["bits_per_byte"], float)


def test_the_answer_of_a_comparison_is_what_out_writes(place: Path) -> None:
    found = answer("tokenizer measure tokenizer --data text.jsonl --out result.json")
    written = json.loads(Path("result.json").read_text())
    # Everything but the speed, which is measured once for both.
    assert found == written


def test_parameters_have_their_values_and_types(place: Path) -> None:
    text, rate = answer("run plan.py:words --list-parameters")["parameters"]
    assert (text["parameter"], text["default"], text["type"], text["required"]) == (
        "text",
        "a",
        "text",
        False,
    )
    assert rate["default"] == 0.25


def test_a_run_that_fails_says_which_step_in_json_and_ends_with_its_code(place: Path) -> None:
    (place / "plan.py").write_text(PLAN.replace("(out /", "raise ValueError('no'); (out /"))
    result = CliRunner().invoke(cli, ["run", "plan.py:words", "--json", "--quiet"], prog_name="koine")
    assert result.exit_code == 1
    (failure,) = json.loads(result.stdout)["failures"]
    assert failure["artifact"] == "one"
    assert "ValueError: no" in result.stderr


def test_a_dry_run_names_the_steps_without_an_estimate(place: Path) -> None:
    found = answer("run plan.py:words --dry-run")
    assert (found["steps_to_run"], found["without_estimate"], found["seconds"]) == (1, ["one"], 0.0)
    assert found["seconds_on_this_machine"] is None


def test_a_run_answers_with_times_stages_verdicts_and_closing(place: Path) -> None:
    (place / "plan.py").write_text(PLAN + CLOSING)
    found = answer("run plan.py:judged")
    assert found["seconds"] > 0.0
    assert [(one["artifact"], one["status"]) for one in found["artifacts"]] == [("one", "built")]
    assert [one["names"] for one in found["stages"]] == [["one"]]
    assert found["verdicts"] == [{"artifact": "one", "question": "was it faster?", "answer": "Yes: twice."}]
    assert found["notes"] == ["The page: runs/judged/report.html", "more: one"]
    assert Path(found["report"]).exists()


def test_a_quiet_run_keeps_the_verdict_and_drops_the_rest_of_the_closing(place: Path) -> None:
    (place / "plan.py").write_text(PLAN + CLOSING)
    run = ["run", "plan.py:judged"]
    loud = CliRunner().invoke(cli, run, prog_name="koine", catch_exceptions=False).stdout
    assert loud.endswith("The page: runs/judged/report.html\nmore: one\n")
    assert "total time: " in loud
    assert "\nreport: " not in loud  # the closing names it
    quiet = CliRunner().invoke(cli, [*run, "--quiet"], prog_name="koine", catch_exceptions=False)
    lines = quiet.stdout.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["artifact", "one"]
    assert lines[2:] == ["was it faster? Yes: twice."]
    assert quiet.stderr == ""


def test_an_export_to_a_device_has_no_size(place: Path) -> None:
    found = answer("model export exportable --format gguf --out /dev/null")
    assert found == {"written": "/dev/null", "bytes": None}


def test_a_link_to_standard_output_is_standard_output(place: Path) -> None:
    (place / "link").symlink_to("/dev/stdout")
    with pytest.raises(UserError, match="--json and --out both go to standard output"):
        answer("evaluate model --data text.jsonl --out link")


def test_a_quiet_run_prints_its_table_only(place: Path) -> None:
    result = CliRunner().invoke(cli, ["run", "plan.py:words", "--quiet"], prog_name="koine")
    assert result.stderr == ""
    assert [line.split()[0] for line in result.stdout.split("\n") if line] == ["artifact", "one"]
