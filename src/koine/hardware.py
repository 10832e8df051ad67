"""This machine: versions, cores, memory, accelerators, instructions, disk, compiler, matmul rate."""

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

from koine import __version__
from koine.errors import UserError

CPU_FLAGS_WITH_BFLOAT16 = {"avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX BF16", "bf16": "ARM BF16"}


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """A device that torch can compute on, besides the CPU."""

    device: str
    name: str
    memory_bytes: int | None
    bfloat16: bool


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The CPU and its memory; `usable_cores` are those that this process may use."""

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
    """Return the versions of Python, Koine and the packages that compute, without importing them."""
    found = {"python": platform.python_version(), "koine": __version__}
    for name in ("torch", "tokenizers", "numpy", "safetensors", "pyarrow", "babel"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def usable_cores() -> int:
    """Return the cores that this process may use: affinity mask or cgroup quota, whichever is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_value("cpu.max", "cpu/cpu.cfs_quota_us")
    if quota:
        limit, _, period = quota.partition(" ")
        if limit.isdigit() and int(limit) > 0:
            cores = min(cores, max(1, int(limit) // int(period or 100_000)))
    return cores


def cgroup_value(version_2: str, version_1: str) -> str | None:
    """Return the content of a cgroup file, of version 2 or 1; None if neither exists."""
    for name in (version_2, version_1):
        path = Path("/sys/fs/cgroup") / name
        if path.is_file():
            return path.read_text().strip()
    return None


def memory_limit() -> int | None:
    """Return the bytes that the cgroup allows; None if it sets no limit."""
    value = cgroup_value("memory.max", "memory/memory.limit_in_bytes")
    return int(value) if value and value.isdigit() else None


def available_memory() -> int:
    """Return the bytes that are free without swapping, at most the limit of the cgroup."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limit = memory_limit()
    return free if limit is None else min(free, limit)


def processor_flags() -> set[str]:
    """Return the instruction-set flags of the processor; empty if the system does not report them."""
    return set((_cpuinfo("flags", "Features") or "").split())


def chosen_dtype(wanted: str) -> str:
    """Return the dtype to compute in: `wanted`, or for "auto" the faster one on this machine.

    That is bfloat16 on an accelerator and where `bfloat16_is_fast`, else float32. It reads only files of the
    system, so it is the same at every start on one machine; `koine doctor` measures both.
    """
    if wanted != "auto":
        return wanted
    if any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
        return "bfloat16"
    return "bfloat16" if bfloat16_is_fast() else "float32"


@functools.cache
def bfloat16_is_fast() -> bool:
    """Return whether the processor multiplies faster in bfloat16 than in float32.

    It does with AMX, with ARM's instructions and with AMD's AVX-512 BF16. Without instructions bfloat16 is
    emulated, and Intel's AVX-512 BF16 alone is slower than its float32 (docs/explanation/log.md).
    """
    flags = processor_flags()
    has_matrix_instructions = bool({"amx_bf16", "bf16"} & flags)
    return has_matrix_instructions or ("avx512_bf16" in flags and _cpuinfo("vendor_id") == "AuthenticAMD")


def processor_name() -> str:
    """Return the processor's name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


@functools.cache
def is_intel() -> bool:
    """Return whether the processor is Intel's, which decides on kernels (docs/explanation/log.md)."""
    return "intel" in processor_name().lower()


def _cpuinfo(*keys: str) -> str | None:
    """Return the first value in /proc/cpuinfo under one of these keys."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return None


def compiler() -> str | None:
    """Return the C++ compiler that torch.compile calls: $CXX, else the first of g++, clang++, c++."""
    chosen = os.environ.get("CXX")
    for name in (chosen,) if chosen else ("g++", "clang++", "c++"):
        if path := shutil.which(name):
            return path
    return None


def machine() -> Machine:
    """Return what this machine has."""
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


def busy_cores(seconds: float = 0.25) -> float:
    """Measure how many cores other processes of this machine use now, by watching for `seconds`."""
    import psutil

    def busy() -> float:
        times = psutil.cpu_times()
        return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))

    before, own, begin = busy(), time.process_time(), time.perf_counter()
    time.sleep(seconds)
    elapsed = max(time.perf_counter() - begin, 1e-3)
    return max(0.0, busy() - before - (time.process_time() - own)) / elapsed


def free_disk_bytes(path: Path) -> int:
    """Return the bytes that an ordinary user can still write below `path` or its nearest existing parent."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def driver_devices(root: Path = Path("/")) -> list[str]:
    """Return the names of the accelerators that drivers report below `root`, without importing torch."""
    found = []
    for information in sorted(root.glob("proc/driver/nvidia/gpus/*/information")):
        lines = dict(line.partition(":")[::2] for line in information.read_text().splitlines())
        found.append(lines.get("Model", "NVIDIA GPU").strip())
    if not found and (root / "dev/nvidiactl").exists():
        found.append("NVIDIA GPU")
    if (root / "dev/kfd").exists():
        found.append("AMD GPU")
    if sys.platform == "darwin" and platform.machine() == "arm64":
        found.append("Apple GPU")
    return found


def accelerators() -> list[Accelerator]:
    """Return the devices that torch sees: CUDA or ROCm, Intel, Apple."""
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
    """Return FLOP/s of a `size`³ matmul (2·size³ FLOPs), the best of several.

    The first matmul is not counted: it starts threads and loads kernels.
    """
    import torch

    kind = getattr(torch, dtype)
    left = torch.randn(size, size, device=device).to(kind)
    right = torch.randn(size, size, device=device).to(kind)

    def time_matmul() -> float:
        start = time.perf_counter()
        product = left @ right
        # Devices compute asynchronously; reading one number waits for the result.
        product[0, 0].item()
        return time.perf_counter() - start

    time_matmul()
    best, end = time_matmul(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, time_matmul())
    return 2 * size**3 / best


def environment() -> str:
    """Return the folder of this Python: that of the virtual environment, or the system's."""
    return sys.prefix if sys.prefix != sys.base_prefix else f"{sys.prefix} (no virtual environment)"


def chosen_device(wanted: str) -> str:
    """Return the device to compute on: `wanted`, or for "auto" cuda where torch finds it, else cpu."""
    import torch

    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raise `UserError` for a device ("cpu", "cuda:1", ...) that torch or this machine does not have."""
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
