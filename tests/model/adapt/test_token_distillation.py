"""Rows of new tokens, trained to give the hidden states of the old tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from koine.model import Decoder, ModelConfig, load_model, save_model
from koine.model.adapt import move_model
from koine.model.adapt.token_distillation import snippets
from koine.model.adapt.vocabulary_transfer import match_tokenizers
from koine.tokenizer import load_tokenizer
from tests.model.adapt.conftest import GERMAN, KOREAN, trained
from tests.tokenizer.conftest import save_metaspace


def test_distillation_brings_the_hidden_states_closer(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, tokenizer = folders
    before, after = load_tokenizer(model), load_tokenizer(tokenizer)
    match = match_tokenizers(model, tokenizer)
    places = list(snippets(before, after, match, KOREAN[:20]))
    assert places
    place = places[3]
    assert b"".join(map(before.token_bytes, place.old_tokens)) == after.token_bytes(place.token)
    distance = {}
    for method in ("subword-mean", "distill"):
        move_model(model, tokenizer, tmp_path / method, method=method, texts=KOREAN)
        teacher, student = load_model(model), load_model(tmp_path / method)
        moved = {old: new for new, old in match.shared.items()}
        with torch.no_grad():
            wanted = teacher(torch.tensor([[*place.preceding, *place.old_tokens, *place.following]]))
            ids = [*(moved[i] for i in place.preceding), place.token, *(moved[i] for i in place.following)]
            got = student(torch.tensor([ids]))
        count = 1 + len(place.following)
        distance[method] = float((got[0, -count:] - wanted[0, -count:]).square().mean())
    assert distance["distill"] < distance["subword-mean"]


def test_distillation_on_a_llama_style_vocabulary(tiny: ModelConfig, tmp_path: Path) -> None:
    model = save_metaspace(tmp_path / "model", leading_space=True)
    before = load_tokenizer(model)
    save_model(Decoder(replace(tiny, vocab_size=before.vocab_size)), model)
    trained(GERMAN + KOREAN, 380).save(tmp_path / "new")
    after = load_tokenizer(tmp_path / "new")
    match = match_tokenizers(model, tmp_path / "new")
    places = list(snippets(before, after, match, KOREAN[:20]))
    assert places
    for place in places:
        assert b"".join(map(before.token_bytes, place.old_tokens)) == after.token_bytes(place.token)
    move_model(model, tmp_path / "new", tmp_path / "out", method="distill", texts=KOREAN)
    assert load_model(tmp_path / "out").embedding.weight.shape[0] == after.vocab_size
