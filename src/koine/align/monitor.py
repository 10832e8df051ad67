"""The monitor of a preference training: what it does to likelihood, entropy and diversity, by language."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from koine.align.behaviour import (
    ORDERS,
    divergence,
    expectation_adjusted_distinct,
    repetition,
    top_tokens,
    worst_language,
)
from koine.align.behaviour_table import SAMPLES, TABLE, append_lines, evaluations_before, flat
from koine.align.completion_logits import Continuation, completion_logits, mean_log_likelihoods
from koine.align.held_out import HeldOutPair, HeldOutPrompt
from koine.align.language_means import LanguageMeans
from koine.align.overoptimisation import DEFAULT, NEEDED, Constants, Verdict, verdict
from koine.align.own_samples import Sample, sample_completions
from koine.errors import UserError
from koine.generate.sampling import Sampling
from koine.language_id import identify
from koine.languages import LANGUAGES
from koine.model.language_model import LanguageModel
from koine.terminal import note
from koine.tokenizer import Tokenizer
from koine.train.evaluation import check_metric
from koine.train.fingerprint import weights_digest


class IdentifiedLanguage(Protocol):
    """The language of a text, as `koine.language_id.identify` returns it."""

    @property
    def code(self) -> str:
        """BCP-47."""


Identify = Callable[[str, Collection[str] | None], IdentifiedLanguage]
"""`identify(text, candidates).code` is the language of a text among some; None: among all."""
Reward = Callable[[Sequence[Mapping[str, Any]], str, Mapping[str, Any]], float | None]
"""`reward(conversation, completion, record)`; None: it failed, which is counted."""


def installed_identifier() -> Identify | None:
    """Return `koine.language_id.identify` where its extra is installed; None elsewhere, with a note."""
    if importlib.util.find_spec("py3langid") is None:
        note("the language of the answers is not measured: pip install 'koine-lm[langid]'", err=True)
        return None
    return identify


SAMPLING = Sampling(temperature=0.5, top_p=0.75, seed=0, max_new_tokens=256)
"""The paper's sampling, with fewer tokens."""
PAIR_FIGURES = ("error", "chosen", "rejected", "margin", "accuracy")
SAMPLE_FIGURES = ("repetition", "entropy", "entropy_raw", "mass", "length", "cut_off")
KL_FIGURES = ("kl", "kl_sequence")
EAD_FIGURES = ("ead", *(f"ead_{n}" for n in ORDERS))


