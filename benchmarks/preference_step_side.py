"""One side of benchmarks/preference_step.py: a process that makes preference steps on command.

It reads one JSON object a line and answers with one:

| command | does |
|---|---|
| `loss` | returns the mean loss over all pairs, before any step |
| `step` | makes one optimiser step |
| `epoch` | trains on all pairs once |
| `memory` | returns the peak resident memory of the process |

`ours` needs koine, `trl` needs only TRL.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from train_step_side import CLIP, WEIGHT_DECAY, keep_freed_memory, peak_memory

LEARNING_RATE, BETAS, BETA = 1e-5, (0.9, 0.95), 0.1
PAIRS_OF_STEP = 16
SCORE = "score.pt"
"""Head of the reward models, beside the folders of the models."""


@dataclass(frozen=True)
class Configuration:
    """One way to run a side.

    Attributes:
        side: `ours` or `trl`.
        objective: `dpo`, `reward` (Bradley-Terry), or of ours `lm`: language modelling on the same rows.
        dtype: of the computation; the weights that are trained are float32.
        compiled: whether torch.compile is on.
        row: of ours, tokens of a row.
        rows: of ours, most rows of a micro batch.
        shared: of ours, whether the completions of a pair share its prompt's tokens.
        pairs: of TRL, `per_device_train_batch_size`; gradients are accumulated up to `PAIRS_OF_STEP`.
        by_length: of TRL, whether the pairs come in order of length, which its grouping by length approaches
            on a large data set.
    """

    side: str
    objective: str
    dtype: str
    compiled: bool = False
    row: int = 0
    rows: int = 0
    shared: bool = True
    pairs: int = 0
    by_length: bool = False

    def __str__(self) -> str:
        if self.side == "trl":
            how = f"batch {self.pairs}{', by length' if self.by_length else ''}"
        else:
            how = f"{self.rows} rows of {self.row}{'' if self.shared else ', prompts repeated'}"
        return f"{self.dtype}{', compiled' if self.compiled else ''}, {how}"


class Steps(NamedTuple):
    """What a side can do. `steps` yields once after each optimiser step of an epoch."""

    loss: Callable[[], float]
    steps: Callable[[], Iterator[None]]


def order_of(tokens: Path, row: int, rows: int) -> Any:
    """Return the order of a case: one step has `rows` rows of `row` tokens."""
    from koine.data import Mixture, Phase, PreferenceOrder, Source

    source = Source(name="pairs", path=tokens, proportion=1.0, max_epochs=math.inf)
    phase = Phase(name="pairs", steps=1, sources=(source,))
    mixture = Mixture(phases=(phase,), sequence_length=row, batch_size=rows, packing="no_split")
    return PreferenceOrder(mixture)


def rows_of_epoch(tokens: Path, row: int) -> int:
    """Return the rows that an epoch over a case fills."""
    [usage] = order_of(tokens, row, 1).usage()
    rows: int = round(1 / usage.epochs)
    return rows


def micro_batches(rows: int, steps: int, most: int) -> list[list[slice]]:
    """Split the rows of an epoch evenly into steps, and each step into micro batches of at most `most` rows."""
    found = []
    for step in range(steps):
        start, end = rows * step // steps, rows * (step + 1) // steps
        parts = max(1, math.ceil((end - start) / most))
        edges = [start + (end - start) * part // parts for part in range(parts + 1)]
        found.append([slice(one, two) for one, two in zip(edges, edges[1:], strict=False)])
    return found


def ours(configuration: Configuration, case: Path, weights: Path, reference: Path) -> Steps:
    """Make steps of our order, objective and optimiser, as our training loop calls them."""
    from koine.train import TrainSettings
    from koine.train.model_adapters import compile_blocks, prepare_model
    from koine.train.optimiser import Optimiser

    tokens, dtype = case / "tokens", getattr(torch, configuration.dtype)
    rows = rows_of_epoch(tokens, configuration.row)
    order = order_of(tokens, configuration.row, rows)
    pairs = json.loads((case / "case.json").read_text())["pairs"]
    model, objective = OBJECTIVES[configuration.objective](order, weights, reference, dtype)
    prepare_model(model, gradient_checkpointing=False)
    settings = TrainSettings(
        learning_rate=LEARNING_RATE,
        dtype="bfloat16" if configuration.dtype == "bfloat16" else "float32",
        weight_decay=WEIGHT_DECAY,
        clip_norm=CLIP,
        compile="on" if configuration.compiled else "off",
    )
    optimiser = Optimiser(model, settings, dtype=dtype)
    compile_blocks(model, settings)
    plan = micro_batches(rows, pairs // PAIRS_OF_STEP, configuration.rows)

    def batch_of(part: slice) -> Any:
        batch = order.batch(0, micro_batch=part)
        if configuration.objective == "lm":
            return language_batch(batch)
        return batch if configuration.shared else batch.separate()

    def loss() -> float:
        with torch.no_grad():
            found = [objective(model, batch_of(part)) for parts in plan for part in parts]
        units = sum(float(measured["units"]) for _, measured in found)
        return sum(float(total) for total, _ in found) / units

    def steps() -> Iterator[None]:
        for parts in plan:
            units = 0.0
            for part in parts:
                total, measured = objective(model, batch_of(part))
                total.backward()
                optimiser.accumulate_gradients()
                units += measured["units"]
            optimiser.scale_and_clip(1.0 / units, CLIP)
            optimiser.step(LEARNING_RATE)
            yield

    return Steps(loss, steps)


def our_dpo(order: Any, weights: Path, reference: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return our model and the objective, with the reference's log-probabilities computed."""
    from koine.align import preference_objective, reference_log_probabilities
    from koine.model import load_causal_lm

    with tempfile.TemporaryDirectory() as cache:
        values = reference_log_probabilities(
            load_causal_lm(reference, dtype=torch.float32), order, cache=Path(cache), dtype=dtype
        )
    return load_causal_lm(weights, dtype=torch.float32), preference_objective(f"dpo:beta={BETA}", values)


