"""`koine doctor`: print versions, hardware, and the state of the installation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from koine import extras, hardware, support
from koine.cli.answers import print_answer
from koine.cli.commands import Command

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Rate:
    """The measured matmul rate of one device in one dtype."""

    device: str
    dtype: str
    flops_per_second: float


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The findings of `koine doctor`. Accelerators and rates are None where torch was not asked."""

    versions: dict[str, str]
    support: dict[str, str]
    """The verdict of the support matrix on a version."""
    environment: str
    machine: hardware.Machine
    training_dtype: str
    path: Path
    free_disk_bytes: int
    drivers: list[str]
    """Accelerators by name, as their drivers report them."""
    accelerators: list[hardware.Accelerator] | None
    """Accelerators that torch sees."""
    matmul_rates: list[Rate] | None
    name_problems: list[str]
    imported: bool
    """Whether every package was imported, or only its files looked for."""
    packages: list[extras.Package]
    extras: list[extras.Extra]

    def to_json(self) -> dict[str, Any]:
        """Return the findings as JSON values; each extra with its state."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return found | {
            "extras": [
                {"extra": one.name, "state": one.state, "purpose": one.purpose, "packages": one.packages}
                for one in self.extras
            ]
        }


@click.command(cls=Command)
@click.option(
    "--full", is_flag=True, help="Also import every package, ask torch for devices, and measure matmul rates."
)
@click.option("--measure", is_flag=True, help="Measure matmul rates for longer, and on every accelerator.")
@click.option(
    "--path",
    type=click.Path(path_type=Path),
    default=Path(),
    show_default=True,
    help="Folder whose free disk space is printed.",
)
@click.option(
    "--constraints",
    is_flag=True,
    help="Print only the path of the file of tested versions, for `pip install --constraint`.",
)
def doctor(full: bool, measure: bool, path: Path, constraints: bool) -> None:
    """Print versions, hardware, and what each optional extra would add.

    Nothing heavy is imported, so that the answer comes at once. With --full or --measure it takes up to a
    minute.
    """
    if constraints:
        file = support.constraints_file()
        print_answer({"constraints": file}, lambda: click.echo(file))
        return
    found = examine(path, imports=full, torch=full or measure, long=measure)
    print_answer(found.to_json(), lambda: show(found))


def examine(path: Path, *, imports: bool, torch: bool, long: bool) -> Findings:
    """Look at machine and installation.

    Args:
        path: A folder on the disk in question.
        imports: Import every package.
        torch: Ask torch for devices and measure matmul rates.
        long: Measure for 2 s each, and on accelerators too.
    """
    core, optional = extras.inspect_installation(imports=imports)
    torch = torch and any(package.name == "torch" and package.state == "installed" for package in core)
    versions = hardware.versions()
    return Findings(
        versions=versions,
        support=support_notes(versions),
        environment=hardware.environment(),
        machine=hardware.machine(),
        training_dtype=hardware.chosen_dtype("auto"),
        path=path.absolute(),
        free_disk_bytes=hardware.free_disk_bytes(path),
        drivers=hardware.driver_devices(),
        accelerators=hardware.accelerators() if torch else None,
        matmul_rates=measure_rates(long=long) if torch else None,
        name_problems=extras.name_problems(),
        imported=imports,
        packages=core,
        extras=optional,
    )


def support_notes(versions: dict[str, str]) -> dict[str, str]:
    """Return what the support matrix says of Python and torch, where it says something."""
    notes = {
        name: note(versions[name])
        for name, note in (("python", support.python_note), ("torch", support.torch_note))
        if versions.get(name, "not installed") != "not installed"
    }
    return {name: text for name, text in notes.items() if text}


def measure_rates(*, long: bool) -> list[Rate]:
    """Return matmul rates of the CPU; `long`: for 2 s each, and of accelerators too."""
    devices = [(device.device, 4096) for device in hardware.accelerators()] if long else []
    return [
        Rate(
            device=device,
            dtype=dtype,
            flops_per_second=hardware.matmul_rate(
                dtype, device=device, size=size, seconds=2.0 if long else 0.2
            ),
        )
        for device, size in [("cpu", 1024), *devices]
        for dtype in ("float32", "bfloat16")
    ]


def show(found: Findings) -> None:
    """Print the findings."""
    click.echo("Versions")
    for name, version in found.versions.items():
        line(name, f"{version} ({found.support[name]})" if name in found.support else version)
    line("environment", found.environment)
    show_machine(found)
    show_devices(found)
    if found.matmul_rates is not None:
        show_rates(found.matmul_rates)
    show_installation(found)


def line(name: str, value: str) -> None:
    """Print one line: a name and its value."""
    click.echo(f"  {name:<12} {value}")


def show_machine(found: Findings) -> None:
    """Print processor, memory, free disk, and the dtype that training uses."""
    machine = found.machine
    click.echo("\nMachine")
    line("system", machine.system)
    line("processor", machine.processor)
    physical = "" if machine.physical_cores is None else f", {machine.physical_cores} physical"
    line("cores", f"{machine.usable_cores} usable ({machine.logical_cores} logical{physical})")
    line(
        "memory",
        f"{machine.available_memory_bytes / GIB:.1f} GiB available of {machine.memory_bytes / GIB:.1f} GiB",
    )
    line("free disk", f"{found.free_disk_bytes / GIB:.1f} GiB at {found.path}")
    line(
        "C++ compiler",
        machine.compiler or "none: torch.compile on CPU needs one (all else works without)",
    )
    instructions = ", ".join(machine.bfloat16_instructions)
    line("bfloat16", instructions or "no CPU instructions: emulated, slower than float32")
    line("training", f"in {found.training_dtype}, where --dtype does not say otherwise")


def show_devices(found: Findings) -> None:
    """Print the accelerators: those that torch sees, or else those that drivers report."""
    if found.accelerators is None:
        for name in found.drivers:
            line("accelerator", f"{name}, as its driver reports; `koine doctor --full` asks torch")
    else:
        for device in found.accelerators:
            memory = "" if device.memory_bytes is None else f", {device.memory_bytes / GIB:.0f} GiB"
            line(device.device, f"{device.name}{memory}, bfloat16 {'yes' if device.bfloat16 else 'no'}")
        if found.drivers and not found.accelerators:
            line("accelerator", f"{', '.join(found.drivers)}, which this installation of torch does not see")
    if not found.drivers and not found.accelerators:
        line("accelerator", "none: everything runs on the CPU")


def show_rates(rates: list[Rate]) -> None:
    """Print matmul rates, a line for each device."""
    click.echo(
        "\nMatmul rates (1024 x 1024 on the CPU, 4096 x 4096 on accelerators; upper bounds for training)"
    )
    for device in dict.fromkeys(rate.device for rate in rates):
        by_dtype = {rate.dtype: rate.flops_per_second for rate in rates if rate.device == device}
        ratio = by_dtype["bfloat16"] / by_dtype["float32"]
        line(
            device,
            f"float32 {by_dtype['float32'] / 1e9:,.0f} GFLOP/s, "
            f"bfloat16 {by_dtype['bfloat16'] / 1e9:,.0f} GFLOP/s ({ratio:.1f}x)",
        )


def show_installation(found: Findings) -> None:
    """Print which packages and extras are installed, and how to add or repair the others."""
    core = found.packages
    missing = [package for package in core if package.state == "not installed"]
    broken = [package for package in core if package.state == "broken"]
    click.echo("\nPackages")
    for problem in found.name_problems:
        line("koine", problem)
    if core and not missing and not broken:
        how = "each imports" if found.imported else "--full imports each"
        line("core", f"installed: {len(core)} packages, {how}")
    for package in missing:
        line("core", f"{package.name} is not installed; fix: {extras.repair_line(package.name)}")
    show_broken(broken)
    for extra in found.extras:
        line(f"[{extra.name}]", f"{extra.state}: {extra.purpose}")
        present = [
            f"{package.name} {package.version}" for package in extra.packages if package.state == "installed"
        ]
        if present:
            line("", "has " + ", ".join(present))
        show_broken([package for package in extra.packages if package.state == "broken"])
        if extra.state == "not installed":
            line("", f"add: {extras.install_line(extra.name)}")


def show_broken(packages: list[extras.Package]) -> None:
    """Print what is wrong with each broken package and how to repair it."""
    for package in packages:
        line("", f"{package.name} is only half installed: {package.problem}")
        line("", f"fix: {extras.repair_line(package.name)}")
