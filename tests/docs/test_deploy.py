"""The job templates under deploy/ are in step with the command line, and let a job save before they requeue it.

Each template runs with stand-ins for `srun`, `torchrun`, `koine` and the rest, which write down their arguments.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import click
import pytest
from torch.distributed.run import get_args_parser

from koine.cli.main import cli

from . import manual

DEPLOY = manual.ROOT / "deploy"
TEMPLATES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())
# Ones whose work runs as a step of Slurm, with the arguments that they are tried with.
SLURM = {
    "train.sbatch": ["--steps", "7"],
    "train-nodes.sbatch": ["--steps", "7"],
    "sweep.sbatch": [],
    "plan.sbatch": ["quickstart"],
    "ray.sbatch": ["quickstart"],
}
# Slurm's name of the job; tasks of an array have one of their own.
JOBS = {"sweep.sbatch": "40_5"}
TIMEOUT_SECONDS = 60

# A stand-in writes one line: its name and its arguments, separated by tabs.
RECORD = 'printf "%s" "${0##*/}" >> "$CALLS"; printf "\\t%s" "$@" >> "$CALLS"; echo >> "$CALLS"\n'
STEP = 'while [[ "$1" == --* ]]; do shift; done; exec "$@"\n'
STAND_INS = {
    "srun": RECORD + STEP,
    "scontrol": RECORD
    + 'case "$1 $2" in "show hostnames") printf "n1\\nn2\\n";; "show job") cat "$CALLS.job";; esac\n',
    "scancel": RECORD + 'kill -TERM "$(cat "$CALLS.pid")"\n',
    "ray": RECORD + '[ "$2" = --head ] && exec sleep 60; exit 0\n',
    "torchrun": RECORD,
    "koine": RECORD,
}
# A training that saves when it gets TERM, and ends with the exit code of `koine train`.
WAITS = (
    RECORD
    + 'trap "exit 143" TERM; echo $$ > "$CALLS.pid"; touch "$CALLS.ready"; while true; do sleep 0.05; done\n'
)


class Runner:
    """Runs templates in an empty folder with stand-ins for the programs that they call."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls_file = folder, folder / "calls"
        (folder / "venv/bin").mkdir(parents=True)
        self.preempted_at("None")
        for name, body in STAND_INS.items():
            self.stand_in(name, body)

    def stand_in(self, name: str, body: str) -> None:
        path = self.folder / "venv/bin" / name
        path.write_text(f"#!/bin/bash\n{body}")
        path.chmod(0o755)

    def preempted_at(self, time: str) -> None:
        """Let `scontrol show job` print this time of a preemption."""
        Path(f"{self.calls_file}.job").write_text(
            f"JobId=41\n   PreemptEligibleTime=2026-11-30T13:00:00 PreemptTime={time}\n"
        )

    def start(self, template: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        slurm = {
            "SLURM_JOB_ID": "41",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_CPUS_PER_TASK": "4",
            "SLURM_ARRAY_JOB_ID": "40",
            "SLURM_ARRAY_TASK_ID": "5",
        }
        own = {"VENV": str(self.folder / "venv"), "CALLS": str(self.calls_file)}
        path = f"{self.folder / 'venv/bin'}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", str(template), *arguments],
            cwd=self.folder,
            env={"PATH": path, **slurm, **own, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, template: Path, *arguments: str, **variables: str) -> tuple[int, str]:
        process = self.start(template, *arguments, **variables)
        output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
        return process.returncode, output

    def calls(self, name: str) -> list[list[str]]:
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [words[1:] for line in lines if (words := line.split("\t"))[0] == name]

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        ready = Path(f"{self.calls_file}.ready")  # not the file of the pid: that may exist and be empty
        while not (self.calls(name) and ready.exists()):
            assert time.monotonic() < deadline, f"{name} was not called"
            time.sleep(0.02)


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


def parse(arguments: list[str]) -> dict[str, object]:
    """Parse the arguments of `koine` as the command line does; return the values of the last command."""
    command: click.Command = cli
    context = click.Context(cli, info_name="koine")
    while isinstance(command, click.Group):
        found = command.get_command(context, arguments[0])
        assert found is not None, arguments[0]
        command = found
        context = click.Context(command, info_name=arguments[0], parent=context)
        arguments = arguments[1:]
    return command.make_context("koine", list(arguments)).params


def koine_calls(runner: Runner) -> list[dict[str, object]]:
    """The parsed commands of all calls, also of those that torchrun would make."""
    through_torchrun = []
    for words in runner.calls("torchrun"):
        known = get_args_parser().parse_args(words)
        assert (known.module, known.training_script) == (True, "koine")
        through_torchrun.append(known.training_script_args)
    return [parse(words) for words in [*runner.calls("koine"), *through_torchrun]]


