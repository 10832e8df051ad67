"""A seccomp filter for bubblewrap: system calls that a tested program does not need fail with EPERM.

Namespaces and resource limits hold without it. It closes what they leave open: memory that no limit counts
(System V shared memory, memfd), sockets of families that a network namespace does not separate (vsock),
tracing of neighbours, and kernel interfaces with a history of holes (bpf, io_uring, userfaultfd, keys).
The program is classic BPF as in seccomp(2); system call numbers are those of the kernel's tables.
"""

from __future__ import annotations

import platform
import struct

# name -> number on (x86_64, aarch64)
DENIED = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "socket": (41, 198),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "setns": (308, 268),
    "unshare": (272, 97),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "personality": (135, 92),
    "swapon": (167, 224),
    "reboot": (169, 142),
    "acct": (163, 89),
    "syslog": (103, 116),
    "quotactl": (179, 60),
}

_AUDIT_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_KILL, _EPERM, _ALLOW = 0x80000000, 0x00050001, 0x7FFF0000
_NUMBER, _ARCHITECTURE = 0, 4  # offsets in struct seccomp_data


def filter_program(machine: str | None = None) -> bytes | None:
    """Return the filter for a machine (`platform.machine()`); None for one whose numbers are not in the table.

    Calls of another architecture (32-bit code) kill the process; those of x32 are denied.
    """
    machine = machine or platform.machine()
    if machine not in _AUDIT_ARCHITECTURES:
        return None
    column = list(_AUDIT_ARCHITECTURES).index(machine)
    numbers = [entry[column] for entry in DENIED.values()]
    tests = [(_JUMP_IF_EQUAL, number) for number in numbers]
    if machine == "x86_64":
        tests.insert(0, (_JUMP_IF_AT_LEAST, _X32_BIT))
    lines = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_IF_EQUAL, 1, 0, _AUDIT_ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    # Each test jumps over the tests behind it and the line that allows.
    lines += [(code, len(tests) - i, 0, value) for i, (code, value) in enumerate(tests)]
    lines += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _EPERM)]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)
