"""Record TRL's losses and gradients: `.venv-peers/trl/bin/python tests/align/record_trl.py`.

It needs `python benchmarks/peers/install.py trl`, and imports nothing of Koine.

TRL's own trainers compute every loss. In `losses` a module that returns given log-probabilities (or rewards)
stands for the model, so that all is float64, and each gradient is with respect to the sum of a completion's
log-probabilities. In `model` a small Llama with weights from a formula is the model, in float64 as far as TRL's
code allows it: its head computes in float32. The file is `recorded_trl.json`.
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer

RECORDED = Path(__file__).with_name("recorded_trl.json")
PROMPT = 2
"""Tokens of a prompt."""
WORDS = [f"w{i}" for i in range(29)]
PAIRS = [
    {"prompt": "w1 w2 w3", "chosen": " w4 w5 w6 w7", "rejected": " w8 w9"},
    {"prompt": "w10 w11", "chosen": " w12", "rejected": " w13 w14 w15 w16 w17"},
    {"prompt": "w18 w19 w20 w21", "chosen": " w22 w23", "rejected": " w24 w25 w26"},
]
TINY = {
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
COMMON = {"use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": 3}


class Given(nn.Module):
    """Stands for a model: returns given log-probabilities `[n, time - 1]` of the tokens after the first."""

    def __init__(self, log_probs: Tensor) -> None:
        super().__init__()
        self.log_probs = nn.Parameter(log_probs)
        self.other: Tensor | None = None  # what KTO's mismatched completions get

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        """Return what TRL reads of its fused head, and logits over two tokens whose first is the target."""
        log_probs = self.log_probs if input_ids[0, 0] == 0 else self.other
        nothing = torch.zeros_like(log_probs)
        two = torch.stack((log_probs, torch.log1p(-log_probs.exp())), dim=-1)
        return SimpleNamespace(
            log_probs=log_probs,
            entropy=nothing,
            mean_logits=nothing,
            is_top1=nothing.bool(),
            logits=torch.cat((two, two[:, :1]), dim=1),
        )


class GivenRewards(nn.Module):
    """Stands for a reward model: returns given rewards `[n]`."""

    def __init__(self, rewards: Tensor) -> None:
        super().__init__()
        self.rewards = nn.Parameter(rewards)

    def forward(self, **_: Any) -> SimpleNamespace:
        """Return the rewards as logits of one class."""
        return SimpleNamespace(logits=self.rewards[:, None])


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of words."""
    vocabulary = {word: i for i, word in enumerate(["<bos>", "<eos>", "<pad>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>", unk_token="w0"
    )


def fill(model: nn.Module, phase: float) -> nn.Module:
    """Set every weight by a formula that the test repeats; norms stay 1."""
    with torch.no_grad():
        for i, (name, weight) in enumerate(model.named_parameters()):
            if "norm" not in name:
                numbers = torch.arange(weight.numel(), dtype=torch.float64)
                weight.copy_((0.4 * torch.sin(1.7 * numbers + i + phase)).reshape(weight.shape))
    return model


def llama(phase: float) -> LlamaForCausalLM:
    """Return the small model, in float64: TRL's head computes in float32 all the same."""
    return fill(LlamaForCausalLM(LlamaConfig(**TINY)), phase).double()


def sequences(seed: int, lengths: list[int]) -> Tensor:
    """Return log-probabilities `[n, time - 1]`, 0 outside of completions."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = -3 * torch.rand(
        len(lengths), PROMPT + max(lengths) - 1, generator=generator, dtype=torch.float64
    )
    return log_probs * completion_mask(lengths)[:, 1:]


def completion_mask(lengths: list[int]) -> Tensor:
    """Return `[n, time]`, 1 on completion tokens."""
    places = torch.arange(PROMPT + max(lengths))
    return ((places >= PROMPT) & (places < PROMPT + torch.tensor(lengths)[:, None])).long()


def by_sequence(gradient: Tensor, mask: Tensor) -> list[float]:
    """Return the gradient with respect to each sum; it must be equal on all tokens of a completion."""
    found = []
    for one, where in zip(gradient, mask[:, 1:].bool(), strict=True):
        assert torch.allclose(one[where], one[where][:1])
        found.append(float(one[where][0]))
    return found


def dpo_trainer(folder: str, **settings: Any) -> DPOTrainer:
    """Return a trainer with another reference than the model."""
    return DPOTrainer(
        llama(0.0),
        llama(0.5),
        args=DPOConfig(folder, **COMMON, **settings),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer(),
    )


def record_dpo(folder: str) -> list[dict[str, Any]]:
    """Record DPOTrainer's losses."""
    cases = [
        ("dpo:beta=0.1", {"loss_type": ["sigmoid"], "beta": 0.1}, 3),
        ("dpo:beta=0.7", {"loss_type": ["sigmoid"], "beta": 0.7}, 3),
        ("hinge:beta=0.4", {"loss_type": ["hinge"], "beta": 0.4}, 3),
        ("ipo-mean:beta=0.3", {"loss_type": ["ipo"], "beta": 0.3}, 3),
        (
            "robust:beta=0.3,label_smoothing=0.2",
            {"loss_type": ["robust"], "beta": 0.3, "label_smoothing": 0.2},
            3,
        ),
        # `sigmoid` reads no label smoothing. `aot` is it, smoothed, where a batch is one pair.
        ("dpo:beta=0.3,label_smoothing=0.2", {"loss_type": ["aot"], "beta": 0.3, "label_smoothing": 0.2}, 1),
        # TRL divides by the tokens of the batch.
        ("nll-mean", {"loss_type": ["sft"]}, 1),
        (
            "dpo:beta=0.2+nll-mean:weight=0.3",
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3], "beta": 0.2},
            1,
        ),
    ]
    found = []
    for seed, (spec, settings, pairs) in enumerate(cases):
        trainer = dpo_trainer(folder, **settings)
        trainer.precompute_ref_logps = True
        lengths = [3, 1, 4, 2, 5, 2][: 2 * pairs]
        policy, reference = sequences(seed, lengths), sequences(seed + 100, lengths).sum(1)
        mask = completion_mask(lengths)
        model = Given(policy)
        loss = trainer._compute_loss(
            model,
            {
                "input_ids": torch.zeros_like(mask),
                "attention_mask": torch.ones_like(mask),
                "completion_mask": mask,
                "ref_chosen_logps": reference[:pairs],
                "ref_rejected_logps": reference[pairs:],
            },
            False,
        )
        loss.backward()
        found.append(
            {
                "trainer": "DPOTrainer",
                "settings": settings,
                "loss_spec": spec,
                "lengths": lengths,
                "policy": policy.sum(1).tolist(),
                "reference": reference.tolist(),
                "loss": float(loss),
                "gradient": by_sequence(model.log_probs.grad, mask),
            }
        )
    return found


