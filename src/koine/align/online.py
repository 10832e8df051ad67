"""Online training: completions are drawn from the policy, scored, and trained on, in the loop of every training.

The data order draws: asked for the batch of a step, it samples completions with the weights of the moment, writes
them, scores them, writes the scores, and makes groups of them. A killed run reads what was written. So one call of
`koine.train.train` has one optimiser, one schedule and exact resuming.

A round is such a call. Iterative DPO has several, each from the model of the round before, or from a merge of it
with the model that the round started from.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from koine.align.log_probabilities import completion_log_probabilities
from koine.align.loss_spec import LossSpec
from koine.align.objective import preference_objective
from koine.align.online_groups import SOURCE, OnlineKind, RolloutGroup, group_batch, rollout_groups
from koine.align.prompts import Prompt, prompts_digest
from koine.align.reference import Reference, ReferenceModel
from koine.align.rewards.reward import Answered, Reward, RewardOutcome, RewardSummary, check_records, score
from koine.align.rollouts import Draw, Policy, Rollout, read_rollouts, scored_rollouts
from koine.data.groups import GroupBatch
from koine.data.mixture import Mixture, Phase, Source
from koine.errors import UserError
from koine.fields import check_integer, check_number
from koine.files import make_folder, read_json_object, write_atomically, write_json
from koine.generate.sampling import Sampling
from koine.model.causal_lm import load_as_stored
from koine.model.language_model import LanguageModel
from koine.tokenizer import Tokenizer
from koine.train import TrainSettings, train
from koine.train.export import OutputFolder
from koine.train.fingerprint import differences

ROLLOUTS = "rollouts"
"""Folder of the drawn completions in the folder of a training."""
PLAIN = Sampling(temperature=1.0)
"""Sampling from the policy itself."""
ReferenceName = Literal["start", "round", "none"]


@dataclass(frozen=True, kw_only=True)
class OnlineSettings:
    """Settings of online training. Raises `UserError` for a value out of range.

    loss: of scored groups (`copg`, `rloo`) on all completions, or of preferences (`dpo`, `nll`, ...) on the best
        and the worst one. `nll` is fine-tuning on the best of k.
    k: completions of each prompt, at least 2.
    prompts: of each step, over all processes.
    steps: of each round.
    rounds: trainings one after another.
    draw_every: steps between two draws. Each draw is for the prompts of all these steps, so that later ones train
        on completions of an earlier policy.
    sampling: of completions; its seed is not read.
    merge_weight: weight of the round's model in a merge with the model that the round started from, which the
        next round starts from; None: no merge.
    max_batch: completions that run at once.
    """

    loss: LossSpec
    k: int
    prompts: int
    steps: int
    rounds: int = 1
    draw_every: int = 1
    sampling: Sampling = PLAIN
    merge_weight: float | None = None
    max_batch: int = 64

    def __post_init__(self) -> None:
        if self.loss.groups == "labelled" or (self.loss.completions or 2) > 2:
            raise UserError(
                f"the loss '{self.loss}' takes groups that rollouts do not make",
                hint="choose one of scored completions (rloo, copg) or of pairs (dpo, nll, ...)",
            )
        if self.k < 2:
            raise UserError(
                f"k is {self.k}: the loss '{self.loss}' compares the completions of a prompt",
                hint="draw 2 or more of each",
            )
        for name in ("k", "prompts", "steps", "rounds", "draw_every", "max_batch"):
            check_integer(name, getattr(self, name), low=1)
        if self.merge_weight is not None:
            check_number("merge_weight", self.merge_weight, above=0, high=1)
        if self.kind == "scored":
            _check_untruncated(self.sampling)

    @property
    def kind(self) -> OnlineKind:
        """Kind of groups that the loss takes."""
        return "scored" if self.loss.groups == "scored" else "preferences"

    @property
    def temperature(self) -> float:
        """Temperature of the log-probabilities that the loss reads: of pairs the model's own."""
        return self.sampling.temperature if self.kind == "scored" else 1.0


