"""`--dry-run` has the errors and warnings of the run, and writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from koine.cli.train import train as command
from koine.errors import KoineWarning, UserError

from .tokens import write_tokens


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    return write_tokens(tmp_path_factory.mktemp("tokens"))


def dry(made: tuple[Path, dict[str, Path]], out: Path, *arguments: Any) -> Result:
    tokenizer, shards = made
    words = [
        *("pretrain", "--preset", "koine-0.5m", "--tokenizer", tokenizer, "--data", shards["short"]),
        *("--batch-size", 2, "--sequence-length", 16, "--out", out, "--dry-run", *arguments),
    ]
    return CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False)


def test_text_that_is_repeated_too_often_is_noted(made: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    with pytest.warns(KoineWarning, match="these documents are repeated: short/en"):
        done = dry(made, tmp_path / "out", "--steps", 2000)
    assert "peak memory" in done.output
    assert not (tmp_path / "out").exists()


def test_long_rows_without_long_documents_are_refused(
    made: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="holds no document of 5000 tokens"):
        dry(
            made, tmp_path / "out",
            *("--steps", 4, "--long-every", 2, "--long-sequence-length", 64, "--long-batch-size", 1),
            *("--long-min-tokens", 5000),
        )  # fmt: skip
