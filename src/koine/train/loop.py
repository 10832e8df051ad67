"""The training loop: one for every objective."""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from koine import __version__
from koine.data.cut_text import CutText, check_chats_keep_completions, cut_figures
from koine.errors import KoineWarning, UserError
from koine.fields import Fields
from koine.files import clear_partials, disk_errors, exclusive, make_folder, read_json
from koine.model.language_model import LanguageModel
from koine.model.moe.losses import count_step, use_totals
from koine.plan.store.publish import artifact_name
from koine.terminal import note
from koine.train import checkpoint as checkpoints
from koine.train.card import training_card
from koine.train.checkpoint import Checkpoint
from koine.train.determinism import deterministic
from koine.train.distributed import Ranks, apply_fsdp, join_ranks
from koine.train.evaluation import better_evaluation, run_evaluation
from koine.train.export import (
    OutputFolder,
    gathered_weights,
    model_buffers,
    write_description,
    write_model,
)
from koine.train.fingerprint import check_same_training, differences, training_identity
from koine.train.incident import TrainingStopped, write_incident
from koine.train.loss_spikes import SpikeDetector
from koine.train.model_adapters import check_packed_documents, compile_blocks, prepare_model
from koine.train.objectives import Objective, objective_of_step
from koine.train.optimiser import Optimiser
from koine.train.progress import Reporter, truncate_metrics
from koine.train.schedule import learning_rate_factor
from koine.train.settings import ROUNDING, TrainSettings
from koine.train.signals import Interrupt, catch_interrupts
from koine.train.step_costs import StepCost, costs_by_shape
from koine.train.stopping import ChoosesBest, StopRule, best_of_rule, stop_identity
from koine.train.tracking.background import Tracking
from koine.train.tracking.run_logger import Outcome, RunLogger

if TYPE_CHECKING:
    from koine.data.batch import StepBatches
    from koine.data.mixture import StepPosition
    from koine.model.formats.model_card import ModelCard

__all__ = ["Evaluate", "TrainingStopped", "train"]

NO_TARGET = (
    "for chats, tokenize records with assistant messages, and choose a sequence length "
    "that holds their answers"
)
Evaluate = Callable[[LanguageModel, int], Mapping[str, float]]
"""`metrics = evaluate(model, steps_done)`; it must not change the model. No metrics: nothing was measured."""