def _check_untruncated(sampling: Sampling) -> None:
    """Raise `UserError` for sampling from another distribution than the policy at a temperature."""
    plain = Sampling(temperature=sampling.temperature, max_new_tokens=sampling.max_new_tokens)
    found = [
        name.replace("_", "-")
        for name in ("top_k", "top_p", "min_p", "repetition_penalty")
        if getattr(sampling, name) != getattr(plain, name)
    ]
    if found:
        raise UserError(
            f"{', '.join(found)}: a policy gradient needs completions of the policy itself",
            hint="sample with a temperature only, or choose a loss of pairs",
        )
    if sampling.greedy:
        raise UserError(
            "a temperature of 0 draws the same completion k times",
            hint="choose a temperature above 0, such as 1",
        )


class OnlineOrder:
    """The data order of one round: `batch` draws, scores and groups the completions of a step.

    Each process draws for its own prompts.

    Args:
        model: the policy, which is being trained.
        prompts: to draw for, in an order of its own for each epoch.
        reward: scores completions.
        reward_name: what determines the reward.
        settings: of the training.
        tokenizer: the model's.
        seed: of the run.
        folder: that keeps the completions.
        first: prompts that earlier rounds drew.
        dtype: of the computation.

    Raises:
        UserError: a prompt that cannot be answered or scored, or a folder of another training.
    """

    holds_groups = True

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Prompt],
        reward: Reward,
        *,
        reward_name: str,
        settings: OnlineSettings,
        tokenizer: Tokenizer,
        seed: int,
        folder: Path,
        first: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.prompts, self.reward, self.reward_name = model, prompts, reward, reward_name
        self.settings, self.folder, self.first, self.dtype = settings, folder, first, dtype
        self.draw = Draw(
            tokenizer=tokenizer,
            k=settings.k,
            sampling=settings.sampling,
            seed=seed,
            max_batch=settings.max_batch,
        )
        self.draw.check(prompts, model)
        check_records(reward, [prompt.record for prompt in prompts])
        longest = max(len(prompt.tokens) for prompt in prompts)
        self.mixture = Mixture(
            phases=(
                Phase(
                    name="online",
                    steps=settings.steps,
                    sources=(Source(name=SOURCE, path=folder, proportion=1.0),),
                ),
            ),
            sequence_length=max(2, longest + settings.k * settings.sampling.max_new_tokens),
            batch_size=settings.prompts,
            seed=seed,
            packing="no_split",
        )
        self._seed = seed
        self._orders: dict[int, NDArray[np.int64]] = {}
        self._rows: tuple[tuple[int, int, int], list[list[RolloutGroup]]] | None = None
        self._write_manifest()

    def _write_manifest(self) -> None:
        """Write what determines the completions, which is a part of the training's identity."""
        manifest = {
            "prompts": prompts_digest(self.prompts),
            "tokenizer": self.draw.tokenizer.fingerprint,
            "reward": self.reward_name,
            "k": self.settings.k,
            "sampling": {**asdict(self.settings.sampling), "seed": None, "stop": []},
            "draw_every": self.settings.draw_every,
            "seed": self._seed,
            "first": self.first,
        }
        path = self.folder / "manifest.json"
        if path.exists():
            lines = differences(read_json_object(path), manifest)
            if lines:
                raise UserError(
                    "this folder holds completions of a training with other settings: " + "; ".join(lines),
                    where=self.folder,
                    hint="run the same command again to resume, or choose another --out",
                )
        elif int(os.environ.get("RANK", "0")) == 0:
            make_folder(self.folder)
            write_json(path, manifest)

    def prompts_of(self, step: int) -> list[Prompt]:
        """Return the prompts of a step, over all processes."""
        size, found = len(self.prompts), []
        start = self.first + step * self.settings.prompts
        for number in range(start, start + self.settings.prompts):
            epoch, place = divmod(number, size)
            found.append(self.prompts[int(self._order(epoch)[place])])
        return found

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Return the order of the prompts in an epoch."""
        if epoch not in self._orders:
            generator = np.random.Generator(np.random.Philox([self._seed, epoch]))
            self._orders = {epoch: generator.permutation(len(self.prompts))}
        return self._orders[epoch]

    def batch(
        self, step: int, *, rank: int = 0, world_size: int = 1, micro_batch: slice | None = None
    ) -> GroupBatch:
        """Return the groups of the prompts of `rank` at `step`, a prompt a row; `micro_batch` is a slice of rows.

        The first call of a step draws.

        Raises:
            UserError: no prompt has two completions with a score.
        """
        share = self.settings.prompts // world_size
        rows = self._groups(step, range(rank * share, (rank + 1) * share))
        batch = group_batch(rows if micro_batch is None else rows[micro_batch])
        return replace(batch, on_policy=self._is_draw(step))

    def _is_draw(self, step: int) -> bool:
        """Return whether completions are drawn at a step, with the weights of this moment."""
        return step % self.settings.draw_every == 0

    def _groups(self, step: int, places: range) -> list[list[RolloutGroup]]:
        """Return the groups of some prompts of a step, none where a prompt has fewer than two scores."""
        key = (step, places.start, places.stop)
        if self._rows is not None and self._rows[0] == key:
            return self._rows[1]
        with torch.no_grad():
            found = self._scored(step, places)
        prompts = self.prompts_of(step)[places.start : places.stop]
        known = None if self._is_draw(step) else self._read_behaviour(step, places, found)
        groups = rollout_groups(prompts, found, kind=self.settings.kind, first=places.start, behaviour=known)
        if not groups:
            summary = RewardSummary.of(_outcome(one) for one in found)
            reason = next(iter(summary.failures), "")
            raise UserError(
                f"no prompt of step {step} has two completions with a score",
                where=self.folder,
                hint=f"the most frequent reason: {reason}",
            )
        by_number = {one.group.document: one for one in groups}
        rows = [[by_number[number]] if number in by_number else [] for number in places]
        self._rows = key, rows
        return rows

    def _scored(self, step: int, places: range) -> list[Rollout]:
        drawn = self._drawn(step, places)
        records = self.prompts_of(step)
        answered = [
            Answered(records[one.prompt].messages, one.text, records[one.prompt].record) for one in drawn
        ]
        key = {"reward": self.reward_name, "tokens": _tokens_digest(drawn)}
        path = self._folder(step) / f"scores-{places.start:06d}-{places.stop:06d}.parquet"
        return scored_rollouts(path, drawn, partial(score, self.reward, answered), key)

    def _drawn(self, step: int, places: range) -> list[Rollout]:
        every, steps = self.settings.draw_every, self.settings.steps
        first = step - step % every
        policy = Policy(self.model, dtype=self.dtype) if self._is_draw(step) else None
        found: list[Rollout] = []
        for one in range(step, min(first + every, steps) if step == first else step + 1):
            prompts = self.prompts_of(one)[places.start : places.stop]
            drawn = self.draw.rollouts(self._folder(one), prompts, places.start, one, policy)
            if one == step:
                found = drawn
            elif policy is not None:
                self._write_behaviour(one, places, drawn, prompts, policy.model)
        return found

    def _write_behaviour(
        self,
        step: int,
        places: range,
        drawn: Sequence[Rollout],
        prompts: Sequence[Prompt],
        model: LanguageModel,
    ) -> None:
        """Write the log-probability of each completion for later steps, as the trainer computes it.

        The engine rounds differently: in bfloat16 by more than the policy moves in a step.
        """
        values: list[float] = []
        size = max(1, self.settings.max_batch // self.settings.k)
        groups = rollout_groups(
            prompts, [replace(one, score=0.0) for one in drawn], kind="scored", first=places.start
        )
        device = next(iter(model.parameters())).device
        for start in range(0, len(groups), size):
            batch = group_batch([[group] for group in groups[start : start + size]]).to(device)
            # With gradients, so that the same kernels compute it as in training.
            with torch.enable_grad():
                found = completion_log_probabilities(model, batch, temperature=self.settings.temperature)
            values += found.sums.detach().double().tolist()
        write_atomically(self._behaviour_file(step, places, drawn), np.array(values).tobytes())

    def _read_behaviour(self, step: int, places: range, drawn: Sequence[Rollout]) -> list[float]:
        path = self._behaviour_file(step, places, drawn)
        if not path.is_file() or path.stat().st_size != 8 * len(drawn):
            raise UserError(
                f"holds no log-probabilities of the completions of step {step}, which an earlier policy drew",
                where=path.parent,
                hint="go on from a checkpoint of an earlier step, or start again in another --out",
            )
        return [float(value) for value in np.fromfile(path, dtype=np.float64)]

    def _behaviour_file(self, step: int, places: range, drawn: Sequence[Rollout]) -> Path:
        name = f"behaviour-{places.start:06d}-{places.stop:06d}-{_tokens_digest(drawn)[:16]}.f64"
        return self._folder(step) / name

    def _folder(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"


def _tokens_digest(drawn: Sequence[Rollout]) -> str:
    return hashlib.sha256(repr([one.tokens for one in drawn]).encode()).hexdigest()


def _outcome(one: Rollout) -> RewardOutcome:
    return RewardOutcome(one.score, one.failure)


def summary_of(folder: Path) -> dict[str, Any]:
    """Return the mean score, the completions without a score and their reasons, of all steps in a folder."""
    files = sorted(folder.glob("step-*/scores-*.parquet"))
    summary = RewardSummary.of(_outcome(one) for file in files for one in read_rollouts(file) or ())
    return {"scored": summary.scored, "mean_score": summary.mean, "failures": summary.failures}


def train_online(
    model: Path,
    prompts: Sequence[Prompt],
    reward: Reward,
    *,
    reward_name: str,
    online: OnlineSettings,
    settings: TrainSettings,
    tokenizer: Tokenizer,
    out: Path,
    reference: ReferenceName | Path = "start",
    device: str = "auto",
    progress: bool = True,
    prepare: Callable[[LanguageModel, Path], None] | None = None,
) -> Path:
    """Train a model on its own completions; return the folder of the last model.

    One round writes `out`. Several write `out/round-01`, ..., and with merges `out/merged-01`, .... The same call
    again resumes.

    Args:
        model: folder of the policy.
        prompts: to draw completions for.
        reward: scores them.
        reward_name: what determines the reward; another one is another training.
        online: settings of drawing, pairing and rounds.
        settings: of the optimiser; its seed is that of the draws.
        tokenizer: the model's.
        out: folder to write.
        reference: of the loss: the model before the first round, that before each round, none, or a model folder.
        device: see `koine.train.train`.
        progress: show progress.
        prepare: called with each round's model and its folder, before training.

    Raises:
        UserError: the loss needs a reference and has none, a merge in several processes, and as
            `koine.train.train`.
    """
    if online.loss.needs_reference and reference == "none":
        raise UserError(
            f"the loss {online.loss} needs a reference", hint="give --reference start or --reference MODEL"
        )
    if online.merge_weight is not None and int(os.environ.get("WORLD_SIZE", "1") or 1) > 1:
        raise UserError("rounds with a merge run in one process", hint="start without torchrun")
    dtype: torch.dtype = getattr(torch, settings.dtype)
    start = model
    for number in range(1, online.rounds + 1):
        folder = out if online.rounds == 1 else out / f"round-{number:02d}"
        OutputFolder(folder, init_from=start).check_no_other_model()
        policy = load_as_stored(start)
        if prepare is not None:
            prepare(policy, start)
        order = OnlineOrder(
            policy,
            prompts,
            reward,
            reward_name=reward_name,
            settings=online,
            tokenizer=tokenizer,
            seed=settings.seed,
            folder=folder / ROLLOUTS,
            first=(number - 1) * online.steps * online.prompts,
            dtype=dtype,
        )
        fixed = model if reference == "start" else start if reference == "round" else reference
        known: Reference | None = None
        if isinstance(fixed, Path):
            known = ReferenceModel(load_as_stored(fixed), dtype=dtype, temperature=online.temperature)
        objective = preference_objective(online.loss, known, temperature=online.temperature)
        train(
            policy,
            objective,
            order,
            settings,
            out=folder,
            tokenizer=start,
            init_from=start,
            device=device,
            progress=progress,
        )
        before, start = start, folder
        if online.merge_weight is not None and online.rounds > 1:
            start = _merged(before, folder, out / f"merged-{number:02d}", online.merge_weight)
    return start


def _merged(before: Path, after: Path, out: Path, weight: float) -> Path:
    """Merge a round's model with the one that it started from, unless that is done; return the merge."""
    from koine.combine import merge

    if not out.exists():
        merge([before, after], out, weights=[1 - weight, weight])
    return out