def record_cpo(folder: str) -> list[dict[str, Any]]:
    """Record CPOTrainer's SimPO."""
    found = []
    for seed, (beta, gamma) in enumerate([(0.1, 0.5), (2.0, 1.5)]):
        settings = {"loss_type": "simpo", "beta": beta, "simpo_gamma": gamma, "cpo_alpha": 0.0}
        trainer = CPOTrainer(
            llama(0.0),
            args=CPOConfig(folder, **COMMON, **settings),
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=tokenizer(),
        )
        lengths = [3, 1, 4, 2, 5, 2]
        policy, mask = sequences(seed + 20, lengths), completion_mask(lengths)
        labels = torch.where(mask.bool(), 0, -100)
        model = Given(policy)
        batch = {
            f"{side}_{name}": value[rows]
            for side, rows in (("chosen", slice(0, 3)), ("rejected", slice(3, 6)))
            for name, value in (
                ("input_ids", torch.zeros_like(mask)),
                ("attention_mask", torch.ones_like(mask)),
                ("labels", labels),
            )
        }
        loss, _ = trainer.get_batch_loss_metrics(model, batch)
        loss.backward()
        found.append(
            {
                "trainer": "CPOTrainer",
                "settings": settings,
                "loss_spec": f"simpo:beta={beta},gamma={gamma}",
                "lengths": lengths,
                "policy": policy.sum(1).tolist(),
                "loss": float(loss),
                "gradient": by_sequence(model.log_probs.grad, mask),
            }
        )
    return found


