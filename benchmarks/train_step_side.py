"""One side of benchmarks/train_step.py and families.py: a process that makes training steps on command.

It reads one JSON object a line (`{"do": "step"}`, `"loss"`, `"memory"`, `"quit"`) and answers with one. It
runs in the environment of its side: `ours` needs koine, `transformers` and `litgpt` need only themselves.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-3, 0.1, 1.0
Step = Callable[[], float]


def batch(options: argparse.Namespace, vocabulary: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(10, vocabulary, (options.batch, options.length + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def ours(options: argparse.Namespace) -> tuple[Step, Step]:
    """Make steps of our model, loss and optimiser, as our training loop calls them."""
    from koine.data.batch import Batch
    from koine.model import load_causal_lm
    from koine.train import LanguageModelling, TrainSettings
    from koine.train.model_adapters import compile_blocks, prepare_model
    from koine.train.optimiser import Optimiser

    model: Any = load_causal_lm(Path(options.weights), dtype=torch.float32)
    prepare_model(model, gradient_checkpointing=False)
    settings = TrainSettings(
        learning_rate=LEARNING_RATE,
        dtype=options.dtype,
        weight_decay=WEIGHT_DECAY,
        clip_norm=CLIP,
        compile="on" if options.compile else "off",
    )
    optimiser = Optimiser(model, settings, dtype=getattr(torch, options.dtype))
    compile_blocks(model, settings)
    tokens, targets = batch(options, model.vocab_size)
    data = Batch(tokens, targets, None, list)

    def loss() -> float:
        with torch.no_grad():
            return float(LanguageModelling()(model, data)[0]) / targets.numel()

    def step() -> float:
        total, measured = LanguageModelling()(model, data)
        total.backward()  # type: ignore[no-untyped-call]
        optimiser.accumulate_gradients()
        optimiser.scale_and_clip(1.0 / measured["units"], CLIP)
        optimiser.step(LEARNING_RATE)
        return float(total.detach()) / measured["units"]

    return loss, step


def peer_step(
    model: Any, logits_of: Callable[[Any, Tensor], Tensor], options: argparse.Namespace, vocabulary: int
) -> tuple[Step, Step]:
    """Make a plain training step: autocast, float32 weights, torch's cross-entropy, fused AdamW, clipping."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
        fused=True,
    )
    tokens, targets = batch(options, vocabulary)

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"):
            logits = logits_of(model, tokens)
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    if options.compile:
        forward = torch.compile(forward)

    def loss() -> float:
        with torch.no_grad():
            return float(forward())

    def step() -> float:
        value = forward()
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return float(value.detach())

    return loss, step


def transformers_side(options: argparse.Namespace) -> tuple[Step, Step]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        options.weights,
        dtype=torch.float32,
        attn_implementation=options.attention,
        local_files_only=True,
        trust_remote_code=False,
    ).train()
    return peer_step(
        model, lambda m, tokens: m(tokens, use_cache=False).logits, options, model.config.vocab_size
    )


def litgpt_side(options: argparse.Namespace) -> tuple[Step, Step]:
    """Make steps of a Llama with the same layers, heads and hidden size.

    Its feed-forward is widened to the same number of parameters.
    """
    from litgpt import GPT, Config

    about = json.loads((Path(options.weights) / "config.json").read_text())
    rope = about.get("rope_parameters") or about
    sizes: dict[str, Any] = {
        "block_size": options.length,
        "rope_base": int(rope["rope_theta"]),
        "vocab_size": about["vocab_size"],
        "padded_vocab_size": about["vocab_size"],
        "n_layer": about["num_hidden_layers"],
        "n_head": about["num_attention_heads"],
        "n_query_groups": about["num_key_value_heads"],
        "n_embd": about["hidden_size"],
        "intermediate_size": about["intermediate_size"],
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
        "norm_class_name": "RMSNorm",
        "mlp_class_name": "LLaMAMLP",
    }
    model = GPT(Config(**sizes)).train()
    # litgpt's class has its own head: at 49,152 ids it would be a fifth of what the optimiser updates.
    if options.tie:
        model.lm_head.weight = model.transformer.wte.weight
        torch.nn.init.normal_(model.lm_head.weight, std=0.02)
    return peer_step(model, lambda m, tokens: m(tokens), options, about["vocab_size"])


def keep_freed_memory() -> None:
    """Make the allocator setting of our training for a peer too (see koine.allocator)."""
    import ctypes

    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0)
    libc.mallopt(-1, -1)


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=["ours", "transformers", "litgpt"])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--keep-freed-memory", action="store_true")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--tie", action="store_true", help="tie litgpt's head to its embedding")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.keep_freed_memory:
        keep_freed_memory()
    loss, step = {"ours": ours, "transformers": transformers_side, "litgpt": litgpt_side}[options.side](
        options
    )
    before = peak_memory()
    answer = sys.stdout
    sys.stdout = sys.stderr
    print(json.dumps({"ready": True}), file=answer, flush=True)
    for line in sys.stdin:
        do = json.loads(line)["do"]
        if do == "quit":
            return
        start = time.perf_counter()
        value = {"loss": loss, "step": step}[do]() if do != "memory" else float(peak_memory())
        result = {"value": value, "seconds": time.perf_counter() - start, "baseline": before}
        print(json.dumps(result), file=answer, flush=True)


if __name__ == "__main__":
    main()
