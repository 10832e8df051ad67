"""Measurements of a policy at every evaluation, and the steps that make them.

P_win is sigmoid(r_v - r_c): r_v the gold reward of the policy's answer, r_c that of a competitor's answer to
the same prompt, both on the gold reward's scale of 0 to 6; the mean over prompts and competitors.
"""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

from experiments.overoptimisation.data import read_records
from koine.allocator import keep_freed_memory
from koine.data.sample.gold import GoldReward, gold_reward, normalise, words
from koine.files import write_json
from koine.plan import Estimate, step
from koine.steps import estimates
from koine.steps.alignment import CACHE, frozen_model, token_folders, train_on_groups
from koine.steps.text_mixture import TextMixture
from koine.train.settings import TrainSettings

if TYPE_CHECKING:
    from koine.align.held_out import HeldOutPair, HeldOutPrompt
    from koine.align.monitor import Reward
    from koine.model.language_model import LanguageModel
    from koine.tokenizer import Tokenizer
    from koine.train.evaluation import JoinedEvaluations

FIGURES = "metrics-figures.jsonl"
OWN_SEED = 1_000_000
"""Added to the sampling's seed for the competitor that is the taught model itself."""
SHOWN = 4
"""Prompts whose answers are kept."""
PARTS = ("fact", "language", "form", "brevity")


@dataclass(frozen=True, kw_only=True)
class Answers:
    """How prompts are answered: sampling of the paper, and the most tokens of an answer."""

    max_new_tokens: int = 64
    temperature: float = 0.5
    top_p: float = 0.75
    seed: int = 0


# --- rewards ---


@functools.lru_cache(maxsize=65_536)
def graded(language: str, fact: str, text: str) -> GoldReward:
    """Return the gold reward of an answer."""
    return gold_reward({"language": language, "fact": fact}, text)


def win_probability(reward: float, competitors: Sequence[float]) -> float:
    """Return the mean of sigmoid(reward - competitor's reward)."""
    return fmean(1 / (1 + math.exp(rival - reward)) for rival in competitors)


def rewards() -> dict[str, Reward]:
    """Return the rewards of the monitor: P_win, the gold reward, and its parts."""

    def gold(_: Any, text: str, record: Mapping[str, Any]) -> GoldReward:
        return graded(record["language"], record["fact"], text)

    def part(name: str) -> Reward:
        return lambda messages, text, record: float(getattr(gold(messages, text, record), name))

    return {
        "p_win": lambda messages, text, record: win_probability(
            gold(messages, text, record).total, record["competitors"]
        ),
        "gold": part("total"),
        **{name: part(name) for name in PARTS},
    }


def units_of(text: str, code: str) -> list[str]:
    """Return the words and numbers of a text; of languages without spaces, its characters."""
    plain = normalise(text)
    return [*words(plain, code), *re.findall(r"\d+", plain)]


def token_f1(answer: str, text: str, code: str) -> float:
    """Return SQuAD's F1 of words: the harmonic mean of precision and recall of a bag of words."""
    wanted, found = Counter(units_of(answer, code)), Counter(units_of(text, code))
    shared = (wanted & found).total()
    return 2 * shared / (wanted.total() + found.total()) if shared else 0.0


# --- evaluations beside the monitor's ---


class FactMemory:
    """F1 of greedy answers to questions that the policy was taught."""

    names: ClassVar[list[str]] = ["f1"]

    def __init__(self, tokenizer: Tokenizer, prompts: Sequence[HeldOutPrompt], max_new_tokens: int) -> None:
        self.tokenizer, self.prompts, self.max_new_tokens = tokenizer, prompts, max_new_tokens

    def __call__(self, model: LanguageModel, steps_done: int) -> dict[str, float]:
        texts = answers_of(model, self.tokenizer, self.prompts, Answers(
            max_new_tokens=self.max_new_tokens, temperature=0.0, top_p=1.0))  # fmt: skip
        scores = [
            token_f1(prompt.record["answer"], text, prompt.language)
            for prompt, text in zip(self.prompts, texts, strict=True)
        ]
        return {"f1": fmean(scores)}

    def identity(self) -> dict[str, Any]:
        """Return the number of prompts: they are an input of the step."""
        return {"prompts": len(self.prompts), "max_new_tokens": self.max_new_tokens}