def record_kto(folder: str) -> list[dict[str, Any]]:
    """Record KTOTrainer's loss, with a positive KL and with one that is clamped to 0."""
    found = []
    examples = [
        {"prompt": p["prompt"], "completion": p["chosen"], "label": i > 0} for i, p in enumerate(PAIRS)
    ]
    for seed, shift in ((40, 2.0), (41, -2.0)):
        settings = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}
        trainer = KTOTrainer(
            llama(0.0),
            llama(0.5),
            args=KTOConfig(folder, **COMMON, **settings),
            train_dataset=Dataset.from_list(examples),
            processing_class=tokenizer(),
        )
        trainer.precompute_ref_logps = True
        lengths, labels = [3, 1, 4, 2, 5], torch.tensor([True, False, False, True, True])
        policy, reference = sequences(seed, lengths), sequences(seed + 100, lengths).sum(1)
        mismatched = sequences(seed + 200, lengths)
        moves = -sequences(seed + 300, [1] * 5).sum(1) / 3  # between 0 and 1
        mismatched_reference = mismatched.sum(1) - shift * moves
        mask = completion_mask(lengths)
        model = Given(policy)
        model.other = mismatched
        loss = trainer._compute_loss(
            model,
            {
                "input_ids": torch.zeros_like(mask),
                "attention_mask": torch.ones_like(mask),
                "completion_mask": mask,
                "KL_input_ids": torch.ones_like(mask),
                "KL_attention_mask": torch.ones_like(mask),
                "KL_completion_mask": mask,
                "label": labels,
                "ref_logps": reference,
                "ref_KL_logps": mismatched_reference,
            },
            False,
        )
        loss.backward()
        found.append(
            {
                "trainer": "KTOTrainer",
                "settings": settings,
                "loss_spec": "kto:beta=0.3,desirable_weight=1.2,undesirable_weight=0.7",
                "lengths": lengths,
                "labels": labels.tolist(),
                "policy": policy.sum(1).tolist(),
                "reference": reference.tolist(),
                "mismatched": mismatched.sum(1).tolist(),
                "mismatched_reference": mismatched_reference.tolist(),
                "loss": float(loss),
                "gradient": by_sequence(model.log_probs.grad, mask),
            }
        )
    return found


def record_reward(folder: str) -> list[dict[str, Any]]:
    """Record RewardTrainer's loss: plain, with margins, and centred."""
    found = []
    for seed, (with_margin, centring) in enumerate([(False, None), (True, None), (True, 0.02)]):
        model = fill(LlamaForSequenceClassification(LlamaConfig(**TINY, num_labels=1)), 0.0)
        trainer = RewardTrainer(
            model,
            args=RewardConfig(folder, **COMMON, center_rewards_coefficient=centring),
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=tokenizer(),
        )
        generator = torch.Generator().manual_seed(seed)
        rewards = GivenRewards(2 * torch.randn(8, generator=generator, dtype=torch.float64))
        margin = torch.rand(4, generator=generator, dtype=torch.float64) if with_margin else None
        inputs = {"attention_mask": torch.ones(8, 3), **({} if margin is None else {"margin": margin})}
        loss = trainer.compute_loss(rewards, inputs)
        loss.backward()
        found.append(
            {
                "trainer": "RewardTrainer",
                "settings": {"center_rewards_coefficient": centring},
                "margin": None if margin is None else margin.tolist(),
                "rewards": rewards.rewards.tolist(),
                "loss": float(loss),
                "gradient": rewards.rewards.grad.tolist(),
            }
        )
    return found


