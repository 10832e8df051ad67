"""A model moved to another tokenizer: shared rows, new rows, tied and untied heads, and moving back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from koine.errors import UserError
from koine.model import load_model
from koine.model.adapt import move_model
from koine.model.adapt.vocabulary_transfer import RECORD, match_tokenizers
from koine.model.causal_lm import load_with_transformers
from koine.tokenizer import Tokenizer, load_tokenizer
from koine.tokenizer.embedding_init import auxiliary_vectors, initialise_rows, sparsemax
from koine.tokenizer.extend import extend_tokenizer
from tests.model.adapt.conftest import KOREAN, trained


def test_shared_tokens_keep_their_rows_and_new_ones_are_initialised_by_the_method(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    model, tokenizer = folders
    old_rows = load_model(model).embedding.weight.detach()
    before, after = load_tokenizer(model), load_tokenizer(tokenizer)
    vocabulary = before.vocabulary()
    for method in ("random", "mean", "subword-mean"):
        moved = move_model(model, tokenizer, tmp_path / method, method=method)
        rows = load_model(tmp_path / method).embedding.weight.detach()
        assert len(rows) == after.vocab_size
        fresh = []
        for token, index in after.vocabulary().items():
            if token in vocabulary:
                assert torch.equal(rows[index], old_rows[vocabulary[token]]), token
            else:
                fresh.append(index)
                if method == "mean":
                    torch.testing.assert_close(rows[index], old_rows.mean(dim=0))
                if method == "subword-mean":
                    pieces = before.encode(after.token_bytes(index).decode("utf-8", errors="ignore"))
                    if b"".join(map(before.token_bytes, pieces)) == after.token_bytes(index):
                        torch.testing.assert_close(rows[index], old_rows[pieces].mean(dim=0))
        assert moved.spelled == len(fresh) > 20
        if method == "random":
            assert float(rows[fresh].std()) == pytest.approx(float(old_rows.std()), rel=0.2)


def test_no_folder_is_replaced_unasked(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, tokenizer = folders
    weights = (model / "model.safetensors").read_bytes()
    move_model(model, tokenizer, tmp_path / "out")
    for out in (model, tmp_path / "out"):
        with pytest.raises(UserError, match="exists already"):
            move_model(model, tokenizer, out)
    with pytest.raises(UserError):
        move_model(model, tokenizer, model, overwrite=True)
    move_model(model, tokenizer, tmp_path / "out", overwrite=True)
    assert (model / "model.safetensors").read_bytes() == weights


def test_the_moved_model_scores_shared_tokens_as_before(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """The logits of shared tokens after a text of shared tokens depend on shared rows alone."""
    model, tokenizer = folders
    move_model(model, tokenizer, tmp_path / "moved")
    match = match_tokenizers(model, tokenizer)
    new_ids = [index for index in sorted(match.shared) if index > 60][:20]
    old_ids = [match.shared[index] for index in new_ids]
    one, two = load_model(model), load_model(tmp_path / "moved")
    with torch.no_grad():
        before = one.logits(one(torch.tensor([old_ids])))[..., old_ids]
        after = two.logits(two(torch.tensor([new_ids])))[..., new_ids]
    torch.testing.assert_close(before, after, atol=1e-5, rtol=0)


def test_moving_back_restores_the_model_where_no_token_was_dropped(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    model, _ = folders
    extended = extend_tokenizer(model, ((text, 1) for text in KOREAN), new_tokens=30).tokenizer
    extended.save(tmp_path / "longer")
    there = move_model(model, tmp_path / "longer", tmp_path / "there")
    assert there.reversible
    move_model(tmp_path / "there", model, tmp_path / "back")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (model / name).read_bytes()
    assert json.loads((tmp_path / "there" / RECORD).read_text(encoding="utf-8"))["dropped"] == []
    back = json.loads((tmp_path / "back" / RECORD).read_text(encoding="utf-8"))
    assert len(back["dropped"]) == 30


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_of_transformers(tied: bool, folders: tuple[Path, Path], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, tokenizer = folders
    before, after = load_tokenizer(model), load_tokenizer(tokenizer)
    config = transformers.LlamaConfig(
        vocab_size=before.vocab_size + 3,  # padded, as published models often are
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    llama = transformers.LlamaForCausalLM(config)
    llama.save_pretrained(tmp_path / "llama")
    before.save(tmp_path / "llama")
    move_model(tmp_path / "llama", tokenizer, tmp_path / "moved")
    inner = load_with_transformers(tmp_path / "moved").inner
    assert inner.get_input_embeddings().weight.shape[0] == after.vocab_size + 3
    assert inner.config.tie_word_embeddings is tied
    assert inner.config.eos_token_id == after.eos_id
    match = match_tokenizers(model, tokenizer)
    new, old = (torch.tensor(side) for side in zip(*sorted(match.shared.items()), strict=True))
    for ours, theirs in (
        (inner.get_input_embeddings(), llama.get_input_embeddings()),
        (inner.get_output_embeddings(), llama.get_output_embeddings()),
    ):
        assert torch.equal(ours.weight[new], theirs.weight[old])
    assert (tmp_path / "moved" / "chat_template.jinja").exists()


def test_sparsemax_is_the_projection_on_the_simplex() -> None:
    torch.testing.assert_close(sparsemax(torch.tensor([[0.1, 1.3, 0.2]])), torch.tensor([[0.0, 1.0, 0.0]]))
    torch.testing.assert_close(sparsemax(torch.tensor([[0.5, 0.7, -2.0]])), torch.tensor([[0.4, 0.6, 0.0]]))
    scores = torch.randn(50, 20, dtype=torch.float64)
    found = sparsemax(scores)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(50, dtype=torch.float64))
    # no other point of the simplex is nearer
    other = torch.softmax(torch.randn(50, 20, dtype=torch.float64) * 3, dim=1)
    assert bool(((found - scores).norm(dim=1) <= (other - scores).norm(dim=1)).all())


def test_tokens_of_similar_contexts_have_similar_vectors() -> None:
    documents = [[1, 10, 2], [1, 11, 2], [3, 20, 4], [3, 21, 4]] * 20
    vectors = torch.nn.functional.normalize(auxiliary_vectors(documents, 30, size=8), dim=1)
    assert float(vectors[10] @ vectors[11]) > 0.9 > 0.5 > float(vectors[10] @ vectors[20])
    assert float(vectors[5].norm()) == 0.0


def test_focus_mixes_rows_of_tokens_of_similar_use() -> None:
    from koine.tokenizer.vocabulary_match import VocabularyMatch

    old = torch.eye(4)
    match = VocabularyMatch(
        shared={0: 0, 1: 1, 2: 2}, pieces={3: (0, 1)}, dropped=(3,), new_size=4, old_size=4
    )
    auxiliary = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.0, 2.0]])
    rows = initialise_rows(old, match, method="focus", generator=torch.Generator(), auxiliary=auxiliary)
    # similarities 0, 1, 0.8: sparsemax keeps the last two as 0.6 and 0.4
    torch.testing.assert_close(rows[3], 0.6 * old[1] + 0.4 * old[2])
    assert torch.equal(rows[:3], old[:3])


def test_invalid_moves_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, tokenizer = folders
    with pytest.raises(UserError, match="learns from text"):
        move_model(model, tokenizer, tmp_path / "out", method="focus")
    with pytest.raises(UserError, match="learns from text"):
        move_model(model, tokenizer, tmp_path / "out", method="distill", texts=iter([" ", ""]))
    with pytest.raises(UserError, match="subword-mean"):
        move_model(model, tokenizer, tmp_path / "out", method="subword-men")  # type: ignore[arg-type]
    (model / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="holds no tokenizer"):
        move_model(model, tokenizer, tmp_path / "out")


def llama_of(tokenizer: Tokenizer, folder: Path, *, padding: int = 0, **named: object) -> Path:
    """A tiny model of transformers with this tokenizer, its embedding padded."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size + padding,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    llama = transformers.LlamaForCausalLM(config)
    for name, value in named.items():
        setattr(llama.generation_config, name, value)
    llama.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def test_moving_back_keeps_the_padding(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = folders
    padded = llama_of(load_tokenizer(model), tmp_path / "padded", padding=12)
    extend_tokenizer(model, ((text, 1) for text in KOREAN), new_tokens=30).tokenizer.save(tmp_path / "longer")
    there = move_model(padded, tmp_path / "longer", tmp_path / "there")
    assert there.reversible
    assert there.padding == 12
    move_model(tmp_path / "there", model, tmp_path / "back")
    before, after = (load_file(folder / "model.safetensors") for folder in (padded, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_all_eos_ids_are_mapped(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, tokenizer = folders[0], tmp_path / "korean"
    trained(KOREAN, 330).save(tokenizer)
    before, after = load_tokenizer(model), load_tokenizer(tokenizer)
    gone = next(
        index
        for token, index in sorted(before.vocabulary().items())
        if token not in after.vocabulary() and before.token_bytes(index)
    )
    comma = before.encode(",")[0]
    padded = llama_of(before, tmp_path / "llama", eos_token_id=[before.eos_id, comma, gone])
    move_model(padded, tokenizer, tmp_path / "moved")
    found = json.loads((tmp_path / "moved" / "generation_config.json").read_text(encoding="utf-8"))
    assert found["eos_token_id"] == [after.eos_id, after.encode(",")[0]]


@pytest.mark.parametrize("has_markers", [True, False])
def test_the_chat_template_is_kept_where_its_special_tokens_exist(
    has_markers: bool, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    from koine.errors import KoineWarning
    from koine.tokenizer.special import START_OF_TURN

    model, tokenizer = folders
    (tokenizer / "chat_template.jinja").unlink()
    if not has_markers:
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            text = (tokenizer / name).read_text(encoding="utf-8")
            (tokenizer / name).write_text(text.replace(START_OF_TURN, "<|else|>"), encoding="utf-8")
    if has_markers:
        move_model(model, tokenizer, tmp_path / "out")
        assert load_tokenizer(tmp_path / "out").chat_template == load_tokenizer(model).chat_template
    else:
        with pytest.warns(
            KoineWarning, match=r"chat template is left behind.*lacks '<\|START_OF_TURN_TOKEN\|>'"
        ):
            move_model(model, tokenizer, tmp_path / "out")
        assert load_tokenizer(tmp_path / "out").chat_template is None


def test_transformers_prints_nothing_to_standard_error(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, tokenizer = folders
    llama = llama_of(load_tokenizer(model), tmp_path / "llama")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "koine", "tokenizer", "adapt", str(llama)),
            *("--tokenizer", str(tokenizer), "--out", str(tmp_path / "out")),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert done.stdout.endswith(f"written to {tmp_path / 'out'}\n")
