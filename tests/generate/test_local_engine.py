"""The engine's tokens equal those of transformers; its KV cache and batch change nothing."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from koine.errors import UserError
from koine.generate import LocalEngine, Sampling
from koine.generate.engine import Completion

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
def test_greedy_tokens_and_log_probabilities_equal_those_of_transformers(
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


@pytest.mark.parametrize("which", ["ours", "llama"])
def test_the_kv_cache_of_earlier_turns_is_reused_and_changes_no_token(
    which: str, model_folder: Path, foreign_folder: Path
) -> None:
    folder = model_folder if which == "ours" else foreign_folder
    engine = LocalEngine(folder, dtype="float32", threads=1)
    prompt = engine.encode(QUESTION)
    first = engine.submit(prompt, GREEDY)
    engine.wait(first)
    # the next turn as tokens: all that was read (the newest token was not), and more
    longer = [*prompt, *first.request.tokens, *engine.tokenizer.encode("und das?")]
    second = engine.submit(longer, GREEDY)
    engine.wait(second)
    assert second.request.cached_tokens == len(prompt) + len(first.request.tokens) - 1
    anew = LocalEngine(folder, dtype="float32", threads=1).stream(longer, GREEDY)
    assert second.request.tokens == [token.id for token in anew]


def test_another_conversation_is_prefilled_from_its_start(model_folder: Path) -> None:
    engine = LocalEngine(model_folder, dtype="float32", threads=1)
    other = [{"role": "user", "content": "Etwas ganz anderes"}]
    engine.generate([QUESTION], GREEDY)
    assert engine.generate([other], GREEDY)[0] == fresh(model_folder, other, GREEDY)


def test_an_interrupted_step_is_repeated(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LocalEngine(model_folder, dtype="float32", threads=1)
    answer = engine.stream(engine.encode(QUESTION), GREEDY)
    next(answer)

    def interrupt(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("koine.generate.cache.contexts.DecodeContext.finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            list(answer)
    assert not engine.scheduler.busy
    assert engine.generate([QUESTION], GREEDY)[0] == fresh(model_folder, QUESTION, GREEDY)


def test_a_stream_that_is_closed_is_cancelled(model_folder: Path) -> None:
    engine = LocalEngine(model_folder, dtype="float32", threads=1)
    answer = engine.stream(engine.encode(QUESTION), GREEDY)
    next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert not engine.scheduler.busy


@pytest.mark.parametrize("which", ["ours", "llama"])
def test_a_stop_string_ends_the_text_and_is_not_part_of_it(
    which: str, model_folder: Path, foreign_folder: Path
) -> None:
    engine = LocalEngine(model_folder if which == "ours" else foreign_folder, dtype="float32", threads=1)
    drawn = Sampling(temperature=1.0, seed=3, max_new_tokens=40)
    [whole] = engine.generate([QUESTION], drawn)
    stop = whole.text[12:15]
    [stopped] = engine.generate([QUESTION], replace(drawn, stop=("never said", stop)))
    assert stopped.finish == "stop"
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.tokens == whole.tokens[: len(stopped.tokens)]
    streamed = list(engine.stream_text(QUESTION, replace(drawn, stop=(stop,))))
    assert "".join(streamed) == stopped.text
    assert "".join(engine.stream_text(QUESTION, drawn)) == whole.text


@pytest.mark.parametrize("which", ["ours", "llama"])
def test_a_completion_that_follows_a_schema(which: str, model_folder: Path, foreign_folder: Path) -> None:
    """Weights are random, so only the grammar makes valid documents; another row has no grammar."""
    pytest.importorskip("llguidance")
    engine = LocalEngine(model_folder if which == "ours" else foreign_folder, dtype="float32", threads=1)
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["rot", "grün"]}, "right": {"type": "boolean"}},
        "required": ["colour", "right"],
        "additionalProperties": False,
    }
    bound = Sampling(temperature=1.0, seed=2, max_new_tokens=80, json_schema=schema)
    plain = engine.submit(engine.encode(QUESTION), Sampling(temperature=1.0, seed=2, max_new_tokens=5))
    for completion in engine.generate([QUESTION, QUESTION], bound):
        assert completion.finish == "stop"
        found = json.loads(completion.text)
        assert found["colour"] in ("rot", "grün")
        assert isinstance(found["right"], bool)
    engine.wait(plain)
    assert len(plain.request.tokens) == 5


def test_keys_come_in_the_order_of_the_schema(model_folder: Path) -> None:
    """Two schemas that differ in the order of their keys alone are two grammars."""
    pytest.importorskip("llguidance")
    engine = LocalEngine(model_folder, dtype="float32", threads=1)
    for names in (("zeta", "alpha"), ("alpha", "zeta")):
        schema = {
            "type": "object",
            "properties": {name: {"type": "boolean"} for name in names},
            "required": ["alpha", "zeta"],
            "additionalProperties": False,
        }
        [completion] = engine.generate(
            [QUESTION], Sampling(temperature=0, max_new_tokens=80, json_schema=schema)
        )
        assert tuple(json.loads(completion.text)) == names


@pytest.mark.parametrize(
    "schema", [{"enum": {1, 2}}, {"enum": [1], 2: 3}, {"properties": [{1: 2}]}, ["type"]]
)
def test_a_schema_that_is_no_json_is_the_users_error(schema: Any) -> None:
    with pytest.raises(UserError, match="the schema is no JSON"):
        Sampling(json_schema=schema)


@pytest.mark.parametrize("which", ["ours", "llama"])
def test_a_completion_that_fails_ends_alone(which: str, model_folder: Path, foreign_folder: Path) -> None:
    """Its caller gets the exception, whoever drove the batch; the others' answers do not change."""
    engine = LocalEngine(model_folder if which == "ours" else foreign_folder, dtype="float32", threads=1)
    prompt = engine.encode(QUESTION)
    expected = [token.id for token in engine.stream(prompt, GREEDY)]
    bad, good = engine.submit(prompt, GREEDY), engine.submit(prompt, GREEDY)

    def fail(token: int) -> bool:
        raise RuntimeError("watching failed")

    bad.request.on_token = fail
    engine.wait(good)
    assert good.request.tokens == expected
    with pytest.raises(RuntimeError, match="watching failed"):
        engine.wait(bad)
    assert not engine.scheduler.busy