def train(
    model: LanguageModel,
    objective: Objective,
    data: StepBatches,
    settings: TrainSettings,
    *,
    out: Path,
    tokenizer: Path | None = None,
    init_from: Path | None = None,
    evaluate: Evaluate | None = None,
    stop: StopRule | None = None,
    progress: bool = True,
    device: str = "auto",
    logger: RunLogger | None = None,
) -> None:
    """Train `model` in place over all steps of the data's mixture and write a model directory.

    Of a model with a LoRA adapter (`koine.model.add_lora`) only the adapter is trained, and a PEFT adapter is
    written; its base is cast to the dtype of the computation.

    The same call again resumes from the latest checkpoint, or returns at once if `out` is complete. Under
    `torchrun` the weights are split over the processes.

    Args:
        model: our decoder, or a `CausalLM` around a model of `transformers`; its weights become float32. A
            class that cannot keep packed documents apart takes one document a row
            (see `model_adapters.check_packed_documents`).
        objective: what to minimise, for example `LanguageModelling()`; see `Objective`.
        data: the batches.
        settings: how to train.
        out: folder of the model, its checkpoints and metrics.
        tokenizer: folder of the tokenizer, whose files are copied to `out`.
        init_from: folder that `model` was opened from, whose files beside the weights are copied to `out`.
        evaluate: called every `evaluate_every` steps and after the last one with the model and the number of
            steps done. Its figures are metrics. Lower is better where the best checkpoint is chosen.
        stop: called after each evaluation with the evaluations so far. Where it returns a reason, training ends
            as after the last step: the model is that of this step, and the best checkpoint is kept.
        progress: show a progress bar, or a line every few seconds.
        device: `cpu`, `cuda`, or `auto`.
        logger: an experiment tracker that gets the figures too, such as `open_run_logger("wandb")`. It does
            not change the training, and the training does not fail with it.

    Raises:
        UserError: `out` belongs to another training, a checkpoint is damaged, another process is writing
            here, the objective or stop rule has no identity, nothing is evaluated for the stop rule, or too
            many chats lose all their completion tokens.
        TrainingStopped: a loss spike, or a loss or gradient norm that is not finite.
        SystemExit: after SIGTERM (143) or SIGINT (130), with a checkpoint written.
    """
    output = OutputFolder(Path(out), tokenizer, init_from)
    # A data order of another class need not say so.
    if not getattr(data, "holds_groups", False):
        check_packed_documents(model, data.mixture, output.path)
    check_chats_keep_completions(cut_text(data))
    stops = stop_identity(stop, evaluate, settings)
    with (
        disk_errors(output.path),
        deterministic(settings),
        join_ranks(device) as ranks,
        catch_interrupts() as interrupt,
    ):
        if ranks.is_distributed and settings.optimiser == "muon":
            raise UserError(
                f"muon trains on one process, and this training has {ranks.world_size}",
                hint="choose the optimiser adamw",
            )
        output.check_no_other_model()
        make_folder(output.path)
        lock = (
            exclusive(output.path / ".lock", doing="training in this folder")
            if ranks.is_main
            else nullcontext()
        )
        with lock:
            identity = training_identity(model, objective, data, settings, tokenizer)
            if stops is not None:
                identity["stop"] = stops
            if output.record.exists():
                _check_complete(output, identity, model, ranks)
                if progress and ranks.is_main:
                    note(f"{out}: complete already, nothing to do")
                return
            checkpoint = checkpoints.latest(output.checkpoints)
            if checkpoint is not None:
                check_same_training(checkpoint.record["identity"], identity, model, checkpoint.path)
            trainer = Trainer(
                model, objective, data, settings, output, identity, evaluate, stop, ranks, interrupt
            )
            trainer.run(checkpoint, progress=progress, logger=logger)


def _check_complete(
    output: OutputFolder, identity: dict[str, Any], model: LanguageModel, ranks: Ranks
) -> None:
    """Raise `UserError` if the complete training in a folder is another one than that asked for."""
    record = Fields(
        read_json(output.record), output.record, hint_if_broken="it is damaged; choose another --out"
    )
    check_same_training(record.inner("identity").value, identity, model, output.path)
    if ranks.is_main:
        # A kill may have come after the record was written and before checkpoints were removed.
        best = record.inner("best", None)
        output.remove_checkpoints(best and best.integer("step", low=0))


class StepResult(NamedTuple):
    """Figures of one optimiser step, over all micro-batches and ranks."""

    loss: float
    """Mean over the units."""
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    units: float
    metrics: dict[str, float]
    """Metrics of the objective, means over the units."""


