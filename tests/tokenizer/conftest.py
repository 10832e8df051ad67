"""A small tokenizer, trained once."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from koine.tokenizer import Tokenizer, train_tokenizer

TEXTS = {
    "en": [f"The territory number {i} isn't far; NASA's map says {i * 37}.\n\n" for i in range(200)],
    "de": [f"Das Gebiet {i} liegt nicht weit, sagt die Karte: {i * 37}." for i in range(200)],
    "hi": [f"यह क्षेत्र {i} दूर नहीं है।" for i in range(200)],
    "ja": [f"東京は日本の首都です。{i}" for i in range(200)],
}


@pytest.fixture(scope="session")
def small() -> Tokenizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train_tokenizer(
            {code: (lambda part=part: part) for code, part in TEXTS.items()}, vocab_size=500
        )


@pytest.fixture(params=["gemma", "llama"])
def metaspace(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Folder of a tiny byte-fallback BPE tokenizer for English: `▁` for a space, `<0xE0>` for bytes.

    One is like Gemma's: no pre-token cuts, no leading space. The other is like Llama's: a space before every
    text.
    """
    return save_metaspace(tmp_path / request.param, leading_space=request.param == "llama")


def save_metaspace(folder: Path, *, leading_space: bool) -> Path:
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if leading_space:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*fallback, decoders.Strip(" ", 1, 0)] if leading_space else fallback)
    special = [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    # The library's trainer wants words; the merges are learnt on these, and the tokens of bytes come with the special ones.
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=[*special, *byte_tokens], show_progress=False, min_frequency=2
    )
    words = [f"▁{word}" for text in TEXTS["en"] for word in text.split()]
    learner = Backend(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(" ")
    learner.train_from_iterator([" ".join(words)], trainer)
    content = json.loads(backend.to_str())
    learnt = json.loads(learner.to_str())
    content["model"] |= {"vocab": learnt["model"]["vocab"], "merges": learnt["model"]["merges"]}
    content["added_tokens"] = [token for token in learnt["added_tokens"] if token["id"] < 3]
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    return folder
