"""AdamW or Muon on float32 master weights, with copies of them in the dtype of the computation.

Autocast would cast every weight in every forward pass, again for every micro-batch. Here a weight is cast
once a step, after the optimiser's update, and gradients are summed in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from koine.model.language_model import LanguageModel
from koine.train.decay import block_matrices, decayed_parameters
from koine.train.settings import TrainSettings

MUON_MOMENTUM = 0.95
# State of a tensor in `torch.optim`; AdamW counts steps too.
_ADAMW_STATE = ("exp_avg", "exp_avg_sq")
_MUON_STATE = ("momentum_buffer",)


class Optimiser:
    """AdamW, or Muon with AdamW for what is no matrix of a block, with master weights.

    Muon (Keller Jordan et al., 2024) replaces the momentum of a matrix by the nearest orthogonal matrix. Its
    updates are scaled to the size of AdamW's (arXiv 2502.16982, equation 4), so that one learning rate and one
    weight decay serve both.

    `masters` are float32, by the names of the model's parameters. Where the model computes in float32, or
    FSDP casts, they are the model's own parameters. Weights without gradients, as under a LoRA adapter, are
    cast once and have no masters. Muon treats A and B of an adapter as two matrices.
    """

    def __init__(self, model: LanguageModel, settings: TrainSettings, *, dtype: torch.dtype) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters: dict[str, Tensor] = {}
        for parameter in model.parameters():
            # The base of an adapter: it is only computed with.
            if not parameter.requires_grad and parameter.is_floating_point() and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
        for name, parameter in self.parameters.items():
            if parameter.dtype == dtype == torch.float32:
                self.masters[name] = parameter
            else:
                self.masters[name] = parameter.detach().to(torch.float32, copy=True)
                parameter.data = parameter.data.to(dtype)
        orthogonal = block_matrices(model) if settings.optimiser == "muon" else set()
        decayed = decayed_parameters(model) - orthogonal
        others = self.masters.keys() - decayed - orthogonal
        # Two groups also where both have the same weight decay: 0.
        groups = [
            ([tensor for name, tensor in self.masters.items() if name in decayed], settings.weight_decay),
            ([tensor for name, tensor in self.masters.items() if name in others], 0.0),
        ]
        self.adamw = torch.optim.AdamW(
            # Muon may have taken all of an adapter: torch then wants one group that is empty.
            [{"params": tensors, "weight_decay": decay} for tensors, decay in groups if tensors]
            or [{"params": []}],
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            fused=True,
        )
        self.optimisers: list[torch.optim.Optimizer] = [self.adamw]
        self.muon: torch.optim.Muon | None = None
        if orthogonal:
            self.muon = torch.optim.Muon(
                [tensor for name, tensor in self.masters.items() if name in orthogonal],
                lr=settings.learning_rate,
                weight_decay=settings.weight_decay,
                momentum=MUON_MOMENTUM,
                adjust_lr_fn="match_rms_adamw",
            )
            self.optimisers.append(self.muon)
        self.orthogonal = orthogonal

    @torch.no_grad()
    def accumulate_gradients(self) -> None:
        """Add the gradients of one micro-batch to those of the masters, and free them."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.to(torch.float32)
            else:
                master.grad += parameter.grad
            parameter.grad = None

    @torch.no_grad()
    def scale_and_clip(self, factor: float, clip_norm: float) -> float:
        """Multiply the gradients by `factor` and clip them (0: not); return the norm before clipping."""
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        unscaled = torch.nn.utils.get_total_norm(gradients)
        # FSDP: a DTensor, whose norm is that of all ranks.
        unscaled = unscaled.full_tensor() if hasattr(unscaled, "full_tensor") else unscaled
        norm = float(unscaled) * factor
        # Scaling and clipping in one pass over the gradients.
        coefficient = factor * min(1.0, clip_norm / (norm + 1e-6)) if clip_norm else factor
        if not math.isnan(coefficient):
            torch._foreach_mul_(gradients, coefficient)
        return norm

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the masters, copy them to the model, free the gradients."""
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.copy_masters_to_model()

    @torch.no_grad()
    def copy_masters_to_model(self) -> None:
        """Copy the masters to the model's parameters."""
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def restore_float32(self) -> None:
        """Make the masters the model's parameters, in float32."""
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.data = self.masters[name]

    def tensors(self, steps: int) -> dict[str, Tensor]:
        """Return all state as named tensors, for a checkpoint to save or to load in place.

        Moments are created where there are none. `steps` is the number of steps done.
        """
        found: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            found[f"weights.{name}"] = master.detach()
            muon = self.muon is not None and name in self.orthogonal
            state = (self.muon if muon and self.muon is not None else self.adamw).state[master]
            keys = _MUON_STATE if muon else _ADAMW_STATE
            for key in keys:
                if key not in state:
                    state[key] = torch.zeros_like(master, requires_grad=False)
                found[f"{key}.{name}"] = state[key]
            if not muon:
                state["step"] = torch.tensor(float(steps), device=master.device)
        return found
