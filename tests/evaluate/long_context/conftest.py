"""A tokenizer of five languages, prompt material, and a small model."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from koine.evaluate.long_context import ruler
from koine.evaluate.long_context.haystack import (
    sample_haystack,
    sample_texts,
)
from koine.evaluate.long_context.prompts import Material, Prompt, make_material
from koine.evaluate.long_context.tasks import DEPTH_TASKS, Cell, make_prompt
from koine.model import Decoder, ModelConfig, hybrid_layers, save_model
from koine.tokenizer import Tokenizer, train_tokenizer

LANGUAGES = ("en", "de", "ja", "hi", "th")


LENGTH = 512


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """A tokenizer of five languages of the sample world."""
    texts = {code: [*sample_texts(code)][:40] for code in LANGUAGES}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train_tokenizer({code: lambda code=code: texts[code] for code in texts}, vocab_size=900)


@pytest.fixture(scope="module")
def materials(words: Tokenizer) -> dict[str, Material]:
    return {
        code: make_material(words, sample_haystack(words.encode, at_least=3 * LENGTH, language=code))
        for code in LANGUAGES
    }


@pytest.fixture(scope="module")
def model_folder(words: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("long") / "model"
    config = ModelConfig(
        vocab_size=words.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        layers=hybrid_layers(4, window=32),
        max_position_embeddings=1024,
        bos_token_id=words.bos_id,
        eos_token_id=words.eos_id,
        pad_token_id=words.pad_id,
    )
    save_model(Decoder(config), folder)
    words.save(folder)
    return folder


def prompt_of(task: str, material: Material, *, depth: float | None = None, number: int = 0) -> Prompt:
    questions = ruler.sample_questions(material.language) if task == "question-answering" else None
    where = (0.5 if depth is None else depth) if task in DEPTH_TASKS else None
    return make_prompt(Cell(task, LENGTH, where, number), seed=0, material=material, questions=questions)


def text_of(words: Tokenizer, ids: tuple[int, ...]) -> str:
    return words.decode(ids)
