"""The engine's answers are those of transformers' own generation; its cache and its neighbours change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from koine.errors import UserError
from koine.serve import LocalEngine, Sampling
from koine.serve.engine import Completion

GREEDY = Sampling(temperature=0, max_new_tokens=12)
QUESTION = [{"role": "user", "content": "Wie heißt das?"}]


@pytest.fixture(scope="module")
def engine(model_folder: Path) -> LocalEngine:
    return LocalEngine(model_folder, dtype="float32", threads=1)


@pytest.fixture(scope="module")
def foreign_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights, with the same tokenizer."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("llama")
    engine = LocalEngine(model_folder)
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=engine.tokenizer.vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=256,
        )
    ).save_pretrained(folder)
    engine.tokenizer.save(folder)
    return folder


def reference(
    folder: Path, engine: LocalEngine, prompt: list[int], count: int
) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities by transformers."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, return_dict_in_generate=True,
        output_logits=True, eos_token_id=sorted(engine.stop_ids), pad_token_id=0,
    )  # fmt: skip
    tokens = out.sequences[0, len(prompt) :].tolist()
    scores = [
        float(logits[0].log_softmax(-1)[token]) for logits, token in zip(out.logits, tokens, strict=True)
    ]
    return tokens, scores


@pytest.mark.parametrize("which", ["ours", "llama"])
def test_greedy_answers_and_log_probabilities_are_those_of_transformers(
    which: str, model_folder: Path, foreign_folder: Path
) -> None:
    folder = model_folder if which == "ours" else foreign_folder
    engine = LocalEngine(folder, dtype="float32", threads=1)
    [completion] = engine.generate([QUESTION], GREEDY)
    tokens, scores = reference(folder, engine, engine.encode(QUESTION), GREEDY.max_new_tokens)
    assert list(completion.tokens) == tokens
    # float32 with differently fused kernels: rounding of a few ulp over a handful of layers
    assert completion.log_probabilities == pytest.approx(scores, abs=1e-4)


def test_log_probabilities_are_the_models_own_whatever_the_sampling(engine: LocalEngine) -> None:
    drawn = Sampling(temperature=2.0, top_k=5, repetition_penalty=1.5, seed=4, max_new_tokens=8)
    [completion] = engine.generate([QUESTION], drawn)
    prompt = engine.encode(QUESTION)
    with torch.inference_mode():
        logits = engine.model.logits(engine.model(torch.tensor([[*prompt, *completion.tokens]])))[0]
    expected = logits.float().log_softmax(-1)[
        range(len(prompt) - 1, len(prompt) + len(completion.tokens) - 1)
    ]
    own = expected.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0].tolist()
    assert completion.log_probabilities == pytest.approx(own, abs=1e-4)


def fresh(folder: Path, conversation: list[dict[str, str]], sampling: Sampling) -> Completion:
    return LocalEngine(folder, dtype="float32", threads=1).generate([conversation], sampling)[0]


def test_the_cache_of_earlier_turns_is_used_and_changes_no_answer(model_folder: Path) -> None:
    engine = LocalEngine(model_folder, dtype="float32", threads=1)
    prompt = engine.encode(QUESTION)
    tokens = [token.id for token in engine.stream(prompt, GREEDY)]
    # the next turn as tokens: all that was read, and more
    longer = [*prompt, *tokens, *engine.tokenizer.encode("und das?")]
    read = len(engine._reader.tokens)
    assert read == len(prompt) + len(tokens) - 1
    assert engine._reader.continues(longer)
    fed: list[int] = []
    feed = engine._reader.read
    engine._reader.read = lambda new: (fed.append(len(new)), feed(new))[1]  # type: ignore[method-assign]
    kept = [token.id for token in engine.stream(longer, GREEDY)]
    assert fed[0] == len(longer) - read
    anew = [
        token.id for token in LocalEngine(model_folder, dtype="float32", threads=1).stream(longer, GREEDY)
    ]
    assert kept == anew


def test_another_conversation_is_read_from_its_beginning(model_folder: Path) -> None:
    engine = LocalEngine(model_folder, dtype="float32", threads=1)
    other = [{"role": "user", "content": "Etwas ganz anderes"}]
    engine.generate([QUESTION], GREEDY)
    assert engine.generate([other], GREEDY)[0] == fresh(model_folder, other, GREEDY)


def test_an_interrupted_reading_forgets_the_cache(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = LocalEngine(model_folder, dtype="float32", threads=1)
    answer = engine.stream(engine.encode(QUESTION), GREEDY)
    next(answer)

    def interrupt(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.model.blocks[-1], "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(answer)
    assert engine._reader.tokens == []
    assert engine.generate([QUESTION], GREEDY)[0] == fresh(model_folder, QUESTION, GREEDY)


def test_a_completion_does_not_depend_on_its_neighbours(engine: LocalEngine) -> None:
    sampling = Sampling(temperature=1.0, seed=11, max_new_tokens=6)
    other = [{"role": "user", "content": "x" * 50}]
    together = engine.generate([QUESTION, other], sampling)
    assert together[0] == engine.generate([QUESTION], sampling)[0]
    assert together[1] != together[0]


def test_same_seed_same_answer_and_none_draws_afresh(engine: LocalEngine) -> None:
    seeded = Sampling(temperature=1.0, seed=5, max_new_tokens=16)
    free = Sampling(temperature=1.0, max_new_tokens=16)
    assert engine.generate([QUESTION], seeded) == engine.generate([QUESTION], seeded)
    # 16 draws from about 300 nearly equal tokens: equal by chance once in 300^16
    assert engine.generate([QUESTION], free) != engine.generate([QUESTION], free)


def test_what_does_not_fit_is_refused(foreign_folder: Path) -> None:
    engine = LocalEngine(foreign_folder)
    assert engine.context == 256
    with pytest.raises(UserError, match="conversation 2 is .* tokens long and the model's context holds 256"):
        engine.generate([QUESTION, [{"role": "user", "content": "x" * 300}]], GREEDY)


def test_the_device_must_be_here(model_folder: Path) -> None:
    with pytest.raises(UserError, match="unknown device 'gpu'; give cpu"):
        LocalEngine(model_folder, device="gpu")
    with pytest.raises(UserError, match="no device 'cuda:99' here; there is: cpu"):
        LocalEngine(model_folder, device="cuda:99")
