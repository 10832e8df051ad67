"""Merging by token in many architectures, checked by the logits of transformers' own modules."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from koine.combine.merging.config import MergeConfig
from koine.combine.merging.runner import run_merge
from koine.errors import UserError
from tests.combine.merge_configs import tensors

transformers = pytest.importorskip("transformers")

TOKENS = 61
SMALL = {
    "vocab_size": TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_ctx": 64, "hidden_size": None}
SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "hidden_size": None,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "CausalLM", {}),
    "llama, rounded up": ("llama", "CausalLM", {"vocab_size": 64, "tokens": 61}),
    "gptj, rounded up": ("gptj", "CausalLM", {**GPT, "rotary_dim": 4, "vocab_size": 64, "tokens": 61}),
    "llama, tied": ("llama", "CausalLM", {"tie_word_embeddings": True}),
    "llama, as wide as its vocabulary": (
        "llama",
        "CausalLM",
        {"hidden_size": 64, "vocab_size": 64, "intermediate_size": 64},
    ),
    "gpt2, as many positions as tokens": (
        "gpt2",
        "CausalLM",
        {**GPT, "n_positions": TOKENS, "max_position_embeddings": None},
    ),
    "gpt2": ("gpt2", "CausalLM", GPT),
    "gptj": ("gptj", "CausalLM", {**GPT, "rotary_dim": 4}),
    "codegen": ("codegen", "CausalLM", {**GPT, "rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", "CausalLM", {}),
    "gpt_neo": (
        "gpt_neo",
        "CausalLM",
        {
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "num_hidden_layers": None,
        },
    ),
    "phi": ("phi", "CausalLM", {}),
    "bloom": ("bloom", "CausalLM", {"n_layer": 2, "n_head": 4}),
    "opt": ("opt", "CausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "falcon": ("falcon", "CausalLM", {"num_kv_heads": 2}),
    "mpt": ("mpt", "CausalLM", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "mamba": ("mamba", "CausalLM", {"state_size": 4, "num_heads": None}),
    "rwkv": ("rwkv", "CausalLM", {"attention_hidden_size": 32}),
    "ctrl": ("ctrl", "CausalLM", {**GPT, "dff": 48}),
    "xglm": ("xglm", "CausalLM", {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}),
    "biogpt": ("biogpt", "CausalLM", {}),
    "mixtral": ("mixtral", "CausalLM", {"num_local_experts": 4}),
    "mixtral, as many experts as tokens": ("mixtral", "CausalLM", {"num_local_experts": TOKENS}),
    "gemma3n": (
        "gemma3n_text",
        "CausalLM",
        {
            "vocab_size_per_layer_input": TOKENS - 4,
            "hidden_size_per_layer_input": 8,
            "head_dim": 8,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "activation_sparsity_pattern": [0.0, 0.0],
            "intermediate_size": [48, 48],
            "altup_num_inputs": 2,
        },
    ),
    "bert": ("bert", "MaskedLM", {}),
    "bert, as many types as tokens": ("bert", "MaskedLM", {"type_vocab_size": TOKENS}),
    "roberta": ("roberta", "MaskedLM", {}),
    "distilbert": ("distilbert", "MaskedLM", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    "electra": ("electra", "MaskedLM", {"embedding_size": 16}),
    "albert": ("albert", "MaskedLM", {"embedding_size": 16}),
    "xlm": ("xlm", "MaskedLM", {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_langs": 1}),
    "modernbert": ("modernbert", "MaskedLM", {}),
    "aya_vision": (
        "aya_vision",
        "ImageTextToText",
        {
            "text_config": {
                **SMALL,
                "model_type": "cohere2",
                "head_dim": 8,
                "sliding_window": 8,
                "vocab_size": TOKENS,
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
        },
    ),
    "t5": (
        "t5",
        "Seq2SeqLM",
        {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    ),
    "bart": ("bart", "Seq2SeqLM", SEQ),
    "marian": ("marian", "Seq2SeqLM", SEQ),
}


def write_vocabulary(folder: Path, ids: list[int]) -> None:
    """A tokenizer.json in which token `t` has the id `ids[t]`."""
    vocabulary = {f"t{token}": place for token, place in enumerate(ids)}
    content = {"model": {"type": "WordLevel", "vocab": vocabulary}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def write_both(folder: Path, sizes: dict[str, Any]) -> list[int]:
    """Tokenizers of `a` and `b` with the same tokens; the ids of those of `a` in `b`."""
    count = sizes.get("tokens", sizes.get("vocab_size", TOKENS))
    # Tokens whose id a shorter table does not reach stay beyond it in both.
    short = sizes.get("vocab_size_per_layer_input", count)
    order = torch.randperm(short - 3, generator=torch.Generator().manual_seed(2)) + 3
    places = [0, 1, 2, *order.tolist(), *range(short, count)]
    write_vocabulary(folder / "a", list(range(count)))
    write_vocabulary(folder / "b", places)
    return places


def build(kind: str, task: str, sizes: dict[str, Any], folder: Path, seed: int) -> Any:
    """Build a model without zero parameters, so that a wrong row shows."""
    usual = {} if "text_config" in sizes else SMALL
    fields = {
        name: value for name, value in {**usual, **sizes}.items() if value is not None and name != "tokens"
    }
    torch.manual_seed(seed)
    config = transformers.CONFIG_MAPPING[kind](**fields)
    model = getattr(transformers, f"AutoModelFor{task}").from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name == "final_logits_bias":
                buffer.add_(torch.randn_like(buffer))
    model.save_pretrained(folder)
    # As it is opened again: some tensors follow from the configuration and are not saved.
    return type(model).from_pretrained(folder).eval()


def logits(model: Any, ids: Tensor) -> Tensor:
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found = model(input_ids=ids, **more).logits
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("case", CASES)
def test_rows_are_matched_by_token(case: str, tmp_path: Path) -> None:
    """A merge with weight 1 on the second model has its logits, with the first model's token ids.

    No test names the tensors with a row per token. A merge with equal weights is the mean of both one-sided
    merges, tensor by tensor, in float64.
    """
    kind, task, sizes = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second = build(kind, task, sizes, tmp_path / "b", 1)
        build(kind, task, sizes, tmp_path / "a", 0)
    places = write_both(tmp_path, sizes)
    short = sizes.get("vocab_size_per_layer_input", len(places))
    for name, weights in (("one", (1.0, 0.0)), ("two", (0.0, 1.0)), ("half", (0.5, 0.5))):
        config = MergeConfig(
            method="linear",
            models=(tmp_path / "a", tmp_path / "b"),
            weights=weights,
            tokenizer="first",
            unrelated=True,
        )
        run_merge(config, tmp_path / name)
    opened, about = getattr(transformers, f"AutoModelFor{task}").from_pretrained(
        tmp_path / "two", output_loading_info=True
    )
    assert not about["missing_keys"]
    ids = torch.randint(3, short, (2, 9), generator=torch.Generator().manual_seed(3))
    moved = torch.tensor(places)
    wanted, found = logits(second, moved[ids])[..., moved], logits(opened.eval(), ids)[..., : len(places)]
    # The same products of float32 in another order of rows.
    assert torch.allclose(found, wanted, atol=1e-4, rtol=1e-4), float((found - wanted).abs().max())
    one, two, half = (tensors(tmp_path / name) for name in ("one", "two", "half"))
    for name, tensor in half.items():
        if tensor.is_floating_point():
            middle = (one[name].double() + two[name].double()) / 2
            assert (tensor.double() - middle).abs().max() < 1e-6, name


def without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("koine.model.formats.library_config", "koine.combine.compatibility"):
        monkeypatch.setattr(f"{module}.library_config", lambda value, *, where: None)


@pytest.mark.parametrize(
    "case", ["llama", "gpt2", "gptj", "bloom", "bert", "roberta", "distilbert", "mixtral", "gemma3n", "rwkv"]
)
def test_without_transformers_size_and_place_decide(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_the_library(monkeypatch)
    test_rows_are_matched_by_token(case, tmp_path)


@pytest.mark.parametrize(
    "case",
    [
        "bert, as many types as tokens",
        "gpt2, as many positions as tokens",
        "llama, as wide as its vocabulary",
    ],
)
def test_ambiguous_sizes_are_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two dimensions of one length cannot be told apart without transformers."""
    without_the_library(monkeypatch)
    with pytest.raises(UserError, match="is as long as the vocabulary and as other parts of the model"):
        test_rows_are_matched_by_token(case, tmp_path)


def test_moving_a_model_with_token_tables_in_layers_is_refused(tmp_path: Path) -> None:
    """Moving to another tokenizer moves embedding and head; a model with more tables is refused."""
    from koine.model.adapt import move_model
    from koine.tokenizer import train_tokenizer
    from koine.tokenizer.special import SMALLEST_VOCABULARY

    kind, task, sizes = CASES["gemma3n"]
    train_tokenizer(
        {"de": lambda: ["ein Text"]}, vocab_size=SMALLEST_VOCABULARY, scheme="natural", english_share=None
    ).save(tmp_path / "tokenizer")
    count = {"vocab_size": SMALLEST_VOCABULARY, "vocab_size_per_layer_input": SMALLEST_VOCABULARY}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build(kind, task, {**sizes, **count}, tmp_path / "model", 0)
    for file in (tmp_path / "tokenizer").iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"another table of tokens .*embed_tokens_per_layer"):
        move_model(tmp_path / "model", tmp_path / "tokenizer", tmp_path / "out")
    assert not (tmp_path / "out").exists()
