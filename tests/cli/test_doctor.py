"""`koine doctor` separates installed, missing and broken packages; its numbers are the system's."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import tomllib
from pathlib import Path

import psutil
import pytest
import torch
from click.testing import CliRunner

import koine
from koine import extras, hardware
from koine.cli.doctor import doctor
from koine.errors import UserError

ROOT = Path(__file__).parents[2]

needs_metadata = pytest.mark.skipif(
    extras.own_distribution() is None, reason="Koine is imported from a folder that was never installed"
)


def make_distribution(
    site: Path, name: str, version: str, source: str | None, *, script: str = "", more: str = ""
) -> None:
    """What pip leaves: a metadata folder and, unless `source` is None, a module."""
    metadata = site / f"{name}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{more}")
    if script:
        (metadata / "entry_points.txt").write_text(f"[console_scripts]\nkoine = {script}\n")
    if source is not None:
        (site / f"{name}.py").write_text(source)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that this process and its children see."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_a_whole_package_is_installed(site: Path) -> None:
    make_distribution(site, "koinewhole", "1.2", "x = 1\n")
    assert extras.inspect_package("koinewhole") == extras.Package(
        name="koinewhole", state="installed", version="1.2"
    )


def test_an_absent_package_is_not_installed(site: Path) -> None:
    assert extras.inspect_package("koineabsent").state == "not installed"


def test_metadata_without_files_is_broken_and_says_why(site: Path) -> None:
    make_distribution(site, "koinehalf", "1.2", None)
    package = extras.inspect_package("koinehalf")
    assert package.state == "broken"
    assert package.problem == "ModuleNotFoundError: No module named 'koinehalf'"


def test_files_without_metadata_are_broken(site: Path) -> None:
    (site / "koineorphan.py").write_text("")
    assert extras.inspect_package("koineorphan").problem == "files without metadata"


def test_an_import_that_raises_is_broken_with_its_last_line(site: Path) -> None:
    make_distribution(site, "koineraises", "3", "import koine_missing_part\n")
    assert extras.inspect_package("koineraises").problem == (
        "ModuleNotFoundError: No module named 'koine_missing_part'"
    )


def test_import_extra_tells_missing_from_half_installed(site: Path) -> None:
    with pytest.raises(
        UserError, match=r"'koineabsent' is needed and not installed; .*pip install 'koine-lm\[hf\]'"
    ):
        extras.import_extra("koineabsent.part", extra="hf", purpose="open a Llama checkpoint")
    make_distribution(site, "koinebroken", "3", "import koine_missing_part\n")
    with pytest.raises(
        UserError, match=r"interrupted installation; .*--force-reinstall --no-deps koinebroken"
    ):
        extras.import_extra("koinebroken", extra="hf", purpose="open a Llama checkpoint")


@needs_metadata
def test_requirements_are_those_of_the_project_file() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(lines: list[str]) -> set[str]:
        return {line.partition(">")[0].partition("[")[0].strip().lower() for line in lines}

    assert {name.lower() for name in extras.requirements()} == names(project["dependencies"])
    assert {name.lower() for name in extras.requirements("hf")} == {"transformers"}
    # `dev` names the other extras; they are resolved to their packages
    assert {"transformers", "ray", "pytest"} <= set(extras.requirements("dev"))
    assert set(extras.PURPOSES) == set(project["optional-dependencies"])


@needs_metadata
def test_every_core_package_of_this_environment_imports() -> None:
    states = extras.inspect_packages(extras.requirements())
    assert {name: package.problem for name, package in states.items() if package.state != "installed"} == {}


def test_doctor_prints_the_mend_of_a_half_installed_extra(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_distribution(site, "koinehalf", "1.2", None)
    monkeypatch.setattr(extras, "PURPOSES", {"hf": "open more", "cluster": "spread out"})
    monkeypatch.setattr(
        extras,
        "requirements",
        lambda extra=None: {"hf": ["koinehalf"], "cluster": ["koineabsent"]}.get(extra, []),
    )
    make_distribution(site, "koine_lm", "0.1.0", None, more="Provides-Extra: hf\nProvides-Extra: cluster\n")
    output = CliRunner().invoke(doctor, catch_exceptions=False).output
    assert "[hf]         broken: open more" in output
    assert "koinehalf is only half installed: metadata without files" in output
    assert f"{sys.executable} -m pip install --force-reinstall --no-deps koinehalf" in output
    assert "[cluster]    not installed: spread out" in output
    assert "pip install 'koine-lm[cluster]'" in output


@pytest.fixture
def only_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages, the only one in which this process finds metadata."""
    found = importlib.metadata.distributions
    monkeypatch.setattr(
        extras,
        "find_distribution",
        lambda name: next(iter(found(name=name, path=[str(tmp_path)])), None),
    )
    return tmp_path


def test_an_installation_by_its_name_has_no_problem(only_site: Path) -> None:
    make_distribution(only_site, "koine_lm", "0.1.0", None, more="Requires-Dist: click>=8\n")
    assert extras.name_problems() == []
    assert extras.requirements() == ["click"]


def test_an_installation_under_the_old_name_is_read_and_named(only_site: Path) -> None:
    more = (
        "Requires-Dist: click>=8\nRequires-Dist: koine[b]; extra == 'a'\nRequires-Dist: rich; extra == 'b'\n"
    )
    make_distribution(only_site, "koine", "0.1.0", None, script="koine.cli.main:main", more=more)
    assert extras.requirements() == ["click"]
    assert extras.requirements("a") == ["rich"]
    (problem,) = extras.name_problems()
    assert problem.startswith("installed under its old name 'koine'; fix: ")
    assert problem.endswith(f"-m pip install --editable {ROOT}")