class LikelihoodDistance:
    """L2 distance between the policy's and the reference's log-likelihoods of chosen answers.

    The root of the mean square of the difference per token, over the held-out pairs.
    """

    names: ClassVar[list[str]] = ["l2"]

    def __init__(self, pairs: Sequence[HeldOutPair], reference: LanguageModel) -> None:
        self.chosen = [pair.continuations[0] for pair in pairs]
        self.before = self._of(reference)

    def _of(self, model: LanguageModel) -> list[float]:
        import torch

        from koine.align.completion_logits import mean_log_likelihoods

        with torch.no_grad():
            return mean_log_likelihoods(model, self.chosen)

    def __call__(self, model: LanguageModel, steps_done: int) -> dict[str, float]:
        pairs = zip(self._of(model), self.before, strict=True)
        return {"l2": math.sqrt(fmean((now - before) ** 2 for now, before in pairs))}

    def identity(self) -> dict[str, Any]:
        """Return the number of pairs: they are an input of the step."""
        return {"pairs": len(self.chosen)}


class Recorded:
    """Evaluations that also write their figures to a folder; a resumed training leaves the same lines."""

    def __init__(self, evaluations: JoinedEvaluations, folder: Path) -> None:
        self.evaluations, self.folder = evaluations, folder

    def __call__(self, model: LanguageModel, steps_done: int) -> dict[str, float]:
        from koine.align.behaviour_table import append_lines

        found = self.evaluations(model, steps_done)
        overall = {name: value for name, value in found.items() if name.rpartition("/")[0] in ("", "reward")}
        line = {
            "step": steps_done,
            **{name.removeprefix("reward/"): value for name, value in overall.items()},
        }
        append_lines(self.folder / FIGURES, steps_done, [line])
        return found


def answers_of(
    model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[HeldOutPrompt], answers: Answers
) -> list[str]:
    """Answer prompts; return the texts."""
    from koine.align.own_samples import sample_completions
    from koine.generate.sampling import Sampling

    sampling = Sampling(
        temperature=answers.temperature,
        top_p=answers.top_p,
        seed=answers.seed,
        max_new_tokens=answers.max_new_tokens,
    )
    stops = model.eos_ids | {tokenizer.end_of_turn_id, tokenizer.eos_id}
    found = sample_completions(model, [prompt.tokens for prompt in prompts], sampling, stop_ids=stops)
    return [tokenizer.decode(one.tokens[:-1] if one.stopped else one.tokens) for one in found]