class Trainer:
    """A training on one rank: model, optimiser, loss history and best evaluation."""

    def __init__(
        self,
        model: LanguageModel,
        objective: Objective,
        data: StepBatches,
        settings: TrainSettings,
        output: OutputFolder,
        identity: dict[str, Any],
        evaluate: Evaluate | None,
        stop: StopRule | None,
        ranks: Ranks,
        interrupt: Interrupt,
    ) -> None:
        self.model, self.objective, self.data, self.settings = model, objective, data, settings
        self.output, self.identity = output, identity
        self.evaluate, self.stop, self.ranks, self.interrupt = evaluate, stop, ranks, interrupt
        self.mixture = data.mixture
        self.total_steps = sum(phase.steps for phase in self.mixture.phases)
        self.first_step = self.steps_done = 0
        self.best: dict[str, Any] | None = None
        self.evaluations: list[dict[str, float]] = []
        """What the stop rule sees; empty without one."""
        self.stop_reason: str | None = None
        self.rounding = {
            **settings.fields_that_change(ROUNDING),
            "threads": torch.get_num_threads(),
            "ranks": ranks.world_size,
        }
        self.cut_text = cut_text(data)
        # Long rows may be of other text with another loss: each kind is compared with its own recent losses.
        self.spike_detectors = {is_long: SpikeDetector(settings, []) for is_long in (False, True)}

        # The model computes in `dtype`; the optimiser has float32 master weights.
        dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
        model.to(ranks.device)
        prepare_model(model, gradient_checkpointing=settings.gradient_checkpointing)
        if ranks.is_distributed:
            apply_fsdp(model, ranks, dtype)
        self.optimiser = Optimiser(model, settings, dtype=torch.float32 if ranks.is_distributed else dtype)
        self.step_costs = costs_by_shape(model, settings, self.mixture, ranks, dtype)

    def run(self, checkpoint: Checkpoint | None, *, progress: bool, logger: RunLogger | None) -> None:
        """Train from a checkpoint, or from the first step, to the last step; write the model."""
        if checkpoint is not None:
            self.load_checkpoint(checkpoint)
        compile_blocks(self.model, self.settings)
        reporter = self.open_reporter(logger, progress=progress) if self.ranks.is_main else None
        if reporter is not None and checkpoint is not None:
            reporter.print(f"resuming from {checkpoint.path}")
        outcome: Outcome = "failed"
        try:
            while self.steps_done < self.total_steps and self.stop_reason is None:
                self.run_step(self.steps_done, reporter)
            outcome = "finished"
            if reporter is not None and self.stop_reason is not None:
                reporter.print(f"stopped after step {self.steps_done}: {self.stop_reason}")
        except SystemExit:
            outcome = "interrupted"
            raise
        finally:
            if reporter is not None:
                reporter.close(outcome)
        write_model(
            self.model,
            self.optimiser,
            self.output,
            self.ranks,
            self.record(),
            lambda: self.card(self.steps_done),
        )

    def run_step(self, step: int, reporter: Reporter | None) -> None:
        """Take one step, report it, and evaluate and save a checkpoint where that is due."""
        begin = time.perf_counter()
        result = self.train_step(step)
        # The clocks of virtual machines may stand still or go back.
        seconds = max(time.perf_counter() - begin, 1e-9)
        if reporter is not None:
            reporter.step(step, self.step_figures(step, result, seconds))

        self.steps_done = steps_done = step + 1
        is_best = self.evaluate_if_due(steps_done, reporter)
        is_last = steps_done == self.total_steps or self.stop_reason is not None
        is_interrupted = self.ranks.any(self.interrupt.signal is not None)
        if is_last or is_interrupted or is_best or steps_done % self.settings.checkpoint_every == 0:
            path = self.save_checkpoint(steps_done)
            if is_interrupted and not is_last:
                if self.ranks.is_main:
                    print(
                        f"koine: stopped after step {steps_done}; saved {path}; run again to resume",
                        flush=True,
                    )
                raise SystemExit(130 if self.interrupt.signal == signal.SIGINT else 143)

    def train_step(self, step: int) -> StepResult:
        """Take one optimiser step: forward and backward over the micro-batches, clip, check, update."""
        position = self.mixture.position(step)
        cost = self.step_costs[self.mixture.shape(step)]
        spike_detector = self.spike_detectors[position.long]
        if position.inside == 0:
            for detector in self.spike_detectors.values():
                detector.reset()

        # Sums over this rank's micro-batches, then over all ranks; they are divided by the units last.
        local_loss_sum, local_metric_sums = self.forward_backward(step, cost)
        loss_sum = self.ranks.sum_number(local_loss_sum)
        metric_sums = self.ranks.sum_numbers(local_metric_sums)
        units = metric_sums.pop("units")
        if units == 0:
            raise UserError(f"the batch of step {step} has no target", hint=NO_TARGET)
        loss = loss_sum / units
        metrics = {name: value / units for name, value in metric_sums.items()}

        # Gradients are sums over the units; FSDP has divided them by the number of ranks.
        gradient_norm = self.optimiser.scale_and_clip(self.ranks.world_size / units, self.settings.clip_norm)
        problem = spike_detector.find_problem(loss, gradient_norm)
        if problem is not None:
            raise write_incident(problem, step, loss, gradient_norm, self.data, self.output, self.ranks)
        spike_detector.add(loss)

        learning_rate = self.learning_rate(position)
        self.optimiser.step(learning_rate)
        return StepResult(loss, learning_rate, gradient_norm, units, metrics)

    def forward_backward(self, step: int, cost: StepCost) -> tuple[float, dict[str, float]]:
        """Add up the gradients of this rank's micro-batches; return the sums of their loss and metrics."""
        micro_batches = cost.micro_batches()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        metric_sums: dict[str, float] = {}

        def load_batch(rows: slice) -> Any:
            batch = self.data.batch(
                step, rank=self.ranks.rank, world_size=self.ranks.world_size, micro_batch=rows
            )
            return batch.to(self.ranks.device)

        objective = objective_of_step(self.objective, self.model, map(load_batch, micro_batches), self.ranks)
        # The router losses of a mixture of experts are those of the whole step.
        totals = count_step(
            self.model, objective, map(load_batch, micro_batches), len(micro_batches), self.ranks
        )
        for rows in micro_batches:
            with use_totals(totals):
                loss, metrics = objective(self.model, load_batch(rows))
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimiser.accumulate_gradients()
            loss_sum += loss.detach()
            for name, value in metrics.items():
                metric_sums[name] = metric_sums.get(name, 0.0) + value
        return float(loss_sum), metric_sums

    def learning_rate(self, position: StepPosition) -> float:
        """Return the learning rate at a position in the mixture."""
        settings = self.settings
        return settings.learning_rate * learning_rate_factor(
            settings.schedule,
            position.inside,
            self.mixture.phases[position.phase].steps,
            warmup_steps=settings.warmup_steps,
            min_ratio=settings.min_lr_ratio,
            decay_share=settings.decay_share,
        )

    def step_figures(self, step: int, result: StepResult, seconds: float) -> dict[str, float]:
        """Return the figures of a step as `metrics.jsonl` has them."""
        shape = self.mixture.shape(step)
        cost = self.step_costs[shape]
        tokens_per_second = shape.tokens / seconds
        figures = {
            "loss": result.loss,
            "learning_rate": result.learning_rate,
            "gradient_norm": result.gradient_norm,
            "units": result.units,
            **result.metrics,
            "tokens_per_second": tokens_per_second,
        }
        if step == 0:
            figures |= cut_figures(self.cut_text)
        if len(self.step_costs) > 1:
            figures["sequence_length"] = shape.sequence_length
        if cost.flops_per_token and cost.matmul_rate:
            flops_per_second = tokens_per_second * cost.flops_per_token / self.ranks.world_size
            figures["matmul_rate_share"] = flops_per_second / cost.matmul_rate
        return figures

    def evaluate_if_due(self, steps_done: int, reporter: Reporter | None) -> bool:
        """Evaluate where that is due; return whether this evaluation is the best so far."""
        every, is_last = self.settings.evaluate_every, steps_done == self.total_steps
        if self.evaluate is None or not every or not (is_last or steps_done % every == 0):
            return False
        figures = self.ranks.of_main(run_evaluation(self.evaluate, self.model, steps_done))
        if not figures:
            return False
        if self.stop is not None:
            self.evaluations.append({**figures, "step": steps_done})
            self.apply_stop_rule()
        if isinstance(self.stop, ChoosesBest) and not self.settings.best_metric:
            self.best = best_of_rule(self.stop, self.evaluations, self.best)
        else:
            self.best = better_evaluation(self.best, figures, steps_done, self.settings.best_metric)
        if reporter is not None:
            reporter.evaluation(steps_done - 1, figures)
        return self.best is not None and self.best["step"] == steps_done

    def apply_stop_rule(self) -> None:
        """Decide whether training ends after the evaluations so far.

        They follow from the checkpoint and the steps after it, so a resumed run decides the same.
        """
        if self.stop is not None and self.evaluations:
            self.stop_reason = self.stop(self.evaluations)

    def open_reporter(self, logger: RunLogger | None, *, progress: bool) -> Reporter:
        """Remove what a killed run left unfinished, and open the metrics and the tracker's run."""
        output = self.output
        clear_partials(output.path, below=False)
        self.remove_old_checkpoints()
        truncate_metrics(output.path / "metrics.jsonl", self.first_step)
        tracking = None
        if logger is not None:
            tracking = Tracking(
                logger,
                output.path,
                name=artifact_name(output.path),
                config=self.tracked_config(),
                first_step=self.first_step,
            )
        return Reporter(
            output.path,
            first_step=self.first_step,
            steps=self.total_steps,
            progress=progress,
            tracking=tracking,
        )

    def tracked_config(self) -> dict[str, Any]:
        """Return what a tracker shows beside the figures: settings, data, model, versions."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        keys = ("objective", "mixture", "model")
        return {
            "settings": self.settings.to_json(),
            **{key: self.identity[key] for key in keys},
            "parameters": parameters,
            "steps": self.total_steps,
            "ranks": self.ranks.world_size,
            "koine": __version__,
        }

    def save_checkpoint(self, steps_done: int) -> Path:
        """Write a checkpoint, remove older ones, and return its path."""
        record = {
            "identity": self.identity,
            "rounding": self.rounding,
            "best": self.best,
            "evaluations": self.evaluations,
            "losses": self.spike_detectors[False].losses,
            "long_losses": self.spike_detectors[True].losses,
        }
        tensors = self.optimiser.tensors(steps_done) | model_buffers(self.model)
        adapter = getattr(self.model, "adapter", None)
        weights = {} if adapter is None else gathered_weights(self.optimiser, self.ranks)
        path = checkpoints.save(
            self.output.checkpoints,
            steps_done,
            tensors,
            record,
            self.ranks,
            lambda folder: write_description(self.model, folder, self.output, self.card(steps_done), weights),
        )
        if self.ranks.is_main:
            self.remove_old_checkpoints()
        return path

    def remove_old_checkpoints(self) -> None:
        """Keep the latest checkpoints and the best one."""
        best_step = self.best["step"] if self.best else None
        checkpoints.clean(self.output.checkpoints, keep_last=self.settings.keep_last, best=best_step)

    def load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Restore weights, optimiser, random state, loss history and best evaluation."""
        record = checkpoint.record
        _warn_of_rounding(record["rounding"], self.rounding)
        checkpoints.load(checkpoint, self.optimiser.tensors(checkpoint.step), self.ranks)
        self.optimiser.copy_masters_to_model()
        self.first_step = self.steps_done = checkpoint.step
        self.best, self.evaluations = record["best"], list(record.get("evaluations", []))
        self.apply_stop_rule()
        self.spike_detectors[False].losses += record["losses"]
        self.spike_detectors[True].losses += record.get("long_losses", [])

    def card(self, steps_done: int) -> ModelCard:
        """Return the model card after `steps_done` steps; only the main rank has the figures for it."""
        return training_card(
            self.data,
            self.settings,
            self.identity,
            self.output,
            steps_done=steps_done,
            stopped=self.stop_reason,
        )

    def stopped(self) -> dict[str, Any]:
        """Return where and why the stop rule ended the training, for the record; empty where it did not."""
        if self.stop_reason is None:
            return {}
        return {"stopped": {"step": self.steps_done, "of": self.total_steps, "reason": self.stop_reason}}

    def record(self) -> dict[str, Any]:
        """Return the content of `training.json`."""
        data = self.data
        return {
            "identity": self.identity,
            "mixture": self.mixture.to_json(),
            "seed": self.mixture.seed,
            "settings": self.settings.to_json(),
            "rounding": self.rounding,
            "sources": self.identity["sources"],
            "steps": self.steps_done,
            **self.stopped(),
            "best": self.best,
            "cut_text": [one.to_json() for one in self.cut_text],
            "version": __version__,
            # The next training can go on after these documents; a data order of another class has none.
            "drawn": [one.to_json() for one in data.drawn()] if hasattr(data, "drawn") else [],
            **(data.record() if hasattr(data, "record") else {}),
        }


def cut_text(data: StepBatches) -> tuple[CutText, ...]:
    """Return what is cut off of long documents; a data order of another class may not count it."""
    return getattr(data, "cut_text", ())


def _warn_of_rounding(before: dict[str, Any], now: dict[str, Any]) -> None:
    lines = differences(before, now)
    if lines:
        warnings.warn(
            "resuming with other settings than before, the result is equal up to rounding only: "
            + "; ".join(lines),
            KoineWarning,
            stacklevel=5,
        )