def our_reward(order: Any, weights: Path, reference: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return our reward model and its objective."""
    from koine.align import BradleyTerry
    from koine.model import RewardModel, load_causal_lm

    return RewardModel(load_causal_lm(weights, dtype=torch.float32), read_score(weights)), BradleyTerry()


def our_language_model(order: Any, weights: Path, reference: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return our model and the objective of language modelling."""
    from koine.model import load_causal_lm
    from koine.train import LanguageModelling

    return load_causal_lm(weights, dtype=torch.float32), LanguageModelling()


OBJECTIVES = {"dpo": our_dpo, "reward": our_reward, "lm": our_language_model}


def read_score(weights: Path) -> torch.Tensor:
    """Return the head of the reward models, `[1, hidden]`."""
    score: torch.Tensor = torch.load(weights.parent / SCORE, weights_only=True)
    return score


def language_batch(batch: Any) -> Any:
    """Return the rows of groups as documents, with the next token of the same group as target."""
    from koine.data.batch import NO_TARGET, Batch

    targets = torch.full_like(batch.tokens, NO_TARGET)
    same = (batch.document_ids[:, 1:] == batch.document_ids[:, :-1]) & (batch.document_ids[:, 1:] >= 0)
    targets[:, :-1] = torch.where(same, batch.tokens[:, 1:], NO_TARGET)
    return Batch(batch.tokens, targets, batch.document_ids, list)


def trl(configuration: Configuration, case: Path, weights: Path, reference: Path) -> Steps:
    """Make steps with the parts of TRL's trainers: their data loader, loss, clipping and optimiser."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = trainer_arguments(configuration, folder)
        pairs = pairs_of(case, configuration)
        if configuration.objective == "dpo":
            return trainer_steps(dpo_trainer(arguments, pairs, weights, reference))
        return trainer_steps(reward_trainer(arguments, pairs, weights))


def without_preparation(trainer: Any) -> Any:
    """Return the class of a trainer for pairs that are token ids already."""

    class Prepared(trainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    return Prepared


def dpo_trainer(
    arguments: dict[str, Any], pairs: list[dict[str, list[int]]], weights: Path, ref: Path
) -> Any:
    """Return a `DPOTrainer` with the reference's log-probabilities computed."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    def load(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, **LOADING)

    model = load(weights)
    trainer = without_preparation(DPOTrainer)(
        model=model,
        ref_model=load(ref),
        args=DPOConfig(
            **arguments,
            precompute_ref_log_probs=True,
            # Small, so that the peak of memory is that of the steps.
            precompute_ref_batch_size=1,
            beta=BETA,
            max_length=None,
        ),
        train_dataset=Dataset.from_list([{f"{name}_ids": pair[name] for name in pair} for pair in pairs]),
        processing_class=plain_tokenizer(model.config.vocab_size),
    )
    # Its log-probabilities are columns of the data set now.
    trainer.ref_model = None
    # The columns that the precomputation wrote lie in a file of the temporary folder.
    trainer.train_dataset = Dataset.from_list(trainer.train_dataset.to_list())
    return trainer


def reward_trainer(arguments: dict[str, Any], pairs: list[dict[str, list[int]]], weights: Path) -> Any:
    """Return a `RewardTrainer`; transformers has no classifier of Cohere2, so its generic one is used."""
    from datasets import Dataset
    from transformers import AutoConfig, Cohere2PreTrainedModel
    from transformers.modeling_layers import GenericForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    class Classifier(GenericForSequenceClassification, Cohere2PreTrainedModel):  # type: ignore[misc]
        pass

    config = AutoConfig.from_pretrained(
        weights, num_labels=1, pad_token_id=0, local_files_only=True, trust_remote_code=False
    )
    model = Classifier.from_pretrained(weights, config=config, trust_remote_code=False, **LOADING)
    with torch.no_grad():
        model.score.weight.copy_(read_score(weights))
    columns = [
        {f"{name}_ids": pair["prompt"] + pair[name] for name in ("chosen", "rejected")} for pair in pairs
    ]
    return without_preparation(RewardTrainer)(
        model=model,
        args=RewardConfig(**arguments, max_length=None),
        train_dataset=Dataset.from_list(columns),
        processing_class=plain_tokenizer(config.vocab_size),
    )


LOADING = {"dtype": torch.float32, "local_files_only": True}


def trainer_arguments(configuration: Configuration, folder: str) -> dict[str, Any]:
    """Return the arguments of a trainer of TRL: nothing is saved or logged, and no activation is recomputed."""
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": configuration.dtype == "bfloat16",
        "gradient_checkpointing": False,
        "torch_compile": configuration.compiled,
        "per_device_train_batch_size": configuration.pairs,
        "gradient_accumulation_steps": PAIRS_OF_STEP // configuration.pairs,
        "train_sampling_strategy": "sequential" if configuration.by_length else "random",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": WEIGHT_DECAY,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "optim": "adamw_torch_fused",
        "max_grad_norm": CLIP,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def pairs_of(case: Path, configuration: Configuration) -> list[dict[str, list[int]]]:
    """Return the pairs in the order in which they are drawn."""
    pairs: list[dict[str, list[int]]] = json.loads((case / "pairs.json").read_text())
    if configuration.by_length:
        pairs.sort(key=lambda pair: len(pair["prompt"]) + max(len(pair["chosen"]), len(pair["rejected"])))
    return pairs


def plain_tokenizer(size: int) -> Any:
    """Return a tokenizer for what a trainer asks of it: the id that fills up rows."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w0"
    )


def trainer_steps(trainer: Any) -> Steps:
    """Make steps as `Trainer._run_epoch` does, without its callbacks."""
    trainer.create_optimizer()
    model, optimiser = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model_wrapped, trainer.optimizer = model, optimiser
    loader, accumulate = trainer.get_train_dataloader(), trainer.args.gradient_accumulation_steps

    def loss() -> float:
        model.train()
        with torch.no_grad():
            losses = [
                float(trainer.compute_loss(model, trainer._prepare_inputs(inputs))) for inputs in loader
            ]
        trainer._metrics["train"].clear()
        return sum(losses) / len(losses)

    def steps() -> Iterator[None]:
        iterator = iter(loader)
        for _ in range(len(loader) // accumulate):
            batches, items = trainer.get_batch_samples(iterator, accumulate, trainer.args.device)
            trainer.current_gradient_accumulation_steps = len(batches)
            for number, inputs in enumerate(batches, start=1):
                trainer.accelerator.gradient_state._set_sync_gradients(number == len(batches))
                trainer.training_step(model, inputs, items)
            trainer.accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimiser.step()
            model.zero_grad()
            trainer._metrics["train"].clear()
            yield

    return Steps(loss, steps)


SIDES: dict[str, Callable[[Configuration, Path, Path, Path], Steps]] = {"ours": ours, "trl": trl}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("configuration", help="JSON object of a Configuration")
    for name in ("case", "weights", "reference"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    answer, sys.stdout = sys.stdout, sys.stderr
    os.environ["TQDM_DISABLE"] = "1"
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    configuration = Configuration(**json.loads(options.configuration))
    side = SIDES[configuration.side](configuration, options.case, options.weights, options.reference)
    before = peak_memory()
    endless = endless_steps(side)

    def epoch() -> float:
        return float(sum(1 for _ in side.steps()))

    commands: dict[str, Callable[[], float]] = {
        "loss": side.loss,
        "step": lambda: float(next(endless)),
        "epoch": epoch,
        "memory": lambda: float(peak_memory()),
    }
    print(json.dumps({"ready": True}), file=answer, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        value = commands[json.loads(line)["do"]]()
        result = {"value": value, "seconds": time.perf_counter() - start, "baseline": before}
        print(json.dumps(result), file=answer, flush=True)


def endless_steps(side: Steps) -> Iterator[int]:
    """Yield the number of each step made, epoch after epoch."""
    number = 0
    while True:
        for _ in side.steps():
            number += 1
            yield number


if __name__ == "__main__":
    main()