def evaluation_of(
    model: Path, data: Path, prompts: Path, answers: Answers, dtype: str, folder: Path
) -> Recorded:
    """Return all that is measured of a policy that starts from `model`; it writes to `folder`."""
    from koine.align.held_out import encode_pairs, encode_prompts
    from koine.align.monitor import Monitor
    from koine.generate.sampling import Sampling
    from koine.tokenizer import load_tokenizer
    from koine.train.evaluation import JoinedEvaluations

    tokenizer, reference = load_tokenizer(model), frozen_model(model, dtype)
    context = reference.context_length
    pairs = encode_pairs(read_records(data / "heldout.jsonl"), tokenizer, context=context)
    monitor = Monitor(
        tokenizer,
        pairs=pairs,
        prompts=encode_prompts(read_records(prompts), tokenizer, context=context),
        sampling=Sampling(
            temperature=answers.temperature,
            top_p=answers.top_p,
            seed=answers.seed,
            max_new_tokens=answers.max_new_tokens,
        ),
        reference=reference,
        rewards=rewards(),
        folder=folder,
        quiet=True,
    )
    memory = encode_prompts(read_records(data / "memory.jsonl"), tokenizer, context=context)
    # The right answers are short, and a long one has a low F1 long before it ends.
    shorter = max(1, answers.max_new_tokens // 2)
    facts, distance = FactMemory(tokenizer, memory, shorter), LikelihoodDistance(pairs, reference)
    return Recorded(JoinedEvaluations([monitor, facts, distance]), folder)


# --- steps ---


def start_needs(*, mixture: TextMixture, threads: int, planned: Mapping[str, Any], **_: Any) -> Estimate:
    """Return the estimate of `measure_start`."""
    return estimates.scoring(estimates.planned_config(planned), 50_000.0, threads)


@step(version="1", estimate=start_needs, threads=0)
def measure_start(model: Path, data: Path, *, mixture: TextMixture, answers: Answers, out: Path) -> None:
    """Measure a taught model before any preference training, and grade the competitors' answers.

    Writes `figures.jsonl` with the evaluation of step 0, and `prompts.jsonl` with the competitors' rewards:
    of the model's own answers, which other seeds than the policy's draw, and of `data.RIVALS`.
    """
    import torch

    from koine.align.held_out import encode_prompts
    from koine.tokenizer import load_tokenizer

    keep_freed_memory()
    policy = frozen_model(model, "float32")
    tokenizer = load_tokenizer(model)
    records = read_records(data / "prompts.jsonl")
    prompts = encode_prompts(records, tokenizer, context=policy.context_length)
    own = replace(answers, seed=answers.seed + OWN_SEED)
    texts = answers_of(policy, tokenizer, prompts, own)
    with (out / "prompts.jsonl").open("w", encoding="utf-8") as file:
        for prompt, text in zip(prompts, texts, strict=True):
            rivals = {"own": text, **prompt.record["rivals"]}
            grades = [graded(prompt.language, prompt.record["fact"], one).total for one in rivals.values()]
            line = {**prompt.record, "rivals": rivals, "competitors": grades}
            print(json.dumps(line, ensure_ascii=False), file=file)
    evaluate = evaluation_of(model, data, out / "prompts.jsonl", answers, "float32", out)
    with torch.no_grad():
        evaluate(policy, 0)
    keep_shown(out, out)
    write_json(out / "metrics.json", read_records(out / "figures.jsonl")[0])


def run_needs(
    model: Path,
    *,
    mixture: TextMixture,
    settings: TrainSettings,
    threads: int,
    planned: Mapping[str, Any],
    **_: Any,
) -> Estimate:
    """Return the estimate of `preference_run`: an evaluation of a small model takes about five seconds."""
    trained = estimates.training(
        model, mixture=mixture, settings=settings, config=None, threads=threads, planned=planned
    )
    evaluations = -(-mixture.steps // settings.evaluate_every)
    return replace(trained, seconds=trained.seconds + 3.0 + 5.0 * evaluations)


@step(version="1", estimate=run_needs, threads=0)
def preference_run(
    model: Path,
    tokens: dict[str, Path],
    cache: Path,
    start: Path,
    data: Path,
    *,
    loss: str,
    mixture: TextMixture,
    settings: TrainSettings,
    answers: Answers,
    out: Path,
) -> None:
    """Train with one loss, strength and seed; keep the figures of all evaluations, and a few answers.

    Args:
        model: the taught model, which is the reference too.
        tokens: the pairs' groups.
        cache: the reference's log-probabilities.
        start: output of `measure_start`.
        data: output of `preference_data`.
        loss: see `koine.align.loss_spec`.
        mixture: of the pairs; settings: of the training.
        answers: how prompts are answered.
        out: folder to write to.
    """
    keep_freed_memory()
    folder = out / "training"
    folder.mkdir(exist_ok=True)
    evaluate = evaluation_of(model, data, start / "prompts.jsonl", answers, settings.dtype, folder)
    train_on_groups(
        model,
        token_folders(tokens),
        reference=model,
        cache=cache / CACHE,
        loss=loss,
        mixture=mixture,
        settings=settings,
        evaluate=evaluate,
        out=folder,
    )
    keep_shown(folder, out, before=read_records(start / "figures.jsonl"))
    # The verdicts need no weights.
    shutil.rmtree(folder)
    rows = read_records(out / "figures.jsonl")
    write_json(
        out / "metrics.json", {"final_p_win": rows[-1]["p_win"], "best_p_win": max(r["p_win"] for r in rows)}
    )


def keep_shown(folder: Path, out: Path, *, before: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write `figures.jsonl`, after the rows of earlier evaluations, and `samples.jsonl` of a few prompts."""
    from koine.align.behaviour_table import SAMPLES, read_table

    samples = read_table(folder / SAMPLES)
    shown = list(dict.fromkeys(line["id"] for line in samples))[:SHOWN]
    kept = [line for line in samples if line["id"] in shown]
    for name, lines in (("figures", [*before, *read_table(folder / FIGURES)]), ("samples", kept)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
