"""The frequencies of RoPE and how they are scaled for contexts longer than those of training.

| scaling | frequency `f_i = theta ** (-2i / rotary_dim)` becomes |
|---|---|
| `linear` | `f_i / factor` |
| `dynamic` | as with a larger theta, which grows with the length of the sequence beyond the context |
| `llama3` | `f_i` for short wavelengths, `f_i / factor` for long ones, a blend between |
| `yarn` | the same with another ramp (arXiv 2309.00071), and a factor on the rotated vectors |

The formulas are those of `transformers` (`modeling_rope_utils`). Only the first `rotary_dim` entries of a
head are rotated; the frequencies of the others are 0.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from koine.model.config import LayerSpec, ModelConfig, RopeScaling


@dataclass(frozen=True)
class Rope:
    """All that determines the frequencies of a layer.

    context: `max_position_embeddings`, for the scaling.
    """

    theta: float
    head_dim: int
    rotary_dim: int
    context: int
    scaling: RopeScaling | None = None


def rope_of(config: ModelConfig, spec: LayerSpec) -> Rope:
    """Return the RoPE of a layer; a base of the layer's own is not scaled."""
    own = spec.rope_theta is not None
    theta = config.rope_theta if spec.rope_theta is None else spec.rope_theta
    return Rope(
        theta,
        config.head_dim,
        config.rotary_dim or config.head_dim,
        config.max_position_embeddings,
        None if own else config.rope_scaling,
    )


@functools.lru_cache(maxsize=32)
def frequencies_of(rope: Rope, device: torch.device) -> Tensor:
    """Return the frequencies `[head_dim / 2]`; not for `dynamic`, whose depend on the sequence."""
    # An ordinary tensor even if it is first needed in inference mode: training uses the same one.
    with torch.inference_mode(False):
        plain = _unscaled(rope.theta, rope.rotary_dim, device)
        scaling = rope.scaling
        if scaling is None:
            scaled = plain
        elif scaling.kind == "linear":
            scaled = plain / scaling.factor
        elif scaling.kind == "llama3":
            scaled = _llama3(plain, scaling, rope.context)
        else:
            assert scaling.kind == "yarn"
            scaled = _yarn(plain, rope, scaling)
        return _padded(scaled, rope)


def _unscaled(theta: float, rotary_dim: int, device: torch.device) -> Tensor:
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
    # As transformers computes it, to the last bit: at position 100,000 an ulp is a visible angle.
    return 1.0 / theta**exponents


def _padded(frequencies: Tensor, rope: Rope) -> Tensor:
    """Append the zeros of the entries that are not rotated."""
    return torch.nn.functional.pad(frequencies, (0, (rope.head_dim - rope.rotary_dim) // 2))


def sequence_lengths(positions: Tensor) -> Tensor:
    """Return the length of the sequence that each position belongs to, `[batch, time]`.

    A sequence is a run of consecutive positions in a row; its length is its last position + 1.
    """
    ends = torch.ones_like(positions, dtype=torch.bool)
    ends[:, :-1] = positions[:, 1:] != positions[:, :-1] + 1
    # Padding on the left repeats position 0: it is a sequence of its own, and nothing sees it.
    time = positions.shape[1]
    places = torch.arange(time, device=positions.device).expand_as(positions)
    end = torch.where(ends, places, time).flip(1).cummin(dim=1).values.flip(1)
    return positions.gather(1, end) + 1


def dynamic_frequencies(lengths: Tensor, rope: Rope) -> Tensor:
    """Return the frequencies `[batch, time, head_dim / 2]` for sequences of these lengths `[batch, time]`.

    Up to the model's context they are the unscaled ones.
    """
    scaling, size = rope.scaling, rope.rotary_dim
    assert scaling is not None
    longest = lengths.clamp(min=rope.context).to(torch.float32)
    growth = scaling.factor * longest / rope.context - (scaling.factor - 1)
    theta = rope.theta * growth ** (size / (size - 2))
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=lengths.device) / size
    return _padded(1.0 / theta.unsqueeze(-1) ** exponents, rope)


def _llama3(frequencies: Tensor, scaling: RopeScaling, context: int) -> Tensor:
    """Blend by wavelength, as Llama 3.1 does."""
    original = scaling.original_max_position_embeddings or context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / scaling.factor, frequencies)
    between = (wavelengths <= original / low) & (wavelengths >= original / high)
    return torch.where(between, blended, scaled)


def _yarn(frequencies: Tensor, rope: Rope, scaling: RopeScaling) -> Tensor:
    """Interpolate low frequencies and keep high ones, with a linear ramp between (arXiv 2309.00071, 3.2)."""
    original = scaling.original_max_position_embeddings or rope.context
    size = rope.rotary_dim

    def dimension(rotations: float) -> float:
        return size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    # Equal bounds would divide by 0.
    high = high + 0.001 if low == high else high
    ramp = (torch.arange(size // 2, dtype=torch.float32, device=frequencies.device) - low) / (high - low)
    kept = 1 - ramp.clamp(0, 1)
    return frequencies / scaling.factor * (1 - kept) + frequencies * kept


def attention_factor(scaling: RopeScaling | None) -> float:
    """Return the factor on the rotated queries and keys: 1 but for YaRN."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def mscale(multiplier: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * multiplier * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)
