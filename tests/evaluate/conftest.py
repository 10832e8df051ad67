"""A byte-level tokenizer, and small causal LMs with the interface that scoring needs."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from koine.tokenizer import Tokenizer, train_tokenizer


class Uniform(nn.Module):
    """Every token is as likely as any other."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.zeros(*hidden.shape[:-1], self.vocab_size)


class Wrapped(nn.Module):
    """A causal LM of `transformers` behind the same interface."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.model(tokens).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(hidden)


class Scripted(nn.Module):
    """Predicts `answer_of[ids so far]`, else token 0."""

    def __init__(self, vocab_size: int, answer_of: dict[tuple[int, ...], int]) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.answer_of = answer_of
        self.tokens = torch.zeros(0)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.zeros(*tokens.shape, 1)
        for row, ids in enumerate(tokens.tolist()):
            for end in range(1, len(ids) + 1):
                hidden[row, end - 1, 0] = self.answer_of.get(tuple(ids[:end]), 0)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return nn.functional.one_hot(hidden[..., 0].long(), self.vocab_size).float()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    texts = ["Das Gebiet liegt nicht weit. 東京は日本の首都です。"] * 20
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train_tokenizer({"de": lambda: texts}, vocab_size=320)


@pytest.fixture(scope="session")
def llama(tokenizer: Tokenizer) -> Wrapped:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    return Wrapped(transformers.LlamaForCausalLM(config).eval())
