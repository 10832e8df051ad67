"""Estimate the peak memory and the time of a training."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from koine.model.config import ModelConfig
from koine.model.counting import count_parameters
from koine.train.settings import TrainSettings

if TYPE_CHECKING:
    from koine.data.mixture import Mixture

PROCESS_BYTES = 350 * 2**20
"""Memory of a process that has imported torch."""
DATA_BYTES = 70 * 2**20
"""Memory of the data order and of the metrics' writer."""
KERNEL_BYTES, KERNEL_STEPS, MOST_KERNEL_STEPS = 1.25 * 2**20, 200, 450
"""Memory that each of the first steps in bfloat16 adds: oneDNN keeps kernels for the shapes that it has seen.

Dense models have few new shapes after `KERNEL_STEPS`; the store holds no more than `MOST_KERNEL_STEPS` bring.
"""
CHECKPOINT_BYTES, MODEL_BYTES = 12, 4
"""Bytes on disk of a parameter: weights and two moments of a checkpoint, and the float32 weights of a model."""


class Estimate(NamedTuple):
    """Figures of a training in one process on this machine."""

    peak_bytes: int
    """Peak resident memory."""
    seconds: float
    kept_bytes: int = 0
    """Disk space of the result: the model, and the best checkpoint where there are evaluations."""
    temporary_bytes: int = 0
    """Disk space of the checkpoints that are there only while it runs, one being written."""
    basis: str = ""
    """One sentence about where the speed comes from."""
    measured: bool = True


def activation_bytes(config: ModelConfig, settings: TrainSettings, tokens: int) -> int:
    """Return the bytes of activations for the backward pass of one micro-batch of `tokens`.

    A block saves its input, the norm's output, the fused projections (q and k once more after RoPE), the
    gate's activation and the input of the output projection. Norms after the sublayers save their inputs, and
    norms of q and k theirs. With gradient checkpointing a block saves its input only; one block has all of
    these, and as many gradients, in float32.
    """
    element = 2 if settings.dtype == "bfloat16" else 4
    q, k, v, gate, up = config.projection_sizes
    block = 3 * config.hidden_size + (q + k + v + gate + up) + 2 * (q + k) + v + gate + 2 * (q + up)
    if config.arrangement in ("post_norm", "sandwich"):
        block += 2 * config.hidden_size
    if any(layer.qk_norm is not None for layer in config.layers):
        block += q + k
    layers = len(config.layers)
    ends = 4 * config.hidden_size
    if not settings.gradient_checkpointing:
        return element * (layers * block + ends) * tokens
    return (element * (layers * config.hidden_size + block + ends) + 4 * block) * tokens


def estimate_training(
    config: ModelConfig, settings: TrainSettings, mixture: Mixture, *, adapter: int = 0
) -> Estimate:
    """Return the peak memory, the time and the disk space of `train` with these arguments.

    Memory: float32 weights, moments and gradients (16 bytes a parameter), bfloat16 copies and their gradients
    (4 more), the activations of a micro-batch, the chunked loss, kernels. Time: that of the micro-batches and updates
    of every step (`koine.train.speed`), without evaluations.

    adapter: parameters of a LoRA adapter, which alone have moments and gradients. The base has 4 bytes a
        parameter (2 in bfloat16, once it is cast). Time is that of training all weights, an upper bound.
    """
    import torch

    from koine.train.loss import default_chunk
    from koine.train.speed import training_speed

    parameters = count_parameters(config).total
    mixed_precision = settings.dtype == "bfloat16"
    threads = settings.threads or torch.get_num_threads()
    seconds, activations, most_tokens, basis, measured = 0.0, 0, 0, "", True
    for shape, steps in mixture.shapes().items():
        rows = settings.micro_batch_rows(shape.batch_size, shape.sequence_length, mixture.sequence_length)
        tokens = rows * shape.sequence_length
        activations = max(activations, activation_bytes(config, settings, tokens))
        most_tokens = max(most_tokens, tokens)
        speed = training_speed(config, settings, rows, shape.sequence_length, threads)
        basis, measured = speed.basis, measured and speed.measured
        micro_batches = shape.batch_size / rows
        if config.mixture is not None and micro_batches > 1:
            # The forward pass that counts the expert assignments of the whole step
            # (`koine.model.moe.losses`).
            micro_batches *= 4 / 3
        seconds += steps * (micro_batches * speed.micro_batch + speed.update)
    rows_of_logits = min(most_tokens, default_chunk(config.vocab_size, config.hidden_size))
    loss_bytes = (
        4 * config.vocab_size * (3 * rows_of_logits + (3 if mixed_precision else 2) * config.hidden_size)
    )
    # Of a mixture every expert has another number of tokens in every step: the store is full at once.
    seen = MOST_KERNEL_STEPS if config.mixture else min(sum(mixture.shapes().values()), KERNEL_STEPS)
    kernels = KERNEL_BYTES * seen if mixed_precision else 0
    bytes_each = 20 if mixed_precision else 16
    if adapter:
        # The loss has no gradient of a frozen head. An adapter's checkpoint holds it once more as a file.
        loss_bytes -= 4 * config.vocab_size * config.hidden_size
        weights = parameters * 4 + adapter * bytes_each
        saved, parameters = CHECKPOINT_BYTES + MODEL_BYTES, adapter
    else:
        weights, saved = parameters * bytes_each, CHECKPOINT_BYTES
    return Estimate(
        PROCESS_BYTES + DATA_BYTES + int(kernels) + weights + activations + loss_bytes,
        seconds,
        parameters * (MODEL_BYTES + (saved if settings.evaluate_every else 0)),
        parameters * saved * (settings.keep_last + 1),
        basis,
        measured,
    )
