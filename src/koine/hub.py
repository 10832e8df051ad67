"""Names on the Hugging Face hub in place of local paths: `OWNER/NAME[@REVISION]`.

A local path always wins. Files are fetched by `huggingface_hub` into its own cache. Without a connection, or
with HF_HUB_OFFLINE, what the cache holds is used.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from koine.errors import UserError, did_you_mean, first_line, nearest

Kind = Literal["model", "dataset"]
PREFIXES = ("hub:", "hf://datasets/", "hf://")
_NAME = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@(?P<revision>[^:]+))?(?::(?P<part>.+))?"
)
_SNAPSHOT = re.compile(
    r"/(?:model|dataset)s--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]+)/?$"
)
_KINDS = {"model": "model", "dataset": "data set"}
_FILE_ENDINGS = (
    *(".txt", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".orc"),
    *(".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".safetensors", ".bin", ".gguf", ".tiktoken", ".model"),
    *(".py", ".html", ".md", ".toml", ".yaml", ".yml"),
)
"""A name that ends so is a file's; no repository is called that."""

CONFIGURATION = ("config.json",)
TOKENIZER = (
    *("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.model", "*.tiktoken", "config.json"),
)
MODEL = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_NOT_ALLOWED = (401, 403)
_PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
_NOT_OF_MODELS = ("*/*", "consolidated*")
"""Other formats of the same weights, in folders (onnx, original) and beside them (Mistral's)."""


@dataclass(frozen=True)
class HubName:
    """A repository of the hub.

    Attributes:
        given: as the user wrote it.
        repository: `OWNER/NAME`.
        revision: a branch, a tag or a commit; None: the default branch.
        part: of a data set: a subset, a folder or a file pattern.
        explicit: whether a prefix says that it is of the hub, so that no local path is meant.
    """

    given: str
    repository: str
    revision: str | None = None
    part: str | None = None
    explicit: bool = False


def hub_name(path: str | Path) -> HubName | None:
    """Return the repository that a path names, or None for a local path.

    A path that exists is local. Others of the form `OWNER/NAME[@REVISION][:PART]` are of the hub, unless they
    end like a file.
    """
    given = str(path)
    # A `Path` holds one slash where two were written.
    text = re.sub(r"^hf:/+", "hf://", given)
    prefix = next((one for one in PREFIXES if text.startswith(one)), "")
    is_file = ":" not in given and given.lower().endswith(_FILE_ENDINGS)
    if not prefix and (is_file or os.path.lexists(given)):
        return None
    found = _NAME.fullmatch(text.removeprefix(prefix))
    if found is None:
        if prefix:
            raise UserError(
                f"'{given}' is no name on the hub", hint="write OWNER/NAME, or OWNER/NAME@REVISION"
            )
        return None
    return HubName(given, found["repository"], found["revision"], found["part"], bool(prefix))


def model_folder(path: str | Path, files: Sequence[str] = MODEL) -> Path:
    """Return the folder of a model: the path itself, or the snapshot of a model of the hub.

    Args:
        path: a local path or `OWNER/NAME[@REVISION]`.
        files: patterns of the files that are needed: `MODEL`, `TOKENIZER` or `CONFIGURATION`.

    Raises:
        UserError: neither the path nor the model on the hub exists, or the hub cannot be reached.
    """
    name = hub_name(path)
    if name is None:
        return Path(path)
    if name.part is not None:
        raise UserError(
            f"'{name.part}' after the colon: a model has no subsets",
            where=name.given,
            hint=f"give {name.repository}",
        )
    folder = snapshot(name, "model", files, _NOT_OF_MODELS)
    if files is MODEL and not any(folder.glob("*.safetensors")):
        folder = snapshot(name, "model", (*files, *_PICKLES), _NOT_OF_MODELS)
    if not folder.is_dir():
        raise UserError("the model on the hub holds no such files", where=name.given, hint=", ".join(files))
    return folder