class Monitor:
    """An `evaluate` of `koine.train.train` that measures a policy on held-out pairs and on its own samples.

    Figures, each overall and by language (`entropy/hi`):

    | name | meaning |
    |---|---|
    | `error` | share of pairs whose rejected completion is at least as likely per token: 1 - `accuracy` |
    | `chosen`, `rejected` | log-likelihood per token, nats, mean over the pairs, not divided by the reference's |
    | `margin` | `chosen` less `rejected` |
    | `kl`, `kl_sequence` | KL to the reference at the positions of own samples: nats per token, nats per sample |
    | `entropy`, `entropy_raw` | of the top 10 next tokens, bits, mean over positions of own samples |
    | `mass` | probability of the top 10 |
    | `ead`, `ead_1` ... | cross-input diversity, the mean over n = 1 to 5, and each n |
    | `repetition` | share of 4-grams of a sample that occurred earlier in it |
    | `length`, `cut_off` | tokens of a sample without the stop token; share of samples without one |
    | `asked_language` | share of samples in the language of their prompt |
    | `reward/NAME`, `reward_failures/NAME` | mean reward; share of samples without one |

    The first of them is `error`, so that it chooses the best checkpoint where nothing else does.

    With a folder, every call appends a line to `metrics-behaviour.jsonl` and the samples to
    `metrics-samples.jsonl`. Lines of this step and later ones are removed first, so a training that was killed
    and resumed leaves the same files.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        pairs: Sequence[HeldOutPair] = (),
        prompts: Sequence[HeldOutPrompt] = (),
        sampling: Sampling = SAMPLING,
        reference: LanguageModel | None = None,
        identify: Identify | None = None,
        rewards: Mapping[str, Reward] | None = None,
        folder: Path | None = None,
        constants: Constants = DEFAULT,
        quiet: bool = False,
    ) -> None:
        """Take what is measured.

        Args:
            tokenizer: of the policy and the reference.
            pairs: held-out pairs.
            prompts: answered by the policy at every call, prompt i with the seed of `sampling` plus i.
            sampling: of the answers; it needs a seed.
            reference: for the KL; in evaluation mode, on the policy's device.
            identify: names the language of an answer.
            rewards: by name.
            folder: of the training; None: no files.
            constants: of the over-optimisation rule.
            quiet: do not print verdicts.

        Raises:
            UserError: there are neither pairs nor prompts, or the sampling has no seed.
        """
        if not pairs and not prompts:
            raise UserError("a monitor without pairs and prompts", hint="give held-out pairs, or prompts")
        if sampling.seed is None:
            raise UserError(
                "the sampling has no seed", hint="choose a seed, so that all evaluations share it"
            )
        self.tokenizer, self.pairs, self.prompts = tokenizer, tuple(pairs), tuple(prompts)
        self.sampling, self.reference, self.identify = sampling, reference, identify
        self.rewards, self.folder, self.constants = dict(rewards or {}), folder, constants
        self.quiet = quiet
        self.verdict: Verdict | None = None
        self._evaluations: list[dict[str, float]] = []

    # --- what is measured ---

    @property
    def names(self) -> list[str]:
        """Names of the figures: overall, then of each language."""
        of_pairs: list[str] = list(PAIR_FIGURES) if self.pairs else []
        of_samples: list[str] = []
        if self.prompts:
            of_samples = [*SAMPLE_FIGURES, *EAD_FIGURES]
            of_samples += KL_FIGURES if self.reference is not None else ()
            of_samples += ["asked_language"] if self.identify is not None else []
            of_samples += [
                f"{kind}/{name}" for name in self.rewards for kind in ("reward", "reward_failures")
            ]
        return [
            *of_pairs,
            *of_samples,
            *(f"{name}/{code}" for code in _codes(self.pairs) for name in of_pairs),
            *(f"{name}/{code}" for code in _codes(self.prompts) for name in of_samples),
        ]

    def check_metric(self, name: str) -> None:
        """Raise `UserError` for a metric that it does not measure; "" is the first, `-NAME` the highest of NAME."""
        check_metric(name, self.names)

    def identity(self) -> dict[str, Any]:
        """Return all that determines the figures of a given model, as JSON values."""
        return {
            "pairs": _digest([dataclasses.astuple(pair) for pair in self.pairs]),
            "prompts": _digest([(prompt.language, prompt.tokens) for prompt in self.prompts]),
            "sampling": dataclasses.asdict(self.sampling),
            "reference": None if self.reference is None else weights_digest(self.reference),
            "tokenizer": self.tokenizer.fingerprint,
            "rewards": list(self.rewards),
            "asked_language": self.identify is not None,
        }

    # --- measuring ---

    def __call__(self, model: LanguageModel, steps_done: int) -> dict[str, float]:
        """Measure a model after some steps. It is in evaluation mode and stays as it is."""
        with torch.no_grad():
            found = LanguageMeans()
            self._add_pairs(found, model)
            answers = self._add_samples(found, model) if self.prompts else []
        overall, languages = found.overall(), found.languages()
        self._add_diversity(overall, languages, answers)
        return self._finish(steps_done, overall, languages, answers)

    def _add_pairs(self, found: LanguageMeans, model: LanguageModel) -> None:
        """Score the held-out pairs."""
        both = [one for pair in self.pairs for one in pair.continuations]
        means = mean_log_likelihoods(model, both)
        for pair, chosen, rejected in zip(self.pairs, means[::2], means[1::2], strict=True):
            right = float(chosen > rejected)
            for name, value in zip(
                PAIR_FIGURES, (1 - right, chosen, rejected, chosen - rejected, right), strict=True
            ):
                found.add(name, pair.language, value)

    def _add_samples(self, found: LanguageMeans, model: LanguageModel) -> list[Sample]:
        """Answer the prompts and measure the answers, all but their diversity."""
        answers = sample_completions(
            model,
            [prompt.tokens for prompt in self.prompts],
            self.sampling,
            stop_ids=self._stop_ids(model),
        )
        # With the prompts' language alone as a candidate, every answer would be in it.
        codes = sorted(({*_codes(self.prompts)} & LANGUAGES.keys()) | {"en"})
        candidates = codes if len(codes) > 1 else None
        for prompt, answer in zip(self.prompts, answers, strict=True):
            tokens, code = _shown(answer), prompt.language
            found.add("repetition", code, repetition(tokens))
            found.add("length", code, float(len(tokens)))
            found.add("cut_off", code, float(not answer.stopped))
            text = self.tokenizer.decode(tokens)
            if self.identify is not None:
                found.add("asked_language", code, float(self.identify(text, candidates).code == code))
            for name, reward in self.rewards.items():
                value = reward(prompt.messages, text, prompt.record)
                found.add(f"reward_failures/{name}", code, float(value is None))
                if value is not None:
                    found.add(f"reward/{name}", code, float(value))
        self._add_distributions(found, model, answers)
        return answers

    def _add_distributions(
        self, found: LanguageMeans, model: LanguageModel, answers: Sequence[Sample]
    ) -> None:
        """Score the answers with the policy, and the reference: entropy, mass and KL at their positions."""
        models = [model] if self.reference is None else [model, self.reference]
        names = ["entropy", "entropy_raw", "mass", *([] if self.reference is None else ["kl"])]
        sums = torch.zeros(len(answers), len(names), dtype=torch.float64)
        continuations = [
            Continuation(prompt.tokens, answer.tokens)
            for prompt, answer in zip(self.prompts, answers, strict=True)
        ]
        for chunk in completion_logits(models, continuations):
            columns = [*top_tokens(chunk.logits[0])]
            if self.reference is not None:
                columns.append(divergence(*chunk.logits))
            sums.index_add_(0, chunk.number.cpu(), torch.stack(columns, dim=1).double().cpu())
        for prompt, answer, row in zip(self.prompts, answers, sums.tolist(), strict=True):
            positions = len(answer.tokens)
            for name, total in zip(names, row, strict=True):
                found.add(name, prompt.language, total / positions, positions)
            if self.reference is not None:
                found.add("kl_sequence", prompt.language, row[-1])

    def _add_diversity(
        self,
        overall: dict[str, float],
        languages: dict[str, dict[str, float]],
        answers: Sequence[Sample],
    ) -> None:
        """Add EAD: over the answers to all prompts, and over those of each language."""
        texts = [_shown(answer) for answer in answers]
        groups = {code: languages[code] for code in _codes(self.prompts)}
        for code, figures in (("", overall), *groups.items()):
            own = [
                text
                for prompt, text in zip(self.prompts, texts, strict=True)
                if code in ("", prompt.language)
            ]
            if not own:
                continue
            values = [expectation_adjusted_distinct(own, n, self.tokenizer.vocab_size) for n in ORDERS]
            figures |= dict(zip(EAD_FIGURES, (sum(values) / len(values), *values), strict=True))

    def _stop_ids(self, model: LanguageModel) -> frozenset[int]:
        return model.eos_ids | {self.tokenizer.end_of_turn_id, self.tokenizer.eos_id}

    # --- results ---

    def _finish(
        self,
        steps_done: int,
        overall: dict[str, float],
        languages: dict[str, dict[str, float]],
        answers: Sequence[Sample],
    ) -> dict[str, float]:
        """Judge, write the files, and return the figures flat."""
        figures = flat(overall, languages)
        if not _is_main():
            return figures
        if self.folder is not None:
            self._evaluations = evaluations_before(self.folder, steps_done)
        self._evaluations = [one for one in self._evaluations if one["step"] < steps_done]
        self._evaluations.append({"step": steps_done, **figures})
        if all(name in one for one in self._evaluations for name in NEEDED):
            self.verdict = verdict(self._evaluations, self.constants)
            if self.verdict.sign is not None and not self.quiet:
                note(f"step {steps_done:,}: {self.verdict.text}", err=True)
        if self.folder is not None:
            self._write(steps_done, overall, languages, answers)
        return figures

    def _write(
        self,
        steps_done: int,
        overall: dict[str, float],
        languages: dict[str, dict[str, float]],
        answers: Sequence[Sample],
    ) -> None:
        assert self.folder is not None
        worst = {
            name: code
            for name in overall
            if (code := worst_language({c: f[name] for c, f in languages.items() if name in f}, name))
        }
        judged = None if self.verdict is None else {"state": self.verdict.state, "text": self.verdict.text}
        samples = [
            {
                "step": steps_done,
                "id": prompt.id,
                "language": prompt.language,
                "messages": list(prompt.messages),
                "completion": self.tokenizer.decode(_shown(answer)),
            }
            for prompt, answer in zip(self.prompts, answers, strict=True)
        ]
        append_lines(self.folder / SAMPLES, steps_done, samples)
        line = {
            "step": steps_done,
            "overall": overall,
            "languages": languages,
            "worst": worst,
            "verdict": judged,
        }
        append_lines(self.folder / TABLE, steps_done, [line])


def _shown(answer: Sample) -> tuple[int, ...]:
    """Return the tokens of an answer without the stop token."""
    return answer.tokens[:-1] if answer.stopped else answer.tokens


def _codes(held_out: Sequence[HeldOutPair] | Sequence[HeldOutPrompt]) -> list[str]:
    return sorted({one.language for one in held_out})


def _digest(value: Any) -> str:
    return "sha256:" + hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _is_main() -> bool:
    """Whether this process writes: the only one, or the first of several."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank())
