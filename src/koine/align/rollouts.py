"""Rollouts: sampled completions with the policy's log-probabilities, kept in Parquet files before they are used.

A file holds the completions of some consecutive prompts of a step. It is drawn in one go and written whole, so
that a killed run draws it anew in the same batches: log-probabilities depend in their last digits on what is
computed together. The metadata of a file say what determined it: weights, prompts, sampling and seed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from koine.align.prompts import Prompt, encode_prompts, prompts_digest
from koine.align.rewards.reward import RewardOutcome
from koine.align.sampler import gathered, inference_copy, is_split, sample, sample_seed
from koine.errors import UserError
from koine.fields import check_integer
from koine.files import make_folder, write_atomically
from koine.generate.sampling import Sampling
from koine.model.language_model import LanguageModel
from koine.tokenizer import Tokenizer
from koine.train.fingerprint import weights_digest

FORMAT = 1
PROMPTS_OF_FILE = 64
"""Prompts of one file of `rollouts`, which a killed run draws again at most."""
_KEY = b"koine.rollouts"


@dataclass(frozen=True)
class Rollout:
    """A sampled completion.

    prompt: number of its prompt, from 0.
    sample: number among the completions of its prompt, from 0.
    tokens: ids, the stop token included.
    log_probabilities: of each token at the sampling's temperature, natural logarithms.
    text: without the stop token.
    stopped: whether it ended with a stop token, not at the most tokens.
    score: its reward; None where it is not scored or the reward failed.
    failure: why the reward failed.
    """

    prompt: int
    sample: int
    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    text: str
    stopped: bool
    score: float | None = None
    failure: str | None = None


def rollouts(
    model: LanguageModel,
    prompts: Sequence[Mapping[str, Any]],
    *,
    tokenizer: Tokenizer,
    k: int,
    sampling: Sampling,
    seed: int,
    out: Path,
    step: int = 0,
    max_batch: int = 64,
) -> list[Rollout]:
    """Draw k completions of each prompt, written to `out` before they are returned.

    The same call again reads what is there, and goes on after it. Completion i of a prompt has a seed of its own,
    made of `seed`, `step`, the prompt's id and i.

    Args:
        model: our decoder, or a `CausalLM`. It is not changed.
        prompts: records with `prompt`, text or messages.
        tokenizer: the model's, with a chat template.
        k: completions of each prompt.
        sampling: its seed is not read.
        seed: of the run.
        out: folder of the files.
        step: number of the draw.
        max_batch: completions that run at once.

    Raises:
        UserError: a prompt has another form, or leaves no room in the model's context.
    """
    encoded = encode_prompts(prompts, tokenizer)
    draw = Draw(tokenizer=tokenizer, k=k, sampling=sampling, seed=seed, max_batch=max_batch)
    draw.check(encoded, model)
    policy = Policy(model)
    found: list[Rollout] = []
    for first in range(0, len(encoded), PROMPTS_OF_FILE):
        found += draw.rollouts(out, encoded[first : first + PROMPTS_OF_FILE], first, step, policy)
    return found


class Policy:
    """The model of the moment: its copy for inference is made when it is needed first.

    model: whole on each process. digest: sha256 of its weights.

    dtype: that weights split over processes are computed in.
    """

    def __init__(self, model: LanguageModel, *, dtype: torch.dtype | None = None) -> None:
        # All processes gather the weights, also one that has its completions already.
        self.model = gathered(model, dtype) if is_split(model) else model
        self._copy: LanguageModel | None = None
        self.digest = weights_digest(self.model)

    @property
    def inference(self) -> LanguageModel:
        """The copy for inference."""
        if self._copy is None:
            self._copy = inference_copy(self.model)
        return self._copy


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How completions are drawn; see `rollouts`."""

    tokenizer: Tokenizer
    k: int
    sampling: Sampling
    seed: int
    max_batch: int = 64

    def __post_init__(self) -> None:
        check_integer("k", self.k, low=1)
        if self.sampling.stop or self.sampling.json_schema is not None:
            raise UserError("rollouts take no stop strings and no JSON schema", hint="leave them out")

    def check(self, prompts: Sequence[Prompt], model: LanguageModel) -> None:
        """Raise `UserError` for a prompt that leaves no room for a completion."""
        room = model.context_length
        for prompt in prompts:
            if room is not None and len(prompt.tokens) + self.sampling.max_new_tokens > room:
                raise UserError(
                    f"has {len(prompt.tokens)} tokens, and with {self.sampling.max_new_tokens} new ones more than "
                    f"the {room} of the model's context",
                    where=f"prompt '{prompt.id}'",
                    hint="leave it out, or ask for fewer new tokens",
                )

    def rollouts(
        self, folder: Path, prompts: Sequence[Prompt], first: int, step: int, policy: Policy | None
    ) -> list[Rollout]:
        """Return the completions of consecutive prompts of a step, read from a folder or drawn and written.

        Args:
            folder: of the step.
            prompts: the prompts.
            first: number of the first one in the step.
            step: number of the step.
            policy: to draw from; None: they must have been drawn.

        Raises:
            UserError: they must have been drawn, and were not.
        """
        key = {
            "format": FORMAT,
            "prompts": prompts_digest(prompts),
            "first": first,
            "step": step,
            "k": self.k,
            "seed": self.seed,
            "sampling": {**asdict(self.sampling), "seed": None},
            "weights": None if policy is None else policy.digest,
        }
        path = folder / f"prompts-{first:06d}-{first + len(prompts):06d}.parquet"
        found = read_rollouts(path, key)
        if found is not None:
            return found
        if policy is None:
            raise UserError(
                f"holds no completions of step {step}, which an earlier policy drew",
                where=folder,
                hint="go on from a checkpoint of an earlier step, or start again in another --out",
            )
        drawn = self._draw(prompts, first, step, policy.inference)
        make_folder(folder)
        write_rollouts(path, drawn, key)
        return drawn

    def _draw(self, prompts: Sequence[Prompt], first: int, step: int, model: LanguageModel) -> list[Rollout]:
        places = [(number, index) for number in range(len(prompts)) for index in range(self.k)]
        stops = frozenset({*model.eos_ids, self.tokenizer.end_of_turn_id, self.tokenizer.eos_id})
        requests = sample(
            model,
            [prompts[number].tokens for number, _ in places],
            self.sampling,
            [sample_seed(self.seed, step, prompts[number].id, index) for number, index in places],
            stop_ids=stops,
            max_batch=self.max_batch,
        )
        found = []
        for (number, index), request in zip(places, requests, strict=True):
            stopped = request.finish == "stop"
            text = self.tokenizer.decode(request.tokens[:-1] if stopped else request.tokens)
            found.append(
                Rollout(
                    first + number,
                    index,
                    tuple(request.tokens),
                    tuple(request.log_probabilities),
                    text,
                    stopped,
                )
            )
        return found


