"""Real models: the imported directory is what `transformers` reads from the GGUF file itself."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from koine.cli.main import cli
from koine.tokenizer import load_tokenizer
from tests.starter import GEMMA3, SMOLLM2, gguf_file, model_directory

from ..test_gguf import TEXTS
from .reference import loaded_by_transformers

pytestmark = pytest.mark.starter
transformers = pytest.importorskip("transformers")
PACKAGES = (SMOLLM2, GEMMA3)

LOCALES = (
    "af", "am", "ar", "az", "bn", "ca", "cs", "de", "el", "en", "es", "et", "eu", "fa", "fi", "fr", "gu", "ha",
    "he", "hi", "hu", "hy", "id", "is", "it", "ja", "ka", "km", "kn", "ko", "lo", "lt", "ml", "mr", "my", "ne",
    "nl", "pa", "pl", "pt", "ro", "ru", "si", "sw", "ta", "te", "th", "tr", "uk", "ur", "vi", "yo", "zh", "zu",
)  # fmt: skip


def words_of(locale: str) -> str:
    """Return names of languages, countries, months and days in a language, from CLDR."""
    from babel import Locale

    one = Locale.parse(locale)
    names = [*list(one.languages.values())[:40], *list(one.territories.values())[:40]]
    calendar = [*one.months["format"]["wide"].values(), *one.days["format"]["wide"].values()]
    return f"{one.display_name}: {', '.join(names)}.\n\n{' – '.join(calendar)}!"


MANY = {code: words_of(code) for code in LOCALES}


@pytest.fixture(scope="module", params=PACKAGES)
def package(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def both(package: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the imported directory and the GGUF file."""
    return model_directory(package), gguf_file(package, tmp_path_factory.mktemp("gguf"))


def test_logits_are_those_of_what_transformers_reads(both: tuple[Path, Path]) -> None:
    """Exactly: the weights are the same bits, and the class the same."""
    out, file = both
    ours, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = loaded_by_transformers(file)
    assert type(ours) is type(theirs)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    # Longer than Gemma's window of 512.
    ids = tokenizer(" ".join(TEXTS.values()) * 2, return_tensors="pt").input_ids[:, :700]
    assert ids.shape[1] > 600
    with torch.no_grad():
        assert torch.equal(ours.eval()(ids).logits, theirs(ids).logits)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_the_tokenizer_encodes_as_that_of_transformers(both: tuple[Path, Path], package: str) -> None:
    """In 54 languages, and code.

    `transformers` does not know SmolLM2's way to split text (`smollm`: each digit alone) and takes GPT-2's.
    So of SmolLM2 it gets the pieces between digits, and the digits, one by one.
    """
    out, file = both
    ours = transformers.AutoTokenizer.from_pretrained(out)
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    texts = {**MANY, **TEXTS}
    assert len(MANY) >= 40
    for code, text in texts.items():
        wanted = theirs.encode(text)
        if package == SMOLLM2:
            cuts = [
                0,
                *(at for at, letter in enumerate(text) if letter.isnumeric() for at in (at, at + 1)),
                len(text),
            ]
            wanted = [
                one
                for start, stop in pairwise(cuts)
                if start < stop
                for one in theirs.encode(text[start:stop])
            ]
        assert ours.encode(text) == wanted, code
        if package == GEMMA3:
            assert ours.decode(ours.encode(text), skip_special_tokens=True) == text
    named = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    assert [getattr(ours, name) for name in named] == [getattr(theirs, name) for name in named]


def test_our_tokenizer_gives_the_same_ids(both: tuple[Path, Path]) -> None:
    out, _ = both
    ours, theirs = load_tokenizer(out), transformers.AutoTokenizer.from_pretrained(out)
    for code, text in {**MANY, **TEXTS}.items():
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False), code
        assert ours.decode(ids) == text
    assert ours.eos_id == theirs.eos_token_id


def test_the_chat_template_renders(both: tuple[Path, Path], package: str) -> None:
    out, file = both
    ours = transformers.AutoTokenizer.from_pretrained(out)
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert ours.chat_template == theirs.chat_template
    messages = [{"role": "user", "content": "Wie geht's?"}]
    if package == GEMMA3:
        assert ours.chat_template is None
        return
    text = ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nWie geht's?<|im_end|>\n<|im_start|>assistant\n")
    ids, _ = load_tokenizer(out).encode_messages(messages, generation_prompt=True)
    assert ids == ours.encode(text, add_special_tokens=False)


def test_what_a_dry_run_tells(both: tuple[Path, Path], package: str, tmp_path: Path) -> None:
    from click.testing import CliRunner

    words = [
        "model",
        "import",
        f"package:{package}",
        "--out",
        str(tmp_path / "new"),
        "--dry-run",
        "--json",
        "--quiet",
    ]
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    about: dict[str, Any] = json.loads(done.stdout)
    out, _ = both
    weights = (out / "model.safetensors").stat().st_size
    assert weights - 100_000 < about["bytes"] < weights
    wanted = {
        SMOLLM2: ("llama", "float32", 134_515_008, 49_152, True),
        GEMMA3: ("gemma3", "float32", 268_098_176, 262_144, False),
    }[package]
    found = (
        about["architecture"],
        about["dtype"],
        about["parameters"],
        about["vocabulary"]["tokens"],
        about["chat_template"],
    )
    assert found == wanted
    assert not (tmp_path / "new").exists()
