"""Estimate the peak memory and the time of a training."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from koine.model.config import ModelConfig
from koine.model.counting import count_parameters, training_flops_per_token
from koine.train.settings import TrainSettings

if TYPE_CHECKING:
    from koine.data.mixture import Mixture

PROCESS_BYTES = 350 * 2**20
"""Memory of a process that has imported torch."""
MATMUL_RATE_SHARE = 0.35
"""Share of the matmul rate that a training step is assumed to reach."""


class Estimate(NamedTuple):
    """Peak resident bytes of one process, and seconds on this machine."""

    peak_bytes: int
    seconds: float


def activation_bytes(config: ModelConfig, settings: TrainSettings, tokens: int) -> int:
    """Return the bytes of activations for the backward pass of one micro-batch of `tokens`.

    A block saves its input, the norm's output, the fused projections (q and k once more after RoPE), the
    gate's activation and the input of the output projection. With gradient checkpointing it saves its input
    only; one block has all of these, and as many gradients, in float32.
    """
    element = 2 if settings.dtype == "bfloat16" else 4
    q, k, v, gate, up = config.projection_sizes
    block = 3 * config.hidden_size + (q + k + v + gate + up) + 2 * (q + k) + v + gate + 2 * (q + up)
    layers = len(config.layers)
    ends = 4 * config.hidden_size
    if not settings.gradient_checkpointing:
        return element * (layers * block + ends) * tokens
    return (element * (layers * config.hidden_size + block + ends) + 4 * block) * tokens


def estimate_training(config: ModelConfig, settings: TrainSettings, mixture: Mixture) -> Estimate:
    """Return the peak memory and the time of `train` with these arguments, in one process on this CPU.

    Memory: float32 weights, moments and gradients (16 bytes a parameter), bfloat16 copies and their gradients
    (4 more), the activations of a micro-batch, the chunked loss. Time: FLOPs over `MATMUL_RATE_SHARE` of the
    matmul rate, which is measured now.
    """
    import torch

    from koine.train.loss import CHUNK_BYTES
    from koine.train.matmul_rate import measure_matmul_rate

    parameters = count_parameters(config).total
    shapes = mixture.shapes()
    micro_batch_tokens = {
        shape: shape.sequence_length
        * settings.micro_batch_rows(shape.batch_size, shape.sequence_length, mixture.sequence_length)
        for shape in shapes
    }
    mixed_precision = settings.dtype == "bfloat16"
    loss_bytes = 3 * CHUNK_BYTES + (3 if mixed_precision else 2) * 4 * config.vocab_size * config.hidden_size
    activations = max(activation_bytes(config, settings, tokens) for tokens in micro_batch_tokens.values())
    peak = parameters * (20 if mixed_precision else 16) + activations + loss_bytes
    dtype = torch.bfloat16 if mixed_precision else torch.float32
    threads = settings.threads or torch.get_num_threads()
    seconds = 0.0
    for shape, steps in shapes.items():
        rate = measure_matmul_rate(
            min(micro_batch_tokens[shape], 8192),
            config.hidden_size,
            sum(config.projection_sizes),
            dtype,
            "cpu",
            threads,
        )
        operations = training_flops_per_token(config, shape.sequence_length) * shape.tokens
        if config.mixture is not None and micro_batch_tokens[shape] < shape.tokens:
            # The forward pass that counts the expert assignments of the whole step
            # (`koine.model.moe.losses`).
            operations *= 4 / 3
        seconds += steps * operations / (rate * MATMUL_RATE_SHARE)
    return Estimate(PROCESS_BYTES + peak, seconds)
