"""Limits of a program in the sandbox."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from koine.fields import check_integer, check_number

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one run of a program may use; raises `UserError` for a value out of range.

    seconds: wall clock and processor time of one test.
    memory_bytes: address space of each process (RLIMIT_AS). All together may use `processes` times as much.
    processes: processes and threads at a time (RLIMIT_NPROC).
    file_bytes: size of a file, and of all files together. They lie in memory and are lost after the run.
    output_bytes: output of one test. A test that prints more fails.
    """

    seconds: float = 4.0
    memory_bytes: int = 256 * MIB
    processes: int = 8
    file_bytes: int = 16 * MIB
    output_bytes: int = MIB

    def __post_init__(self) -> None:
        check_number("seconds of the sandbox", self.seconds, above=0, high=3600)
        check_integer("memory bytes of the sandbox", self.memory_bytes, low=32 * MIB)
        check_integer("processes of the sandbox", self.processes, low=1, high=1024)
        check_integer("file bytes of the sandbox", self.file_bytes, low=4096)
        check_integer("output bytes of the sandbox", self.output_bytes, low=1, high=256 * MIB)

    def as_json(self) -> dict[str, float | int]:
        """Return the limits as a JSON object."""
        return asdict(self)
