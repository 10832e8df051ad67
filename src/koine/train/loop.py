"""The training loop: one for every objective."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from koine import __version__
from koine.errors import KoineWarning, UserError
from koine.files import disk_errors, exclusive, fsync_tree, read_json, write_json
from koine.train import checkpoint as checkpoints
from koine.train.identity import identity, refuse_difference
from koine.train.interrupt import Interrupt, listen
from koine.train.objectives import Objective
from koine.train.optimiser import Optimiser
from koine.train.parallel import Ranks, join, shard
from koine.train.progress import Reporter, truncate_metrics
from koine.train.runtime import compile_blocks, measured_ceiling, numerics, training_flops
from koine.train.schedule import multiplier
from koine.train.settings import ROUNDING, TrainSettings
from koine.train.watch import Watch

if TYPE_CHECKING:
    from koine.data.order import DataOrder

Evaluate = Callable[[nn.Module, int], Mapping[str, float]]


class TrainingStopped(UserError):  # noqa: N818
    """The loss or the gradient went wrong; the weights are those of the last good checkpoint."""


def train(
    model: nn.Module,
    objective: Objective,
    data: DataOrder,
    settings: TrainSettings,
    *,
    out: Path,
    tokenizer: Path | None = None,
    evaluate: Evaluate | None = None,
    progress: bool = True,
    device: str = "auto",
) -> None:
    """Train `model` in place over all steps of the data's mixture and leave a model directory in `out`.

    The same call again resumes from the latest checkpoint, or returns at once where `out` is complete. Under `torchrun` the
    weights are split over the processes.

    Args:
        model: float32 weights; `forward(tokens, document_ids=...)` gives hidden states.
        objective: see `Objective`.
        evaluate: called every `evaluate_every` steps and after the last one with the model and the number of steps done; its
            figures go to the metrics, and lower is better where the best checkpoint is chosen. Must not change the model.

    Raises:
        UserError: `out` belongs to another training, a checkpoint is damaged, another process is writing here.
        TrainingStopped: a loss spike, or a loss or gradient that is no finite number.
        SystemExit: after SIGTERM (143) or SIGINT (130), with a checkpoint written.
    """
    out = Path(out)
    with disk_errors(out), numerics(settings), join(device) as ranks, listen() as interrupt:
        out.mkdir(parents=True, exist_ok=True)
        if not ranks.first:
            _train(model, objective, data, settings, out, tokenizer, evaluate, progress, ranks, interrupt)
            return
        with exclusive(out / ".lock", doing="training in this folder"):
            _train(model, objective, data, settings, out, tokenizer, evaluate, progress, ranks, interrupt)


def _train(
    model: nn.Module,
    objective: Objective,
    data: DataOrder,
    settings: TrainSettings,
    out: Path,
    tokenizer: Path | None,
    evaluate: Evaluate | None,
    progress: bool,
    ranks: Ranks,
    interrupt: Interrupt,
) -> None:
    from koine.model.decoder import Decoder

    if not isinstance(model, Decoder):
        raise UserError(
            f"{type(model).__name__} is no decoder of ours, which is what training writes",
            where=out,
            mend="give a model that koine.model.load_model opened (Cohere, Cohere2, or one that was trained here)",
        )
    what = identity(model, objective, data, settings, tokenizer)
    if (out / "training.json").exists():
        refuse_difference(read_json(out / "training.json")["identity"], what, out)
        if progress and ranks.first:
            print(f"{out}: complete already, nothing to do")
        return

    # The model: float32 masters, copies to compute with, and what was saved of an earlier run.
    mixture = data.mixture
    dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    model.to(ranks.device).train()
    if hasattr(model, "gradient_checkpointing"):
        setattr(model, "gradient_checkpointing", settings.gradient_checkpointing)  # noqa: B010
    if ranks.several:
        shard(model, ranks, dtype)
    optimiser = Optimiser(model, settings, dtype=torch.float32 if ranks.several else dtype)
    folder = out / "checkpoints"
    found = checkpoints.latest(folder)
    first_step, losses, best = 0, [], None
    rounding = {
        **settings.that_change(ROUNDING),
        "threads": torch.get_num_threads(),
        "ranks": ranks.world_size,
    }
    if found is not None:
        refuse_difference(found.about["identity"], what, found.path)
        _warn_of_rounding(found.about["rounding"], rounding)
        checkpoints.load(found, optimiser.tensors(found.step), ranks)
        optimiser.publish()
        first_step, losses, best = found.step, list(found.about["losses"]), found.about["best"]
    watch = Watch(settings, losses)
    compile_blocks(model, settings)
    rows = mixture.batch_size // ranks.world_size
    if rows * ranks.world_size != mixture.batch_size:
        raise UserError(
            f"a batch of {mixture.batch_size} sequences cannot be split over {ranks.world_size} processes",
            mend="choose a batch size that is a multiple of their number",
        )
    micro = settings.micro_batch_size or rows
    flops = training_flops(model, mixture.sequence_length)
    ceiling = measured_ceiling(model, micro * mixture.sequence_length, dtype, ranks.device)
    steps = sum(phase.steps for phase in mixture.phases)
    starts = [sum(phase.steps for phase in mixture.phases[:index]) for index in range(len(mixture.phases))]
    reporter = None
    if ranks.first:
        checkpoints.clean(folder, keep_last=settings.keep_last, best=best and best["step"])
        truncate_metrics(out / "metrics.jsonl", first_step)
        reporter = Reporter(out, first_step=first_step, steps=steps, progress=progress)
        if found is not None:
            reporter.say(f"resuming from {found.path}")

    saved = first_step
    try:
        for step in range(first_step, steps):
            begin = time.perf_counter()
            phase = max(index for index, start in enumerate(starts) if start <= step)
            if step == starts[phase]:
                watch.new_phase()

            # Sums over the micro batches of this rank, then over the ranks; the division by the units comes after.
            sums: dict[str, float] = {}
            total = torch.zeros((), dtype=torch.float64, device=ranks.device)
            for start in range(0, rows, micro):
                batch = data.batch(
                    step,
                    rank=ranks.rank,
                    world_size=ranks.world_size,
                    micro_batch=slice(start, min(start + micro, rows)),
                ).to(ranks.device)
                loss, measured = objective(model, batch)
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
                raise UserError(f"the batch of step {step} has no target", mend="check the data's loss masks")
            mean_loss = everything[0] / units
            # FSDP has averaged the gradients over the ranks.
            norm = optimiser.scale_and_clip(ranks.world_size / units, settings.clip_norm)
            trouble = watch.trouble(mean_loss, norm)
            if trouble is not None:
                raise _incident(trouble, step, mean_loss, norm, data, out, ranks)
            watch.add(mean_loss)

            rate = settings.learning_rate * multiplier(
                settings.schedule,
                step - starts[phase],
                mixture.phases[phase].steps,
                warmup_steps=settings.warmup_steps,
                min_ratio=settings.min_lr_ratio,
                decay_share=settings.decay_share,
            )
            optimiser.step(rate)

            done = step + 1
            seconds = time.perf_counter() - begin
            speed = mixture.batch_size * mixture.sequence_length / seconds
            if reporter is not None:
                figures = {"loss": mean_loss, "learning_rate": rate, "gradient_norm": norm, "units": units}
                figures |= {name: value / units for name, value in sums.items()} | {
                    "tokens_per_second": speed
                }
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
                about = {"identity": what, "rounding": rounding, "losses": watch.losses, "best": best}
                path = checkpoints.save(folder, done, optimiser.tensors(done), about, ranks)
                saved = done
                if ranks.first:
                    checkpoints.clean(folder, keep_last=settings.keep_last, best=best and best["step"])
                if stop and not last:
                    if ranks.first:
                        print(
                            f"koine: stopped after step {done}; saved {path}; run again to resume", flush=True
                        )
                    raise SystemExit(130 if interrupt.signal == signal.SIGINT else 143)
    finally:
        if reporter is not None:
            reporter.close()
    assert saved == steps
    _finish(model, optimiser, out, tokenizer, ranks, {
        "identity": what, "mixture": mixture.to_json(), "seed": mixture.seed, "settings": settings.to_json(),
        "rounding": rounding, "sources": what["sources"], "steps": steps, "best": best, "version": __version__,
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


def _evaluate(evaluate: Evaluate, model: nn.Module, done: int) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
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

        raise UserError(f"the evaluation has no metric '{name}'", mend=did_you_mean(name, figures))
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
    if ranks.first:
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
        mend="look at these documents, then lower the learning rate or raise spike_deviations, in a new --out",
    )


def _finish(
    model: nn.Module,
    optimiser: Optimiser,
    out: Path,
    tokenizer: Path | None,
    ranks: Ranks,
    about: dict[str, Any],
) -> None:
    """Leave a model directory; `training.json` comes last and says that it is whole."""
    from koine.model.checkpoint import save_state

    full: dict[str, Tensor] = {}
    for name, master in optimiser.masters.items():
        gathered = master.full_tensor() if hasattr(master, "full_tensor") else master
        if ranks.first:
            full[name] = gathered.detach().cpu()
    if ranks.first:
        partial = out / ".model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        save_state(full, model.config, partial, tokenizer=tokenizer)  # type: ignore[arg-type]
        fsync_tree(partial)
        for path in sorted(partial.iterdir()):
            path.replace(out / path.name)
        partial.rmdir()
        write_json(out / "training.json", about)
        best = about["best"] and about["best"]["step"]
        checkpoints.clean(out / "checkpoints", keep_last=0, best=best)
        if not any((out / "checkpoints").iterdir()):
            (out / "checkpoints").rmdir()
    if not ranks.several:
        optimiser.restore_float32()
    ranks.barrier()
