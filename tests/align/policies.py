"""A tokenizer, small policies, held-out pairs and prompts in two languages."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from koine.align.held_out import HeldOutPair, HeldOutPrompt
from koine.model.causal_lm import CausalLM
from koine.model.decoder import Decoder
from koine.tokenizer import Tokenizer, train_tokenizer
from tests.data.conftest import document
from tests.train.models import small_config


@cache
def tokenizer() -> Tokenizer:
    texts = [document(number, 30) for number in range(200)]
    return train_tokenizer({"en": lambda: texts}, vocab_size=350, english_share=None, min_frequency=2)


def policy(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(small_config(tokenizer().vocab_size))
    # Larger weights than a new model's, so that its distributions are not uniform.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(12)
    return model.eval()


def llama(seed: int = 0) -> CausalLM:
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer().vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    return CausalLM(transformers.LlamaForCausalLM(config)).eval()


def pairs(count: int = 6) -> list[HeldOutPair]:
    found = []
    for number in range(count):
        prompt, chosen, rejected = (
            tuple(tokenizer().encode(document(seed + number, length)))
            for seed, length in ((0, 6), (100, 4 + number), (200, 9))
        )
        found.append(HeldOutPair(prompt, chosen, rejected, "de" if number % 3 else "hi"))
    return found


def prompts(count: int = 6) -> list[HeldOutPrompt]:
    found = []
    for number in range(count):
        messages = ({"role": "user", "content": document(300 + number, 4)},)
        ids, _ = tokenizer().encode_messages(list(messages), generation_prompt=True)
        code = "de" if number % 3 else "hi"
        found.append(HeldOutPrompt(f"p{number}", code, messages, tuple(ids), {"wanted": number}))
    return found


def save_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer().save(folder)
    return folder
