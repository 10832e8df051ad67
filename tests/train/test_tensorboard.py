"""TensorBoard events equal those of tensorboardX, and a full disk is an error of the training."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from koine.train.tensorboard import TensorBoardWriter


def events(folder: Path) -> list[Any]:
    """The events of a folder's only file, checksums checked, without their times."""
    [file] = folder.iterdir()
    content, found = file.read_bytes(), []
    while content:
        size = struct.unpack("<Q", content[:8])[0]
        data = content[12 : 12 + size]
        assert struct.unpack("<I", content[8:12])[0] == masked_crc32c(content[:8])
        assert struct.unpack("<I", content[12 + size : 16 + size])[0] == masked_crc32c(data)
        event = Event.FromString(data)
        assert event.wall_time > 0
        event.wall_time = 0
        found.append(event)
        content = content[16 + size :]
    return found


def test_the_events_are_those_of_tensorboardx(tmp_path: Path) -> None:
    theirs = SummaryWriter(str(tmp_path / "theirs"), purge_step=3)
    ours = TensorBoardWriter(tmp_path / "ours", first_step=3)
    for board in (theirs, ours):
        board.add_scalar("loss", 2.5, 3)
        board.add_scalar("evaluation/bits_per_byte/de", 1.25, 4)
        board.close()
    assert events(tmp_path / "ours") == events(tmp_path / "theirs")


PROGRAM = """
import resource, signal, sys
from pathlib import Path
from koine.train.tensorboard import TensorBoardWriter

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
board = TensorBoardWriter(Path(sys.argv[1]), first_step=0)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
try:
    for step in range(100):
        board.add_scalar("loss", 1.0, step)
    board.close()
except OSError as error:
    print("refused", error.errno)
"""


def test_a_file_that_may_not_grow_is_one_error_and_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "refused 27\n"
    assert done.stderr == ""