def record_rloo(folder: str) -> list[dict[str, Any]]:
    """Record RLOOTrainer's loss on the rollouts of its own first step, at the old policy and beside it."""
    rewards: list[float] = []

    def reward(completions: list[str], **_: Any) -> list[float]:
        values = [0.3 * len(text) - 0.1 * (ord(text[-1]) % 7) for text in completions]
        rewards.extend(values)
        return values

    settings = {"beta": 0.3, "epsilon": 0.2, "num_generations": 4, "max_completion_length": 6}
    llama(0.0).float().save_pretrained(folder)
    trainer = RLOOTrainer(
        folder,
        reward,
        args=RLOOConfig(folder, **{**COMMON, "per_device_train_batch_size": 8}, **settings, max_steps=1),
        train_dataset=Dataset.from_list([{"prompt": pair["prompt"]} for pair in PAIRS]),
        processing_class=tokenizer(),
    )
    # The reference is made from the model: move it away, or the KL penalty would be 0.
    fill(trainer.ref_model, 0.5)
    seen: dict[str, Any] = {}
    log_probabilities, rollouts = (
        trainer._get_per_token_logps_and_entropies,
        trainer._generate_and_score_completions,
    )

    def seen_log_probabilities(model: Any, *args: Any, **kwargs: Any) -> Any:
        result = log_probabilities(model, *args, **kwargs)
        if model is trainer.ref_model:
            seen["reference"] = result[0].detach()
        return result

    def seen_rollouts(inputs: Any) -> Any:
        seen["inputs"] = rollouts(inputs)  # before the trainer shuffles them
        return seen["inputs"]

    trainer._get_per_token_logps_and_entropies = seen_log_probabilities
    trainer._generate_and_score_completions = seen_rollouts
    trainer.train()
    trainer._get_per_token_logps_and_entropies = log_probabilities
    inputs = seen["inputs"]
    mask = inputs["completion_mask"]
    lengths = mask.sum(1).tolist()
    reference = (seen["reference"] * mask).sum(1)
    found = []
    for scale in (0.0, 0.15):
        generator = torch.Generator().manual_seed(7)
        moves = scale * torch.randn(8, mask.shape[1], generator=generator, dtype=torch.float64)
        # Log-probabilities of the prompts' tokens are not read.
        share = inputs["old_logps"].double()[:, None] / mask.sum(1, keepdim=True)
        policy = (share + moves) * mask
        prompt = torch.zeros(8, inputs["prompt_ids"].shape[1] - 1, dtype=torch.float64)
        model = Given(torch.cat((prompt, policy), dim=1))
        given = {**inputs, "prompt_ids": torch.zeros_like(inputs["prompt_ids"])}
        loss = trainer._compute_loss(model, given)
        loss.backward()
        gradient = model.log_probs.grad[:, prompt.shape[1] :]
        found.append(
            {
                "trainer": "RLOOTrainer",
                "settings": settings,
                "loss_spec": "rloo:beta=0.3,clip=0.2",
                "completions": 4,
                "lengths": lengths,
                "scores": rewards[:8],
                "policy": policy.sum(1).tolist(),
                "reference": reference.tolist(),
                "behaviour": inputs["old_logps"].tolist(),
                "loss": float(loss),
                "gradient": by_sequence(gradient, torch.cat((torch.zeros(8, 1), mask), dim=1)),
            }
        )
    return found


def record_model(folder: str) -> list[dict[str, Any]]:
    """Record losses of a whole model and the gradient of every weight."""
    found = []
    for spec, settings in (
        ("dpo:beta=0.3", {"loss_type": ["sigmoid"], "beta": 0.3}),
        ("ipo-mean:beta=0.3", {"loss_type": ["ipo"], "beta": 0.3}),
        ("hinge:beta=0.3", {"loss_type": ["hinge"], "beta": 0.3}),
    ):
        trainer = dpo_trainer(folder, **settings)
        [batch] = list(trainer.get_train_dataloader())
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        gradients = {
            name: [float(f"{number:.9g}") for number in weight.grad.flatten().tolist()]
            for name, weight in trainer.model.named_parameters()
        }
        found.append(
            {
                "trainer": "DPOTrainer",
                "settings": settings,
                "loss_spec": spec,
                "tokens": batch["input_ids"].tolist(),
                "completion_mask": batch["completion_mask"].tolist(),
                "loss": float(loss),
                "gradients": gradients,
            }
        )
    return found


def main() -> None:
    """Write the file."""
    with tempfile.TemporaryDirectory() as folder:
        recorded = {
            "versions": {name: version(name) for name in ("trl", "transformers", "torch")},
            "model": record_model(folder),
            "losses": [
                *record_dpo(folder),
                *record_cpo(folder),
                *record_kto(folder),
                *record_rloo(folder),
            ],
            "rewards": record_reward(folder),
        }
    RECORDED.write_text(_one_line_a_case(recorded))


def _one_line_a_case(recorded: dict[str, Any]) -> str:
    lists = dict(recorded)
    lines = [f'{{"versions": {json.dumps(lists.pop("versions"))}', f'"config": {json.dumps(TINY)}']
    for name, cases in lists.items():
        lines.append(f'"{name}": [\n' + ",\n".join(json.dumps(case) for case in cases) + "]")
    return ",\n".join(lines) + "}\n"


if __name__ == "__main__":
    main()
