"""The choice of the tokenizer that a merge keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from koine.combine.merging.tokenizers import tokenizer_source
from koine.errors import UserError


def test_whose_tokenizer_is_chosen(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "base")]
    assert [
        tokenizer_source(paths, with_base=True, policy=policy)
        for policy in ("", "first", "base", str(paths[1]))
    ] == [0, 0, 2, 1]
    with pytest.raises(UserError, match="there is no base"):
        tokenizer_source(paths, with_base=False, policy="base")