def scored_rollouts(
    path: Path, drawn: Sequence[Rollout], score: Callable[[], Sequence[RewardOutcome]], key: Mapping[str, Any]
) -> list[Rollout]:
    """Return rollouts with scores, read from a file or scored and written; `key` says what determines them."""
    found = read_rollouts(path, key)
    if found is not None:
        return found
    outcomes = score()
    scored = [
        Rollout(**{**vars(one), "score": outcome.value, "failure": outcome.failure})
        for one, outcome in zip(drawn, outcomes, strict=True)
    ]
    write_rollouts(path, scored, key)
    return scored


def write_rollouts(path: Path, found: Sequence[Rollout], key: Mapping[str, Any]) -> None:
    """Write rollouts to a Parquet file, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        {
            "prompt": pa.int64(),
            "sample": pa.int32(),
            "tokens": pa.list_(pa.int32()),
            "log_probabilities": pa.list_(pa.float64()),
            "text": pa.string(),
            "stopped": pa.bool_(),
            "score": pa.float64(),
            "failure": pa.string(),
        },
        metadata={_KEY: json.dumps(key, sort_keys=True, default=str)},
    )
    table = pa.Table.from_pylist([vars(one) for one in found], schema=schema)
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd")
    write_atomically(path, file.getvalue())


def read_rollouts(path: Path, key: Mapping[str, Any] | None = None) -> list[Rollout] | None:
    """Return the rollouts of a file; None where it is missing, or was determined by something else.

    key: what determined them, as JSON values; an entry of None is not compared. None: nothing is compared.

    Raises `UserError` for a damaged file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            table = pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            "is no Parquet file", where=path, hint="it is damaged; remove it, it is drawn again"
        ) from error
    if key is not None:
        recorded = json.loads((table.schema.metadata or {}).get(_KEY, b"{}"))
        wanted = json.loads(json.dumps(key, default=str))
        if any(value is not None and recorded.get(name) != value for name, value in wanted.items()):
            return None
    return [
        Rollout(
            **{**row, "tokens": tuple(row["tokens"]), "log_probabilities": tuple(row["log_probabilities"])}
        )
        for row in table.to_pylist()
    ]
