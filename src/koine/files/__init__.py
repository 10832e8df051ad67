"""Write files and folders atomically: write beside, fsync, rename."""

from koine.files.json_files import parse_json, read_json, read_json_object
from koine.files.locks import exclusive
from koine.files.outputs import (
    Claim,
    atomic_directory,
    atomic_file,
    before_publishing,
    check_inside,
    check_output_file,
    check_replacing,
    claim,
    find_leftovers,
    hide_temporary_name,
    make_folder,
    recover,
)
from koine.files.publishing import State, publish_directory, state_of
from koine.files.streams import STANDARD_OUTPUT, is_pipe, is_standard_output, is_stream
from koine.files.system_errors import disk_errors, explain
from koine.files.walk import copy_tree, walk
from koine.files.writing import (
    apply_umask,
    clear_abandoned,
    clear_partials,
    fsync_directory,
    fsync_file,
    fsync_tree,
    remove,
    sha256_file,
    to_json,
    write_atomically,
    write_json,
)

__all__ = [
    "STANDARD_OUTPUT",
    "Claim",
    "State",
    "apply_umask",
    "atomic_directory",
    "atomic_file",
    "before_publishing",
    "check_inside",
    "check_output_file",
    "check_replacing",
    "claim",
    "clear_abandoned",
    "clear_partials",
    "copy_tree",
    "disk_errors",
    "exclusive",
    "explain",
    "find_leftovers",
    "fsync_directory",
    "fsync_file",
    "fsync_tree",
    "hide_temporary_name",
    "is_pipe",
    "is_standard_output",
    "is_stream",
    "make_folder",
    "parse_json",
    "publish_directory",
    "read_json",
    "read_json_object",
    "recover",
    "remove",
    "sha256_file",
    "state_of",
    "to_json",
    "walk",
    "write_atomically",
    "write_json",
]
