"""`koine doctor`: print versions, hardware, and the state of the installation."""

from __future__ import annotations

from pathlib import Path

import click

from koine import extras, hardware, support

GIB = 2**30


@click.command()
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
def doctor(measure: bool, path: Path, constraints: bool) -> None:
    """Print versions, hardware, and what each optional extra would add."""
    if constraints:
        click.echo(support.constraints_file())
        return
    print_versions()
    print_machine(path)
    core, optional = extras.inspect_installation()
    if any(package.name == "torch" and package.state == "installed" for package in core):
        print_devices()
        print_rates(long=measure)
    print_installation(core, optional)


def line(name: str, value: str) -> None:
    """Print one line: a name and its value."""
    click.echo(f"  {name:<12} {value}")


def print_versions() -> None:
    """Print the versions of Koine, Python and the main libraries."""
    click.echo("Versions")
    notes = {"python": support.python_note, "torch": support.torch_note}
    for name, version in hardware.versions().items():
        note = notes[name](version) if name in notes and version != "not installed" else ""
        line(name, f"{version} ({note})" if note else version)
    line("environment", hardware.environment())


def print_machine(path: Path) -> None:
    """Print processor, memory, free disk at `path`, and what training uses."""
    found = hardware.machine()
    click.echo("\nMachine")
    line("system", found.system)
    line("processor", found.processor)
    physical = "" if found.physical_cores is None else f", {found.physical_cores} physical"
    line("cores", f"{found.usable_cores} usable ({found.logical_cores} logical{physical})")
    line(
        "memory",
        f"{found.available_memory_bytes / GIB:.1f} GiB available of {found.memory_bytes / GIB:.1f} GiB",
    )
    line("free disk", f"{hardware.free_disk_bytes(path) / GIB:.1f} GiB at {path.absolute()}")
    line(
        "C++ compiler",
        found.compiler or "none: torch.compile on CPU needs one (all else works without)",
    )
    instructions = ", ".join(found.bfloat16_instructions)
    line("bfloat16", instructions or "no CPU instructions: emulated, slower than float32")
    line("training", f"in {hardware.chosen_dtype('auto')}, where --dtype does not say otherwise")


def print_devices() -> None:
    """Print the accelerators."""
    devices = hardware.accelerators()
    for device in devices:
        memory = "" if device.memory_bytes is None else f", {device.memory_bytes / GIB:.0f} GiB"
        line(device.device, f"{device.name}{memory}, bfloat16 {'yes' if device.bfloat16 else 'no'}")
    if not devices:
        line("accelerator", "none: everything runs on the CPU")


def print_rates(*, long: bool) -> None:
    """Measure and print matmul rates; `long`: for 2 s each, and on accelerators too."""
    click.echo(
        "\nMatmul rates (1024 x 1024 on the CPU, 4096 x 4096 on accelerators; upper bounds for training)"
    )
    devices = [(device.device, 4096) for device in hardware.accelerators()] if long else []
    for device, size in [("cpu", 1024), *devices]:
        rates = {
            dtype: hardware.matmul_rate(dtype, device=device, size=size, seconds=2.0 if long else 0.2)
            for dtype in ("float32", "bfloat16")
        }
        ratio = rates["bfloat16"] / rates["float32"]
        line(
            device,
            f"float32 {rates['float32'] / 1e9:,.0f} GFLOP/s, "
            f"bfloat16 {rates['bfloat16'] / 1e9:,.0f} GFLOP/s ({ratio:.1f}x)",
        )


def print_installation(core: list[extras.Package], optional: list[extras.Extra]) -> None:
    """Print which packages and extras are installed, and how to add or repair the others."""
    missing = [package for package in core if package.state == "not installed"]
    broken = [package for package in core if package.state == "broken"]
    click.echo("\nPackages")
    for problem in extras.name_problems():
        line("koine", problem)
    if core and not missing and not broken:
        line("core", f"installed: {len(core)} packages, each imports")
    for package in missing:
        line("core", f"{package.name} is not installed; fix: {extras.repair_line(package.name)}")
    print_broken(broken)
    for extra in optional:
        line(f"[{extra.name}]", f"{extra.state}: {extra.purpose}")
        present = [
            f"{package.name} {package.version}" for package in extra.packages if package.state == "installed"
        ]
        if present:
            line("", "has " + ", ".join(present))
        print_broken([package for package in extra.packages if package.state == "broken"])
        if extra.state == "not installed":
            line("", f"add: {extras.install_line(extra.name)}")


def print_broken(packages: list[extras.Package]) -> None:
    """Print what is wrong with each broken package and how to repair it."""
    for package in packages:
        line("", f"{package.name} is only half installed: {package.problem}")
        line("", f"fix: {extras.repair_line(package.name)}")
