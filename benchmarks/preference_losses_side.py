"""TRL's side of benchmarks/preference_losses.py: losses and gradients of its trainers, in its own environment.

    preference_losses_side.py REQUEST.json

The request names the folders of policy and reference, and holds the tokens of each completion with its prompt.
`answer.json` and `NAME.safetensors`, the gradient of every weight, are written beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

TRAINERS: dict[str, tuple[Any, Any]] = {
    "DPOTrainer": (DPOTrainer, DPOConfig),
    "KTOTrainer": (KTOTrainer, KTOConfig),
    "CPOTrainer": (CPOTrainer, CPOConfig),
}
EXAMPLE = {"prompt": "a", "chosen": "b", "rejected": "c"}
LABELLED = {"prompt": "a", "completion": "b", "label": True}


def padded(rows: list[list[int]]) -> Tensor:
    """Return rows of the same length, 0 on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def trainer_of(case: dict[str, Any], request: dict[str, Any], models: dict[str, Any]) -> Any:
    """Return the trainer of a case."""
    trainer, config = TRAINERS[case["trainer"]]
    kto = trainer is KTOTrainer
    arguments = config(
        request["out"],
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        per_device_train_batch_size=2,
        **case["settings"],
    )
    reference = {} if trainer is CPOTrainer else {"ref_model": models["reference"]}
    return trainer(
        models["policy"],
        **reference,
        args=arguments,
        train_dataset=Dataset.from_list([LABELLED if kto else EXAMPLE] * 2),
        processing_class=models["tokenizer"],
    )


def inputs_of(case: dict[str, Any], request: dict[str, Any]) -> dict[str, Tensor]:
    """Return what the trainer's collator makes; completions come in the order chosen, rejected, chosen, ..."""
    pairs = request["completions"][: 2 * case["pairs"]]
    rows = [*pairs[::2], *pairs[1::2]]
    tokens, mask = padded([row["tokens"] for row in rows]), padded([row["mask"] for row in rows])
    attention = padded([[1] * len(row["tokens"]) for row in rows])
    if case["trainer"] == "CPOTrainer":
        labels = torch.where(mask.bool(), tokens, -100)
        parts = {"input_ids": tokens, "attention_mask": attention, "labels": labels}
        half = len(rows) // 2
        return {
            f"{side}_{name}": value[span]
            for side, span in (("chosen", slice(0, half)), ("rejected", slice(half, None)))
            for name, value in parts.items()
        }
    inputs = {"input_ids": tokens, "attention_mask": attention, "completion_mask": mask}
    if case["trainer"] == "KTOTrainer":
        inputs |= {f"KL_{name}": value for name, value in inputs.items()}
        inputs["label"] = torch.arange(len(rows)) < len(rows) // 2
    return inputs


def main() -> None:
    """Answer the request."""
    place = Path(sys.argv[1])
    request = json.loads(place.read_text())
    request["out"] = str(place.parent / "trainer")
    models: dict[str, Any] = {
        name: AutoModelForCausalLM.from_pretrained(
            request[name], dtype=torch.float64, local_files_only=True, trust_remote_code=False
        )
        for name in ("policy", "reference")
    }
    # `transformers` gives the padding token's input embedding no gradient, also where the token ends an answer.
    models["policy"].get_input_embeddings().padding_idx = None
    models["tokenizer"] = AutoTokenizer.from_pretrained(
        request["policy"], local_files_only=True, trust_remote_code=False
    )
    losses = {}
    for number, case in enumerate(request["cases"]):
        trainer = trainer_of(case, request, models)
        models["policy"].train()
        models["policy"].zero_grad()
        loss = trainer.compute_loss(models["policy"], inputs_of(case, request))
        loss.backward()
        losses[number] = float(loss.detach())
        gradients = {name: p.grad.float() for name, p in models["policy"].named_parameters()}
        save_file(gradients, place.parent / f"{number}.safetensors")
    (place.parent / "answer.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