def snapshot(name: HubName, kind: Kind, allow: Sequence[str], ignore: Sequence[str] = ()) -> Path:
    """Fetch the files of a repository that match some of `allow` and none of `ignore`; return their folder.

    Raises `UserError` if there is no such repository or revision, or the hub cannot be reached and the cache
    does not hold the files.
    """
    import huggingface_hub

    with _hub_errors(name, kind), _quiet_client():
        return Path(
            huggingface_hub.snapshot_download(
                name.repository,
                repo_type=kind,
                revision=name.revision,
                allow_patterns=list(allow),
                ignore_patterns=list(ignore) or None,
                tqdm_class=_progress_bar(),
            )
        )


@functools.cache
def _progress_bar() -> type[Any]:
    """Return the client's progress bar, shown while it runs and in a terminal only."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            shown = sys.stderr.isatty() and not options.get("disable")
            super().__init__(*arguments, **{**options, "leave": False, "disable": not shown})

    return Bar


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Hide the client's warnings: of patterns without a file, and that nobody is logged in."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def shown_name(path: str | Path) -> str:
    """Return `OWNER/NAME@COMMIT` for a folder of the client's cache, else the path."""
    found = _SNAPSHOT.search(Path(path).as_posix())
    return f"{found['owner']}/{found['name']}@{found['commit'][:8]}" if found else str(path)


def hub_id(path: str | Path) -> tuple[str, str] | None:
    """Return `OWNER/NAME` and the commit of a folder of the client's cache; None for any other folder."""
    found = _SNAPSHOT.search(Path(path).absolute().as_posix())
    return None if found is None else (f"{found['owner']}/{found['name']}", found["commit"])


def model_name(path: Path) -> str:
    """Return a model's short name: that of its folder, or on the hub `NAME@COMMIT`."""
    return Path(shown_name(path.resolve())).name


@contextmanager
def _hub_errors(name: HubName, kind: Kind) -> Iterator[None]:
    """Turn the hub client's errors into a `UserError` that names both readings of the path."""
    from huggingface_hub import errors

    what, repository = _KINDS[kind], name.repository
    page = f"{_endpoint()}/{'datasets/' if kind == 'dataset' else ''}{repository}"
    log_in = "`hf auth login`, or the variable HF_TOKEN"
    try:
        yield
    except errors.GatedRepoError:
        raise _neither(
            name,
            f"the {what} '{repository}' on the hub is gated",
            f"ask for access at {page} and log in: {log_in}",
        ) from None
    except errors.RepositoryNotFoundError:
        raise _neither(
            name,
            f"the hub has no {what} '{repository}'",
            f"check the name; log in to see a private one: {log_in}",
        ) from None
    except errors.RevisionNotFoundError:
        raise _neither(
            name, f"the {what} '{repository}' on the hub has no revision '{name.revision}'", f"see {page}"
        ) from None
    except errors.HFValidationError as error:
        raise _neither(name, f"no name on the hub ({first_line(error)})", "write OWNER/NAME") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if _is_offline():
            raise _neither(
                name,
                f"the cache does not hold the {what} '{repository}', and HF_HUB_OFFLINE is set",
                "unset it once, to fetch it",
            ) from None
        raise _unreachable(name, what, error.__cause__ or error) from None
    except (errors.HfHubHTTPError, errors.HTTPError, ConnectionError, TimeoutError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in _NOT_ALLOWED:
            raise _neither(
                name, f"the hub refuses the {what} '{repository}' ({status})", f"log in: {log_in}"
            ) from None
        raise _unreachable(name, what, error) from None


def _unreachable(name: HubName, what: str, error: BaseException) -> UserError:
    return _neither(
        name,
        f"the {what} '{name.repository}' cannot be fetched from the hub ({first_line(error)})",
        f"check the connection to {_endpoint()}, or give a local path",
    )


def _neither(name: HubName, what: str, hint: str) -> UserError:
    """Return the error for a name that is neither a local path nor can be had from the hub."""
    if name.explicit:
        return UserError(what, where=name.given, hint=hint)
    path = Path(name.given)
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    if nearest(path.name, beside):
        hint = f"{did_you_mean(path.name, beside)} Or {hint}"
    return UserError(f"no such local path, and {what}", where=name.given, hint=hint)


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