def requeues(runner: Runner) -> list[str]:
    """The jobs that were queued again."""
    return [words[1] for words in runner.calls("scontrol") if words[0] == "requeue"]


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_the_shell_accepts_it(template: Path) -> None:
    subprocess.run(["bash", "-n", str(template)], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", str(template)], capture_output=True, text=True, check=False)
        assert done.stdout == ""


def test_the_manual_names_every_template() -> None:
    page = (manual.ROOT / "docs/how-to/cluster.md").read_text(encoding="utf-8")
    missing = [path.name for path in TEMPLATES if str(path.relative_to(manual.ROOT)) not in page]
    assert (missing, {path.name for path in TEMPLATES}) == ([], {*SLURM, "submit.sh"})


@pytest.mark.parametrize("name", SLURM)
def test_the_command_line_knows_what_it_calls(name: str, runner: Runner) -> None:
    code, output = runner.run(DEPLOY / "slurm" / name, *SLURM[name])
    assert (code, runner.calls("scancel")) == (0, []), output
    (called,) = koine_calls(runner)
    if name.startswith("train"):
        assert called["steps"] == 7  # options after the file replace those in it
    if name == "sweep.sbatch":
        assert (called["learning_rate"], called["seed"]) == (4e-3, 1)
    if name == "ray.sbatch":
        assert (called["executor"], called["address"]) == ("ray", "n1:20041")
    assert requeues(runner) == []


def test_several_nodes_meet_at_the_first(runner: Runner) -> None:
    runner.run(DEPLOY / "slurm/train-nodes.sbatch", SLURM_GPUS_ON_NODE="8")
    (words,) = runner.calls("torchrun")
    known = get_args_parser().parse_args(words)
    assert (known.nnodes, known.nproc_per_node, known.rdzv_endpoint) == ("2", "8", "n1:20041")


@pytest.mark.parametrize("name", SLURM)
def test_before_the_time_limit_it_saves_and_is_queued_again(name: str, runner: Runner) -> None:
    worker = "torchrun" if name.startswith("train") else "koine"
    runner.stand_in(worker, WAITS)
    process = runner.start(DEPLOY / "slurm" / name, *SLURM[name])
    runner.wait_for(worker)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=TIMEOUT_SECONDS)
    # 128 + USR1: the step ended in the moment in which the signal ended the shell's `wait`
    assert process.returncode in (143, 128 + signal.SIGUSR1)
    assert runner.calls("scontrol")[-1] == ["requeue", JOBS.get(name, "41")]


@pytest.mark.parametrize("name", [name for name in SLURM if name != "ray.sbatch"])
def test_a_cancelled_job_saves_and_is_not_queued_again(name: str, runner: Runner) -> None:
    worker = "torchrun" if name.startswith("train") else "koine"
    runner.stand_in(worker, WAITS)
    process = runner.start(DEPLOY / "slurm" / name, *SLURM[name])
    runner.wait_for(worker)
    os.killpg(process.pid, signal.SIGTERM)  # Slurm signals the shell and the step
    process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 143
    assert requeues(runner) == []


@pytest.mark.parametrize("name", SLURM)
@pytest.mark.parametrize(
    ("time", "queued"), [("2999-01-01T00:00:00", True), ("2020-01-01T00:00:00", False), ("None", False)]
)
def test_a_job_that_ends_at_a_preemption_is_queued_again(
    name: str, time: str, queued: bool, runner: Runner
) -> None:
    """Slurm itself does so only for jobs that it had to kill; an earlier preemption and a failure do not count."""
    worker = "torchrun" if name.startswith("train") else "koine"
    runner.stand_in(worker, RECORD + "exit 143\n")
    runner.preempted_at(time)
    assert runner.run(DEPLOY / "slurm" / name, *SLURM[name])[0] == 143
    assert requeues(runner) == ([JOBS.get(name, "41")] if queued else [])


def test_a_task_beyond_the_sweep_is_refused(runner: Runner) -> None:
    code, output = runner.run(DEPLOY / "slurm/sweep.sbatch", SLURM_ARRAY_TASK_ID="9")
    assert (code, runner.calls("koine")) == (2, [])
    assert "set --array=0-8" in output


@pytest.mark.parametrize("name", ["slurm/plan.sbatch", "slurm/ray.sbatch", "ray/submit.sh"])
def test_a_plan_must_be_named(name: str, runner: Runner) -> None:
    code, output = runner.run(DEPLOY / name)
    assert (code, runner.calls("koine"), runner.calls("ray")) == (2, [], [])
    assert "give the name of a plan" in output


def test_a_job_of_ray_runs_the_plan(runner: Runner) -> None:
    code, output = runner.run(DEPLOY / "ray/submit.sh", "quickstart", "--set", "chat_steps=9")
    assert code == 0, output
    (words,) = runner.calls("ray")
    assert words[:2] == ["job", "submit"]
    called = parse(words[words.index("--") + 2 :])
    assert (called["plan"], called["executor"], called["address"]) == ("quickstart", "ray", "auto")
