"""The training loop: one for every objective."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from koine import __version__
from koine.errors import KoineWarning, UserError
from koine.fields import Fields
from koine.files import clear_partials, disk_errors, exclusive, make_folder, read_json, write_json
from koine.model.language_model import LanguageModel
from koine.model.moe.losses import count_step, use_totals
from koine.train import checkpoint as checkpoints
from koine.train.determinism import compile_blocks, numerics
from koine.train.distributed import Ranks, join, shard
from koine.train.export import model_tensors
from koine.train.fingerprint import check_difference, identity
from koine.train.finish import check_model, describe, drop_checkpoints, finish
from koine.train.loss_spikes import Watch
from koine.train.model_adapters import check_packed_documents, prepare
from koine.train.objectives import Objective
from koine.train.optimiser import Optimiser
from koine.train.progress import Reporter, truncate_metrics
from koine.train.schedule import multiplier
from koine.train.settings import ROUNDING, TrainSettings
from koine.train.signals import Interrupt, listen
from koine.train.step_costs import work_of_each_shape

if TYPE_CHECKING:
    from koine.data.batch import Batch
    from koine.data.data_order import DataOrder

NO_TARGET = "for chats, tokenize records with assistant messages, and choose a sequence length that holds their answers"
Evaluate = Callable[[LanguageModel, int], Mapping[str, float]]


class TrainingStopped(UserError):  # noqa: N818
    """The loss or the gradient went wrong; the weights are those of the last good checkpoint."""


def train(
    model: LanguageModel,
    objective: Objective,
    data: DataOrder,
    settings: TrainSettings,
    *,
    out: Path,
    tokenizer: Path | None = None,
    init_from: Path | None = None,
    evaluate: Evaluate | None = None,
    progress: bool = True,
    device: str = "auto",
) -> None:
    """Train `model` in place over all steps of the data's mixture and leave a model directory in `out`.

    The same call again resumes from the latest checkpoint, or returns at once where `out` is complete. Under `torchrun` the
    weights are split over the processes.

    Args:
        model: our decoder, or a `CausalLM` around any of `transformers`, which takes one document a row (see
            `model_adapters.check_packed_documents`); its weights become float32.
        objective: see `Objective`.
        began_as: the folder that `model` was opened from: what belongs to a mixture beside its weights is carried along.
        evaluate: called every `evaluate_every` steps and after the last one with the model and the number of steps done; its
            figures go to the metrics, and lower is better where the best checkpoint is chosen. Must not change the model.

    Raises:
        UserError: `out` belongs to another training, a checkpoint is damaged, another process is writing here.
        TrainingStopped: a loss spike, or a loss or gradient that is no finite number.
        SystemExit: after SIGTERM (143) or SIGINT (130), with a checkpoint written.
    """
    out = Path(out)
    check_packed_documents(model, data.mixture, out)
    with disk_errors(out), numerics(settings), join(device) as ranks, listen() as interrupt:
        check_model(out, init_from)
        make_folder(out)
        alone = exclusive(out / ".lock", doing="training in this folder") if ranks.is_main else nullcontext()
        with alone:
            _train(
                model, objective, data, settings, out, tokenizer, init_from, evaluate, progress, ranks, interrupt
            )  # fmt: skip


def _train(
    model: LanguageModel,
    objective: Objective,
    data: DataOrder,
    settings: TrainSettings,
    out: Path,
    tokenizer: Path | None,
    init_from: Path | None,
    evaluate: Evaluate | None,
    progress: bool,
    ranks: Ranks,
    interrupt: Interrupt,
) -> None:
    what = identity(model, objective, data, settings, tokenizer)
    if (out / "training.json").exists():
        where = out / "training.json"
        before = Fields(read_json(where), where, hint_if_broken="it is damaged; choose another --out")
        check_difference(before.inner("identity").value, what, out)
        if ranks.is_main:
            # A kill may have come between the model and this.
            best_before = before.inner("best", None)
            drop_checkpoints(out, best_before and {"step": best_before.integer("step", low=0)})
        if progress and ranks.is_main:
            print(f"{out}: complete already, nothing to do")
        return

    # The model: float32 masters, copies to compute with, and what was saved of an earlier run.
    mixture = data.mixture
    dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    model.to(ranks.device)
    prepare(model, gradient_checkpointing=settings.gradient_checkpointing)
    if ranks.several:
        shard(model, ranks, dtype)
    optimiser = Optimiser(model, settings, dtype=torch.float32 if ranks.several else dtype)
    folder = out / "checkpoints"
    found = checkpoints.latest(folder)
    first_step, best = 0, None
    # Long rows may be of other text with another loss: what is usual is known for them and for the others apart.
    watches = {long: Watch(settings, []) for long in (False, True)}
    rounding = {
        **settings.that_change(ROUNDING),
        "threads": torch.get_num_threads(),
        "ranks": ranks.world_size,
    }
    if found is not None:
        check_difference(found.about["identity"], what, found.path)
        _warn_of_rounding(found.about["rounding"], rounding)
        checkpoints.load(found, optimiser.tensors(found.step), ranks)
        optimiser.publish()
        first_step, best = found.step, found.about["best"]
        watches[False].losses += found.about["losses"]
        watches[True].losses += found.about.get("long_losses", [])
    compile_blocks(model, settings)
    work = work_of_each_shape(model, settings, mixture, ranks, dtype)
    steps = sum(phase.steps for phase in mixture.phases)
    reporter = None
    if ranks.is_main:
        clear_partials(out, below=False)
        checkpoints.clean(folder, keep_last=settings.keep_last, best=best and best["step"])
        truncate_metrics(out / "metrics.jsonl", first_step)
        reporter = Reporter(out, first_step=first_step, steps=steps, progress=progress)
        if found is not None:
            reporter.say(f"resuming from {found.path}")

    def describe_into(path: Path) -> None:
        describe(model, path, tokenizer, init_from)

    saved = first_step
    try:
        for step in range(first_step, steps):
            begin = time.perf_counter()
            place, shape = mixture.position(step), mixture.shape(step)
            rows, micro, flops, ceiling = work[shape]
            watch = watches[place.long]
            if place.inside == 0:
                for each in watches.values():
                    each.new_phase()

            # Sums over the micro batches of this rank, then over the ranks; the division by the units comes after.
            sums: dict[str, float] = {}
            total = torch.zeros((), dtype=torch.float64, device=ranks.device)
            parts = [slice(start, min(start + micro, rows)) for start in range(0, rows, micro)]

            def read(part: slice, step: int = step) -> Batch:
                batch = data.batch(step, rank=ranks.rank, world_size=ranks.world_size, micro_batch=part)
                return batch.to(ranks.device)

            # The routers of a mixture are judged by the whole step.
            totals = count_step(model, objective, map(read, parts), len(parts), ranks)
            for part in parts:
                with use_totals(totals):
                    loss, measured = objective(model, read(part))
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.collect()
                total += loss.detach()
                for name, value in measured.items():
                    sums[name] = sums.get(name, 0.0) + value
            everything = ranks.sum(
                torch.tensor(
                    [float(total), float(interrupt.signal or 0), *sums.values()], dtype=torch.float64
                )
            ).tolist()
            sums = dict(zip(sums, everything[2:], strict=True))
            units = sums.pop("units")
            if units == 0:
                raise UserError(f"the batch of step {step} has no target", hint=NO_TARGET)
            mean_loss = everything[0] / units
            # FSDP has averaged the gradients over the ranks.
            norm = optimiser.scale_and_clip(ranks.world_size / units, settings.clip_norm)
            trouble = watch.trouble(mean_loss, norm)
            if trouble is not None:
                raise _incident(trouble, step, mean_loss, norm, data, out, ranks)
            watch.add(mean_loss)

            rate = settings.learning_rate * multiplier(
                settings.schedule,
                place.inside,
                mixture.phases[place.phase].steps,
                warmup_steps=settings.warmup_steps,
                min_ratio=settings.min_lr_ratio,
                decay_share=settings.decay_share,
            )
            optimiser.step(rate)

            done = step + 1
            # A clock that stands still, or goes back, as those of virtual machines do.
            seconds = max(time.perf_counter() - begin, 1e-9)
            speed = shape.tokens / seconds
            if reporter is not None:
                figures = {"loss": mean_loss, "learning_rate": rate, "gradient_norm": norm, "units": units}
                figures |= {name: value / units for name, value in sums.items()} | {
                    "tokens_per_second": speed
                }
                if len(work) > 1:
                    figures["sequence_length"] = shape.sequence_length
                if flops and ceiling:
                    figures["ceiling_share"] = speed * flops / ceiling / ranks.world_size
                reporter.step(step, figures)
            last = done == steps
            evaluated = evaluate is not None and settings.evaluate_every > 0
            if evaluate is not None and evaluated and (last or done % settings.evaluate_every == 0):
                figures = _evaluate(evaluate, model, done)
                best = _better(best, figures, done, settings.best_metric)
                if reporter is not None:
                    reporter.evaluation(step, figures)
                due = best is not None and best["step"] == done
            else:
                due = False
            stop = everything[1] > 0
            if last or stop or due or done % settings.checkpoint_every == 0:
                about = {
                    "identity": what, "rounding": rounding, "best": best,
                    "losses": watches[False].losses, "long_losses": watches[True].losses,
                }  # fmt: skip
                tensors = optimiser.tensors(done) | model_tensors(model)
                path = checkpoints.save(folder, done, tensors, about, ranks, describe_into)
                saved = done
                if ranks.is_main:
                    checkpoints.clean(folder, keep_last=settings.keep_last, best=best and best["step"])
                if stop and not last:
                    if ranks.is_main:
                        print(
                            f"koine: stopped after step {done}; saved {path}; run again to resume", flush=True
                        )
                    raise SystemExit(130 if interrupt.signal == signal.SIGINT else 143)
    finally:
        if reporter is not None:
            reporter.close()
    assert saved == steps
    finish(model, optimiser, out, tokenizer, init_from, ranks, {
        "identity": what, "mixture": mixture.to_json(), "seed": mixture.seed, "settings": settings.to_json(),
        "rounding": rounding, "sources": what["sources"], "steps": steps, "best": best, "version": __version__,
        # What the next training need not read again; an order of another kind has no places.
        "drawn": [one.to_json() for one in data.drawn()] if hasattr(data, "drawn") else [],
    })  # fmt: skip


def _warn_of_rounding(before: dict[str, Any], now: dict[str, Any]) -> None:
    import warnings

    lines = checkpoints.difference(before, now)
    if lines:
        warnings.warn(
            "resuming in another way than before, the result is equal up to rounding only: "
            + "; ".join(lines),
            KoineWarning,
            stacklevel=4,
        )


def _evaluate(evaluate: Evaluate, model: LanguageModel, done: int) -> dict[str, float]:
    model.eval()
    # What an evaluation draws must not move what dropout draws next: evaluating changes nothing of the
    # training.
    with torch.no_grad(), torch.random.fork_rng():
        figures = dict(evaluate(model, done))
    model.train()
    return figures


def _better(
    best: dict[str, Any] | None, figures: dict[str, float], done: int, metric: str
) -> dict[str, Any] | None:
    """The best evaluation so far; raises `UserError` where the metric that decides is not measured."""
    if not figures:
        return best
    name = metric or next(iter(figures))
    if name not in figures:
        from koine.errors import did_you_mean

        raise UserError(f"the evaluation has no metric '{name}'", hint=did_you_mean(name, figures))
    if best is None or figures[name] < best["value"]:
        return {"step": done, "metric": name, "value": figures[name]}
    return best


def _incident(
    trouble: str, step: int, loss: float, norm: float, data: DataOrder, out: Path, ranks: Ranks
) -> TrainingStopped:
    """Write `incident-step-N.json` with the documents of the whole batch; the error to raise."""
    good = checkpoints.list_checkpoints(out / "checkpoints")
    last_good = str(good[-1]) if good else None
    path = out / f"incident-step-{step}.json"
    documents = [
        {"row": row, "source": s.source, "language": s.language, "domain": s.domain, "id": s.record_id,
         "start": s.start, "end": s.end}
        for row, spans in enumerate(data.batch(step).documents)
        for s in spans
    ]  # fmt: skip
    if ranks.is_main:
        write_json(
            path,
            {"step": step, "trouble": trouble, "loss": str(loss), "gradient_norm": str(norm),
             "last_good_checkpoint": last_good, "documents": documents},
        )  # fmt: skip
    ids = list(dict.fromkeys(str(document["id"]) for document in documents))
    shown = ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
    return TrainingStopped(
        f"{trouble} at step {step}, before the weights were changed; documents of the batch: {shown}; "
        f"last good checkpoint: {last_good or 'none yet'}",
        where=path,
        hint="look at these documents, then lower the learning rate or raise spike_deviations, in a new --out"
        + (
            f" (from the model of `koine model export {last_good} --format safetensors --out MODEL`)"
            if last_good
            else ""
        ),
    )