@pytest.mark.parametrize("which", ["ours", "llama"])
def test_a_temperature_near_zero_is_greedy(which: str, model_folder: Path, foreign_folder: Path) -> None:
    engine = LocalEngine(model_folder if which == "ours" else foreign_folder, dtype="float32", threads=1)
    cold = replace(GREEDY, temperature=1e-40)
    assert engine.generate([QUESTION], cold)[0].tokens == engine.generate([QUESTION], GREEDY)[0].tokens


def test_threads_share_one_batch(model_folder: Path) -> None:
    engine = LocalEngine(model_folder, dtype="float32", threads=1)
    conversations = [[{"role": "user", "content": "x" * (3 + number)}] for number in range(6)]
    expected = [fresh(model_folder, one, GREEDY) for one in conversations]
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda one: engine.generate([one], GREEDY)[0], conversations))
    assert [one.tokens for one in got] == [one.tokens for one in expected]


def test_a_completion_does_not_depend_on_its_neighbours(engine: LocalEngine) -> None:
    sampling = Sampling(temperature=1.0, seed=11, max_new_tokens=6)
    other = [{"role": "user", "content": "x" * 50}]
    together = engine.generate([QUESTION, other], sampling)
    [alone] = engine.generate([QUESTION], sampling)
    assert replace(together[0], log_probabilities=()) == replace(alone, log_probabilities=())
    # Products of two rows may be summed in another order than those of one: float32, values of about 6.
    assert together[0].log_probabilities == pytest.approx(alone.log_probabilities, abs=1e-5)
    assert together[1].tokens != together[0].tokens


def test_the_same_seed_gives_the_same_tokens_and_none_a_fresh_seed(engine: LocalEngine) -> None:
    seeded = Sampling(temperature=1.0, seed=5, max_new_tokens=16)
    free = Sampling(temperature=1.0, max_new_tokens=16)
    assert engine.generate([QUESTION], seeded) == engine.generate([QUESTION], seeded)
    # 16 draws from about 300 nearly equal tokens: equal by chance once in 300^16
    assert engine.generate([QUESTION], free) != engine.generate([QUESTION], free)


def test_a_conversation_that_does_not_fit_is_refused(foreign_folder: Path) -> None:
    engine = LocalEngine(foreign_folder)
    assert engine.context == 256
    with pytest.raises(UserError, match="conversation 2 is .* tokens long and the model's context holds 256"):
        engine.generate([QUESTION, [{"role": "user", "content": "x" * 300}]], GREEDY)


def test_the_device_must_be_here(model_folder: Path) -> None:
    with pytest.raises(UserError, match="unknown device 'gpu'; give cpu"):
        LocalEngine(model_folder, device="gpu")
    with pytest.raises(UserError, match="no device 'cuda:99' here; there is: cpu"):
        LocalEngine(model_folder, device="cuda:99")