def test_another_project_named_koine_is_named_and_not_read(only_site: Path) -> None:
    make_distribution(only_site, "koine_lm", "0.1.0", None, more="Requires-Dist: click>=8\n")
    more = "Summary: A parser generator\nRequires-Dist: lark\n"
    make_distribution(only_site, "koine", "0.11.2", None, script="koine.cli:main", more=more)
    (problem,) = extras.name_problems()
    assert problem.startswith(
        "'koine' 0.11.2 here is another project's package (A parser generator), and Koine is koine-lm; fix: "
    )
    assert "\n" not in problem
    assert extras.requirements() == ["click"]


def test_doctor_without_any_installation_says_so(only_site: Path) -> None:
    assert extras.inspect_installation() == ([], [])
    (problem,) = extras.name_problems()
    assert "runs from" in problem
    assert "without an installation" in problem
    make_distribution(only_site, "koine", "0.11.2", None)
    assert len(extras.name_problems()) == 2


def test_the_name_in_the_project_file_is_the_one_in_the_code() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (project["name"], project["version"]) == (koine.__distribution__, koine.__version__)


def test_auto_is_cuda_where_torch_finds_it_and_else_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (hardware.chosen_device("auto"), hardware.chosen_device("cpu")) == ("cuda", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hardware.chosen_device("auto") == "cpu"


def test_doctor_prints_versions_machine_and_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    core = [extras.Package(name="torch", state="installed", version="1")]
    monkeypatch.setattr(extras, "inspect_installation", lambda *, imports: (core, []))
    result = CliRunner().invoke(doctor, ["--full"], catch_exceptions=False)
    assert result.exit_code == 0
    # Metadata may lack the build (+cu130), which `torch.__version__` has.
    built = torch.__version__.partition("+")[0]
    for expected in (built, "GiB available", "free disk", "C++ compiler", "GFLOP/s", "bfloat16"):
        assert expected in result.output


def test_doctor_imports_and_measures_only_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("slow")

    for name in ("matmul_rate", "accelerators"):
        monkeypatch.setattr(hardware, name, refuse)
    monkeypatch.setattr(extras, "import_problem", refuse)
    result = CliRunner().invoke(doctor, catch_exceptions=False)
    assert result.exit_code == 0
    assert "--full imports each" in result.output or extras.own_distribution() is None


def test_doctor_as_json_has_states_and_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    core = [extras.Package(name="torch", state="installed", version="1")]
    measured = extras.Extra(name="hf", purpose="open more", packages=())
    monkeypatch.setattr(extras, "inspect_installation", lambda *, imports: (core, [measured]))
    monkeypatch.setattr(hardware, "matmul_rate", lambda dtype, **_: {"float32": 1.5, "bfloat16": 3.0}[dtype])
    monkeypatch.setattr(hardware, "driver_devices", lambda: ["NVIDIA H200"])
    result = CliRunner().invoke(doctor, ["--measure", "--json"], catch_exceptions=False)
    found = json.loads(result.stdout)
    assert found["versions"]["koine"] == koine.__version__
    assert found["machine"]["memory_bytes"] == hardware.machine().memory_bytes
    assert found["matmul_rates"][:2] == [
        {"device": "cpu", "dtype": "float32", "flops_per_second": 1.5},
        {"device": "cpu", "dtype": "bfloat16", "flops_per_second": 3.0},
    ]
    assert found["packages"] == [{"name": "torch", "state": "installed", "version": "1", "problem": None}]
    assert found["extras"] == [{"extra": "hf", "state": "installed", "purpose": "open more", "packages": []}]
    assert found["drivers"] == ["NVIDIA H200"]


def test_files_tell_a_half_installed_package_without_importing_it(site: Path) -> None:
    make_distribution(site, "koineraises", "3", "import koine_missing_part\n")
    make_distribution(site, "koinehalf", "1.2", None)
    make_distribution(site, "koinefolders", "1.2", None)
    (site / "koinefolders" / "inner").mkdir(parents=True)

    def quickly(name: str) -> extras.Package:
        return extras.inspect_package(name, imports=False)

    assert quickly("koineraises").state == "installed"
    assert quickly("koinehalf").problem == "metadata without files"
    assert quickly("koinefolders").problem == "its files are gone but for folders"


def test_the_machine_is_what_the_system_says() -> None:
    found = hardware.machine()
    assert 1 <= found.usable_cores <= (os.cpu_count() or 1)
    assert found.available_memory_bytes <= found.memory_bytes <= psutil.virtual_memory().total


def test_free_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert hardware.free_disk_bytes(tmp_path / "not" / "yet") > 0


def test_the_chosen_compiler_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = tmp_path / "my-compiler"
    chosen.write_text("#!/bin/sh\n")
    chosen.chmod(0o755)
    monkeypatch.setenv("CXX", str(chosen))
    assert hardware.compiler() == str(chosen)
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    assert hardware.compiler() is None


def test_a_matmul_rate_counts_two_operations_per_product_and_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock that advances by one second at each look: a product takes 1 s, so 2·8³ operations a second.
    ticks = iter(range(1000))
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: float(next(ticks)))
    assert hardware.matmul_rate("float32", size=8, seconds=3) == 2 * 8**3
