"""SmolLM2-135M and Gemma-3-270M, as `transformers` computes them, through our decoder and its methods."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from koine.combine import upcycle_btx
from koine.evaluate import bits_per_byte
from koine.generate import LocalEngine, Sampling
from koine.model import Decoder, load_causal_lm
from koine.tokenizer import load_tokenizer
from tests.starter import GEMMA3, SMOLLM2, model_directory

pytestmark = pytest.mark.starter
transformers = pytest.importorskip("transformers", reason="the comparison needs the extra [hf]")

TEXTS = {
    "en": "The harbour was quiet that morning. Two boats had left before dawn, and the third waited for its crew.",
    "de": "Der Hafen lag an diesem Morgen still da. Zwei Boote waren vor Sonnenaufgang ausgelaufen.",
    "fr": "Le port était calme ce matin-là. Deux bateaux étaient partis avant l'aube.",
    "ja": "その朝、港は静かだった。二隻の船は夜明け前に出ていた。",
    "hi": "उस सुबह बंदरगाह शांत था। दो नावें भोर से पहले निकल चुकी थीं।",
    "ar": "كان الميناء هادئا في ذلك الصباح. غادر قاربان قبل الفجر.",
}
NEW_TOKENS = 64


@pytest.fixture(scope="module", params=[SMOLLM2, GEMMA3])
def folder(request: pytest.FixtureRequest) -> Path:
    return model_directory(str(request.param))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_our_decoder_opens_it(folder: Path) -> None:
    assert isinstance(load_causal_lm(folder), Decoder)


def test_greedy_continuations_are_those_of_transformers(folder: Path, theirs: Any) -> None:
    """All texts in one batch here, one after another there."""
    engine = LocalEngine(folder, dtype="float32")
    prompts = [engine.encode_text(text) for text in TEXTS.values()]
    pending = [
        engine.submit(prompt, Sampling(temperature=0, max_new_tokens=NEW_TOKENS)) for prompt in prompts
    ]
    for one in pending:
        engine.wait(one)
    for (language, _), prompt, one in zip(TEXTS.items(), prompts, pending, strict=True):
        with torch.no_grad():
            whole = theirs.generate(
                torch.tensor([prompt]),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=sorted(engine.stop_ids),
            )
        assert list(one.completion().tokens) == whole[0, len(prompt) :].tolist(), language


def test_a_mixture_of_branches_answers_as_its_class_in_transformers(tmp_path: Path) -> None:
    """Two branches of SmolLM2, upcycled to a Mixtral. Other choices of the router give other texts."""
    seed = model_directory(SMOLLM2)
    branches = {
        name: write_branch(seed, tmp_path / name, number) for number, name in enumerate(("code", "law"))
    }
    upcycle_btx(seed, branches, tmp_path / "mixture", top_k=2, normalise_top_k=True)
    engine = LocalEngine(tmp_path / "mixture", dtype="float32")
    prompts = [engine.encode_text(TEXTS[language]) for language in ("en", "de")]
    pending = [engine.submit(prompt, Sampling(temperature=0, max_new_tokens=16)) for prompt in prompts]
    for one in pending:
        engine.wait(one)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "mixture", dtype=torch.float32
    ).eval()
    assert type(model).__name__ == "MixtralForCausalLM"
    for prompt, one in zip(prompts, pending, strict=True):
        with torch.no_grad():
            whole = model.generate(
                torch.tensor([prompt]),
                max_new_tokens=16,
                do_sample=False,
                eos_token_id=sorted(engine.stop_ids),
            )
        assert list(one.completion().tokens) == whole[0, len(prompt) :].tolist()


def write_branch(seed: Path, out: Path, number: int) -> Path:
    """Write the seed with random numbers of a tenth of each matrix's spread added."""
    shutil.copytree(seed, out, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(seed / "model.safetensors")
    generator = torch.Generator().manual_seed(number)
    for tensor in tensors.values():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
        tensor.add_((0.1 * tensor.float().std() * noise).to(tensor.dtype))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_bits_per_byte_are_those_of_transformers(folder: Path, theirs: Any) -> None:
    tokenizer, model = load_tokenizer(folder), load_causal_lm(folder, dtype=torch.float32)
    records = [{"text": text, "language": language} for language, text in TEXTS.items()]
    found = bits_per_byte(model, tokenizer, records)["languages"]
    for language, text in TEXTS.items():
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text)]])
        with torch.no_grad():
            mean = float(theirs(ids, labels=ids).loss)
        expected = mean * (ids.shape[1] - 1) / math.log(2) / len(text.encode())
        # A sum of some thirty float32 numbers in another order.
        assert found[language]["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
