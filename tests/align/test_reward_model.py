"""Reward models: scores do not depend on packing; folders are those of `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from koine.align.reward_scores import RewardScorer, completion_scores, load_scorer, token_scores
from koine.data.preference_order import PreferenceOrder
from koine.errors import UserError
from koine.model.causal_lm import CausalLM, register_with_transformers
from koine.model.config import LayerSpec, ModelConfig, hybrid_layers
from koine.model.decoder import Decoder
from koine.model.formats.directory import save_model
from koine.model.reward_model import RewardModel, load_reward_model, start_reward_model
from koine.tokenizer import load_tokenizer
from tests.align.pairs import pair_mixture, pair_records, write_pairs, write_tokenizer

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("reward") / "tokenizer")


@pytest.fixture(scope="module")
def pairs(tokenizer: Path) -> Path:
    return write_pairs(tokenizer.parent / "pairs", tokenizer)


SIZES: dict[str, Any] = {
    "vocab_size": 350, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "num_kv_heads": 1,
    "head_dim": 16, "max_position_embeddings": 256,
}  # fmt: skip


def config(kind: str) -> ModelConfig:
    """Return a small configuration of a class: one that `transformers` scores with, and two that it does not."""
    if kind == "llama":
        return ModelConfig(
            **SIZES,
            layers=(LayerSpec(),) * 2,
            arrangement="pre_norm",
            norm="rms_norm",
            tie_embeddings=False,
            logit_scale=1.0,
            model_type="llama",
        )
    cohere2 = ModelConfig(**SIZES, layers=hybrid_layers(2, window=8, full_every=2))
    if kind == "cohere2":
        return cohere2
    # No class has both a window and no position encoding in one layer.
    return ModelConfig(**SIZES, layers=(LayerSpec(window=8, rope=False), LayerSpec()))


def language_model(kind: str, folder: Path, tokenizer: Path) -> Path:
    torch.manual_seed(1)
    decoder = Decoder(config(kind))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(3) if parameter.dim() > 1 else None
    save_model(decoder, folder, tokenizer=tokenizer)
    return folder


def test_scores_depend_on_neither_packing_nor_neighbours(
    tmp_path: Path, tokenizer: Path, pairs: Path
) -> None:
    model = start_reward_model(language_model("cohere2", tmp_path / "lm", tokenizer)).eval()
    batch = PreferenceOrder(pair_mixture(pairs, batch_size=3)).batch(0)
    assert any(len(row) > 1 for row in batch.documents), "the test needs rows of several groups"
    with torch.no_grad():
        shared = completion_scores(model, batch)
        separate = batch.separate()
        apart = completion_scores(model, separate)
        time = separate.tokens.shape[1]
        alone = [
            model.scores(
                model(separate.tokens[row : row + 1, : int((separate.document_ids[row] >= 0).sum())])
            )
            for row in range(len(separate.tokens))
        ]
    last = torch.stack([one[0, -1] for one in alone])
    assert time > 0
    assert float(shared.std()) > 0.01
    torch.testing.assert_close(shared, apart, rtol=0, atol=1e-5)
    torch.testing.assert_close(shared, last, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "cohere2", "koine"])
def test_folder_opens_in_transformers_with_equal_scores(tmp_path: Path, tokenizer: Path, kind: str) -> None:
    register_with_transformers()
    model = start_reward_model(language_model(kind, tmp_path / "lm", tokenizer), seed=4)
    model.save(tmp_path / "reward", tokenizer=tokenizer)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert type(theirs).__name__.endswith("ForSequenceClassification")
    assert theirs.config.num_labels == 1
    scorer = load_scorer(tmp_path / "reward")
    chats = [
        [{"role": "user", "content": one["prompt"]}, {"role": "assistant", "content": one["chosen"]}]
        for one in pair_records(7)
    ]
    ours = torch.tensor(scorer.score(chats))
    rows = [torch.tensor(scorer.encode(chat)) for chat in chats]
    assert len({len(row) for row in rows}) > 3
    for side in ("left", "right"):
        ids, mask = padded(rows, theirs.config.pad_token_id, side)
        with torch.no_grad():
            found = theirs(input_ids=ids, attention_mask=mask).logits[:, 0]
        torch.testing.assert_close(ours, found, rtol=0, atol=1e-5)


def padded(rows: list[Tensor], padding: int, side: str) -> tuple[Tensor, Tensor]:
    time = max(len(row) for row in rows)
    ids = torch.full((len(rows), time), padding)
    mask = torch.zeros(len(rows), time, dtype=torch.int64)
    for number, row in enumerate(rows):
        span = slice(time - len(row), time) if side == "left" else slice(0, len(row))
        ids[number, span], mask[number, span] = row, 1
    return ids, mask


def test_padding_that_ends_conversations_is_replaced(tmp_path: Path, tokenizer: Path) -> None:
    """As in many chat models, whose padding token is that of the end of a turn."""
    import json
    import shutil

    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer, folder)
    end = load_tokenizer(folder).end_of_turn_id
    text = next(one for one, token_id in load_tokenizer(folder).special_tokens.items() if token_id == end)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        value = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**value, "pad_token": text}))
    model = start_reward_model(language_model("llama", tmp_path / "lm", folder))
    model.save(tmp_path / "reward", tokenizer=folder)
    padding = transformers.AutoConfig.from_pretrained(tmp_path / "reward").pad_token_id
    assert padding != end
    assert load_tokenizer(tmp_path / "reward").pad_id == padding


def test_class_of_transformers_that_our_decoder_does_not_compute(
    tmp_path: Path, tokenizer: Path, pairs: Path
) -> None:
    torch.manual_seed(2)
    inner = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=350, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
            max_position_embeddings=128, tie_word_embeddings=False,
        )
    )  # fmt: skip
    CausalLM(inner).save(tmp_path / "lm", tokenizer=tokenizer)
    model = start_reward_model(tmp_path / "lm").float().eval()
    model.save(tmp_path / "reward", tokenizer=tokenizer)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    again = load_reward_model(tmp_path / "reward").eval()
    assert isinstance(again.backbone, CausalLM)
    batch = PreferenceOrder(pair_mixture(pairs)).batch(0)
    apart = batch.separate()
    ids = apart.tokens.masked_fill(apart.document_ids < 0, theirs.config.pad_token_id)
    with torch.no_grad():
        wanted = theirs(input_ids=ids, attention_mask=(apart.document_ids >= 0).long()).logits[:, 0]
        torch.testing.assert_close(completion_scores(model, batch), wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(completion_scores(again, batch), wanted, rtol=0, atol=1e-5)


def test_packed_scores_equal_single_ones(tmp_path: Path, tokenizer: Path) -> None:
    model = start_reward_model(language_model("cohere2", tmp_path / "lm", tokenizer))
    generator = torch.Generator().manual_seed(0)
    rows = [
        torch.randint(10, 350, (length,), generator=generator).tolist() for length in (3, 40, 7, 1, 39, 12)
    ]
    together = token_scores(model, rows)
    apart = [token_scores(model, [row])[0] for row in rows]
    assert together == pytest.approx(apart, abs=1e-5)
    assert len(set(apart)) == len(rows)


def test_folders_that_are_no_reward_model_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    lm = language_model("cohere2", tmp_path / "lm", tokenizer)
    with pytest.raises(UserError, match="holds no reward model"):
        load_reward_model(lm)
    start_reward_model(lm).save(tmp_path / "reward", tokenizer=tokenizer)
    from koine.model.causal_lm import load_causal_lm

    with pytest.raises(UserError, match="is a reward model"):
        load_causal_lm(tmp_path / "reward")


def test_conversations_without_an_answer_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    model = start_reward_model(language_model("cohere2", tmp_path / "lm", tokenizer))
    scorer = RewardScorer(model, load_tokenizer(tokenizer))
    with pytest.raises(UserError, match="does not end with an answer"):
        scorer.score([[{"role": "user", "content": "Hello"}]])
    long = [{"role": "user", "content": "a b " * 300}, {"role": "assistant", "content": "Yes"}]
    with pytest.raises(UserError, match="takes at most 256"):
        scorer.score([long])


def test_second_stage_starts_with_the_first_ones_head(tmp_path: Path, tokenizer: Path) -> None:
    model = start_reward_model(language_model("cohere2", tmp_path / "lm", tokenizer), seed=9)
    model.save(tmp_path / "reward", tokenizer=tokenizer)
    again = start_reward_model(tmp_path / "reward", seed=1)
    assert isinstance(again, RewardModel)
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=0)
