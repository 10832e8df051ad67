"""AdamW on float32 master weights, with working copies in the dtype of the computation.

Autocast would cast every weight in every forward pass, again for every micro batch. Here a weight is cast once a step, after
the optimiser's update, and gradients are summed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from koine.model.language_model import LanguageModel
from koine.train.decay import decayed_parameters
from koine.train.settings import TrainSettings


class Optimiser:
    """The weights that are trained, their moments, and the copies that the model computes with.

    `masters` are float32 and named as the model's parameters are; where the model computes in float32 (or FSDP casts for itself)
    they are the model's own parameters.
    """

    def __init__(self, model: LanguageModel, settings: TrainSettings, *, dtype: torch.dtype) -> None:
        self.working = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self.working.items():
            if parameter.dtype == dtype == torch.float32:
                self.masters[name] = parameter
            else:
                self.masters[name] = parameter.detach().to(torch.float32, copy=True)
                parameter.data = parameter.data.to(dtype)
        decayed = decayed_parameters(model)
        matrices = [tensor for name, tensor in self.masters.items() if name in decayed]
        others = [tensor for name, tensor in self.masters.items() if name not in decayed]
        self.adamw = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": settings.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            fused=True,
        )

    @torch.no_grad()
    def collect(self) -> None:
        """Add the gradients of one micro batch to the masters' and drop them."""
        for name, parameter in self.working.items():
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
        """Multiply the gradients by `factor`, then clip them to `clip_norm` (0: not); the norm before clipping."""
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        full = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        total = float(full) * factor
        # One pass over the gradients does both.
        coefficient = factor * min(1.0, clip_norm / (total + 1e-6)) if clip_norm else factor
        if coefficient == coefficient:
            torch._foreach_mul_(gradients, coefficient)
        return total

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the masters, refresh the working copies, drop the gradients."""
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters to the model."""
        for name, parameter in self.working.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def restore_float32(self) -> None:
        """Give the model its master weights back, in float32."""
        for name, parameter in self.working.items():
            if self.masters[name] is not parameter:
                parameter.data = self.masters[name]

    def tensors(self, steps: int) -> dict[str, Tensor]:
        """All state as named tensors, for a checkpoint to read or to fill in place; moments are made where there are none."""
        state: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            moments = self.adamw.state[master]
            if not moments:
                moments["exp_avg"] = torch.zeros_like(master, requires_grad=False)
                moments["exp_avg_sq"] = torch.zeros_like(master, requires_grad=False)
            moments["step"] = torch.tensor(float(steps), device=master.device)
            state[f"weights.{name}"] = master.detach()
            state[f"exp_avg.{name}"] = moments["exp_avg"]
            state[f"exp_avg_sq.{name}"] = moments["exp_avg_sq"]
        return state
