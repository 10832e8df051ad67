"""What this machine offers: versions, cores, memory, accelerators, instructions, disk, compiler, matmul rate."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from koine.errors import UserError

CPU_FLAGS_WITH_BFLOAT16 = {"avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX BF16", "bf16": "ARM BF16"}


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One device that torch can compute on, besides the CPU."""

    device: str
    name: str
    memory_bytes: int | None
    bfloat16: bool


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What was found; bytes are bytes, `usable_cores` is what this process may use."""

    system: str
    processor: str
    logical_cores: int
    physical_cores: int | None
    usable_cores: int
    memory_bytes: int
    available_memory_bytes: int
    bfloat16_instructions: tuple[str, ...]
    compiler: str | None


def versions() -> dict[str, str]:
    """Versions of Python, Koine and the packages that decide about numbers; no import is needed."""
    found = {"python": platform.python_version()}
    for name in ("koine", "torch", "tokenizers", "numpy", "safetensors", "pyarrow", "babel"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def usable_cores() -> int:
    """Cores that this process may use: the affinity mask and the control group's quota, whichever is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_value("cpu.max", "cpu/cpu.cfs_quota_us")
    if quota:
        limit, _, period = quota.partition(" ")
        if limit.isdigit() and int(limit) > 0:
            cores = min(cores, max(1, int(limit) // int(period or 100_000)))
    return cores


def cgroup_value(version_2: str, version_1: str) -> str | None:
    """The content of a control group's file, of either version; None where there is none."""
    for name in (version_2, version_1):
        path = Path("/sys/fs/cgroup") / name
        if path.is_file():
            return path.read_text().strip()
    return None


def memory_limit() -> int | None:
    """Bytes that the control group allows, None where it sets no limit."""
    value = cgroup_value("memory.max", "memory/memory.limit_in_bytes")
    return int(value) if value and value.isdigit() else None


def available_memory() -> int:
    """Bytes that this process may take without swapping: what the system has free, and no more than the control group allows in all."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limit = memory_limit()
    return free if limit is None else min(free, limit)


def processor_flags() -> set[str]:
    """Instruction-set flags of the processor; empty where the system does not tell."""
    return set((_cpuinfo("flags", "Features") or "").split())


def chosen_dtype(wanted: str) -> str:
    """The precision that training computes in: `wanted`, or where that is "auto" the one in which this machine is known to multiply faster.

    bfloat16 on an accelerator and where `bfloat16_is_fast`, else float32. Reads files of the system only, so that it is the same at every start on one machine;
    `koine doctor` measures both.
    """
    if wanted != "auto":
        return wanted
    if any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
        return "bfloat16"
    return "bfloat16" if bfloat16_is_fast() else "float32"


@functools.cache
def bfloat16_is_fast() -> bool:
    """Whether the processor is known to multiply in bfloat16 faster than in float32: with AMX, ARM's instructions or AMD's AVX-512 BF16.

    Without instructions bfloat16 is emulated, and Intel's AVX-512 BF16 alone is slower than its float32 (docs/explanation/log.md).
    """
    flags = processor_flags()
    matrix = {"amx_bf16", "bf16"} & flags
    return bool(matrix) or ("avx512_bf16" in flags and _cpuinfo("vendor_id") == "AuthenticAMD")


def processor_name() -> str:
    """The processor's name as the system tells it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


@functools.cache
def is_intel() -> bool:
    """Whether the processor is Intel's: which kernels are fastest on CPU depends on it (docs/explanation/log.md)."""
    return "intel" in processor_name().lower()


def _cpuinfo(*keys: str) -> str | None:
    """The first value in /proc/cpuinfo under one of these keys."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return None


def compiler() -> str | None:
    """The C++ compiler that torch.compile would call: $CXX, else the first of g++, clang++, c++."""
    chosen = os.environ.get("CXX")
    for name in (chosen,) if chosen else ("g++", "clang++", "c++"):
        if path := shutil.which(name):
            return path
    return None


def machine() -> Machine:
    """Look at this machine."""
    import psutil

    memory = psutil.virtual_memory()
    limit = memory_limit()
    total = memory.total if limit is None else min(memory.total, limit)
    flags = processor_flags()
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=processor_name(),
        logical_cores=os.cpu_count() or 1,
        physical_cores=psutil.cpu_count(logical=False),
        usable_cores=usable_cores(),
        memory_bytes=total,
        available_memory_bytes=available_memory(),
        bfloat16_instructions=tuple(name for flag, name in CPU_FLAGS_WITH_BFLOAT16.items() if flag in flags),
        compiler=compiler(),
    )


def free_disk_bytes(path: Path) -> int:
    """Bytes that an ordinary user can still write below `path` or its nearest existing parent."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def accelerators() -> list[Accelerator]:
    """The devices that torch sees: CUDA (or ROCm) cards, Intel cards, Apple's."""
    import torch

    found = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found.append(
                Accelerator(
                    device=f"cuda:{index}",
                    name=properties.name,
                    memory_bytes=properties.total_memory,
                    bfloat16=torch.cuda.is_bf16_supported(including_emulation=False),
                )
            )
    if torch.xpu.is_available():
        for index in range(torch.xpu.device_count()):
            device = torch.xpu.get_device_properties(index)
            found.append(
                Accelerator(
                    device=f"xpu:{index}", name=device.name, memory_bytes=device.total_memory, bfloat16=True
                )
            )
    if torch.backends.mps.is_available():
        found.append(Accelerator(device="mps", name="Apple GPU", memory_bytes=None, bfloat16=True))
    return found


def matmul_rate(dtype: str, *, device: str = "cpu", size: int = 1024, seconds: float = 0.3) -> float:
    """Floating-point operations per second of a `size`³ matrix product (2·size³ operations each), best of several.

    The first product is not counted: it pays for threads and kernels.
    """
    import torch

    kind = getattr(torch, dtype)
    left = torch.randn(size, size, device=device).to(kind)
    right = torch.randn(size, size, device=device).to(kind)

    def one() -> float:
        start = time.perf_counter()
        product = left @ right
        # A device computes behind our back; reading one number waits for it.
        product[0, 0].item()
        return time.perf_counter() - start

    one()
    best, end = one(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, one())
    return 2 * size**3 / best


def environment() -> str:
    """Where this Python lives: the virtual environment's folder, or the system's."""
    return sys.prefix if sys.prefix != sys.base_prefix else f"{sys.prefix} (no virtual environment)"


def check_device(device: str) -> None:
    """Raises `UserError` where `device` ("cpu", "cuda:1", ...) is no device of torch or is not in this machine."""
    import torch

    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise UserError(f"unknown device '{device}'", hint="give cpu, cuda or cuda:0") from None
    names = [found.device for found in accelerators()]
    present = wanted.type == "cpu" or any(
        name in (str(wanted), wanted.type) or (":" not in device and name.partition(":")[0] == wanted.type)
        for name in names
    )
    if not present:
        raise UserError(f"no device '{device}' here", hint=f"there is: {', '.join(['cpu', *names])}")
