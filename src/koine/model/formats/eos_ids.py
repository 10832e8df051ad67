"""The EOS ids of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from koine.errors import UserError
from koine.files import read_json

FILES = ("generation_config.json", "config.json")


def eos_ids(folder: Path) -> frozenset[int]:
    """Return every id of `eos_token_id` in `generation_config.json` and `config.json`.

    A chat model's turns may end at ids that its tokenizer does not call EOS: for example, the marker of the
    next speaker. Raises `UserError` for an entry that is no id.
    """
    found: set[int] = set()
    for name in FILES:
        if not (folder / name).is_file():
            continue
        value = read_json(folder / name)
        if not isinstance(value, dict):
            raise UserError("is not a JSON object", where=folder / name, hint="copy it again, or remove it")
        text = value.get("text_config")
        for holder in (value, text if isinstance(text, dict) else {}):
            found.update(_ids(holder.get("eos_token_id"), folder / name))
    return frozenset(found)


def _ids(value: Any, where: Path) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for one in ids:
        if isinstance(one, bool) or not isinstance(one, int):
            raise UserError(
                f"the field 'eos_token_id' is {value!r}",
                where=where,
                hint="it must be an id or a list of ids",
            )
    # Some models write -1 for none.
    return [one for one in ids if one >= 0]
