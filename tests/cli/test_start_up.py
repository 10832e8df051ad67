"""The command starts light: what a help page needs is imported, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from koine.cli.main import VERBS

HEAVY = (
    "torch",
    "transformers",
    "ray",
    "pyarrow",
    "babel",
    "numpy",
    "matplotlib",
    "tokenizers",
    "huggingface_hub",
)

SOURCE = Path(__file__).parents[2] / "src"

SHOW_MODULES = """
import sys
sys.argv = ["koine", *sys.argv[1:]]
from koine.cli.main import main
try:
    main()
except SystemExit as end:
    assert end.code in (0, None), end.code
finally:
    print("MODULES " + " ".join(sys.modules))
"""


def modules_after(*arguments: str) -> tuple[str, set[str]]:
    """The output of `koine ARGUMENTS` in a fresh process, and the modules that it imported."""
    process = subprocess.run(
        [sys.executable, "-c", SHOW_MODULES, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    output, _, modules = process.stdout.rpartition("MODULES ")
    return output, set(modules.split())


def test_help_lists_every_verb_and_imports_nothing_heavy() -> None:
    output, modules = modules_after("--help")
    assert [verb for verb in VERBS if verb not in output] == []
    assert modules.isdisjoint(HEAVY)
    # not even a verb's own module
    assert {name for name in modules if name.startswith("koine.cli.")} == {
        "koine.cli.commands",
        "koine.cli.groups",
        "koine.cli.main",
    }


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_the_help_of_a_verb_imports_nothing_heavy(verb: str) -> None:
    output, modules = modules_after(verb, "--help")
    assert output.startswith(f"Usage: koine {verb}")
    assert modules.isdisjoint(HEAVY), sorted(modules.intersection(HEAVY))


def test_a_model_is_loaded_without_the_compiler_of_torch(tmp_path: Path) -> None:
    """The compiler takes as long to import as torch itself."""
    from koine.model import Decoder, preset, save_model
    from tests.bad_inputs.worlds import built

    tokenizer = built("tokenizer")
    save_model(Decoder(preset("koine-0.5m", 300)), tmp_path / "model", tokenizer=tokenizer)
    words = ("chat", str(tmp_path / "model"), "--complete", "--once", "Hello", "--max-new-tokens", "2")
    _, modules = modules_after(*words)
    assert "torch" in modules
    assert modules.isdisjoint({"torch._dynamo", "torch._inductor", "sympy", "transformers"})


def test_another_project_named_koine_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "koine").mkdir()
    (tmp_path / "koine" / "__init__.py").write_text("__version__ = '0.11.2'\n")
    process = subprocess.run(
        [sys.executable, "-c", "from koine_lm import main; main()", "--help"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(SOURCE)])},
    )
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"koine: {tmp_path}/koine/__init__.py: 'import koine' finds another project's")
    assert "pip uninstall koine" in line
    assert line.endswith("pip install --force-reinstall --no-deps koine-lm")


def test_python_m_koine_starts_the_same_command() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "koine", "--version"], capture_output=True, text=True, check=True, timeout=120
    )
    assert process.stdout.startswith("koine, version ")


def test_version() -> None:
    output, modules = modules_after("--version")
    assert output.startswith("koine, version 0.1.0")
    assert modules.isdisjoint(HEAVY)
