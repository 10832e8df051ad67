"""Our experts beside a dense feed-forward of equal operations, a loop, and transformers' experts.

    python benchmarks/moe.py --out benchmarks/results/moe.json
    python benchmarks/moe.py --models --out benchmarks/results/moe_models.json

Eight experts, two a token, SwiGLU, each half as wide as twice the hidden size: forward, and forward with
backward, in float32 and bfloat16. All sides run in one process on the same weights and expert assignments.
They take turns, in another order each round. Each round is between two matmuls of the experts' shape, and
rounds with a slow one (the machine was busy) are dropped. `ratio` is the best peer's time over ours,
`over_dense` ours over that of the dense feed-forward (the ideal). A side that would take longer than
`--most-seconds` a call is left out, and the result says so. The last line printed is one line of JSON.

transformers' further implementations (deepgemm, sonicmoe) need packages for accelerators and are left out.
--device cuda measures the same there.

--models measures whole models instead: tokens per second of BTX, BAM (both kinds) and Nexus beside the dense
seed, in prefill, training and decode.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from koine.allocator import keep_freed_memory
from koine.files import write_json
from koine.generate import generate
from koine.generate.token_sampling import Sampling
from koine.hardware import processor_name
from koine.model import Decoder, ModelConfig, preset
from koine.model.config import MixtureConfig
from koine.model.counting import count_parameters
from koine.model.moe.experts import Chosen, choose, feed_forward_experts
from koine.train.loss import chunked_cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parent))
from train_step import matmul_rate

EXPERTS, CHOSEN = 8, 2
HIDDEN = (256, 1024)
TOKENS = (64, 512, 4096)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
THEIRS = ("eager", "grouped_mm", "batched_mm")

Function = Callable[[Tensor], Tensor]


def loop(x: Tensor, into: Tensor, out: Tensor, chosen: Chosen) -> Tensor:
    """Run one expert after the other, with masks."""
    said = torch.zeros_like(x)
    for expert in range(into.shape[0]):
        rows, place = torch.where(chosen.experts == expert)
        gate, up = F.linear(x[rows], into[expert]).chunk(2, dim=-1)
        part = F.linear(F.silu(gate) * up, out[expert]) * chosen.gates[rows, place, None]
        said = said.index_add(0, rows, part)
    return said


def sides(
    hidden: int, tokens: int, dtype: torch.dtype, device: str
) -> dict[str, tuple[Function, list[Tensor]]]:
    """Return each side as a function of the tokens, and its weights."""
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    width = hidden
    into = (torch.randn(EXPERTS, 2 * width, hidden) / hidden**0.5).to(device, dtype)
    out = (torch.randn(EXPERTS, hidden, width) / width**0.5).to(device, dtype)
    found = choose(torch.randn(tokens, EXPERTS).softmax(-1).to(device), CHOSEN)
    chosen = Chosen(found.experts, found.gates.to(dtype))
    wide_in = (torch.randn(2 * CHOSEN * width, hidden) / hidden**0.5).to(device, dtype).requires_grad_()
    wide_out = (torch.randn(hidden, CHOSEN * width) / width**0.5).to(device, dtype).requires_grad_()
    ours = [into.clone().requires_grad_(), out.clone().requires_grad_()]
    looped = [into.clone().requires_grad_(), out.clone().requires_grad_()]

    def dense(x: Tensor) -> Tensor:
        gate, up = F.linear(x, wide_in).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, wide_out)

    made: dict[str, tuple[Function, list[Tensor]]] = {
        "ours": (lambda x: feed_forward_experts(x, ours[0], ours[1], chosen), ours),
        "dense": (dense, [wide_in, wide_out]),
        "loop": (lambda x: loop(x, looped[0], looped[1], chosen), looped),
    }
    for implementation in THEIRS:
        config = MixtralConfig(
            hidden_size=hidden, intermediate_size=width, num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN
        )
        config._experts_implementation = implementation
        module = MixtralExperts(config).to(device, dtype)
        with torch.no_grad():
            module.gate_up_proj.copy_(into)
            module.down_proj.copy_(out)
        made[f"transformers {implementation}"] = (
            lambda x, module=module: module(x, chosen.experts, chosen.gates),  # type: ignore[misc]
            list(module.parameters()),
        )
    return made


def wait(x: Tensor) -> None:
    """Wait until the accelerator has finished."""
    if x.device.type == "cuda":
        torch.cuda.synchronize()


def seconds(function: Function, x: Tensor, weights: list[Tensor], grad: Tensor | None, repeats: int) -> float:
    """Measure one call, forward or forward and backward: the mean of a few."""
    start = time.perf_counter()
    for _ in range(repeats):
        if grad is None:
            with torch.no_grad():
                function(x)
        else:
            torch.autograd.grad(function(x), [x, *weights], grad)
    wait(x)
    return (time.perf_counter() - start) / repeats


def compare(
    hidden: int, tokens: int, name: str, training: bool, options: argparse.Namespace
) -> dict[str, Any]:
    """Measure all sides in turns."""
    dtype = DTYPES[name]
    device = options.device
    x = torch.randn(tokens, hidden).to(device, dtype).requires_grad_()
    grad = torch.randn(tokens, hidden).to(device, dtype) if training else None
    made = sides(hidden, tokens, dtype, device)
    with torch.no_grad():
        wanted = made["loop"][0](x).float()
        for side, (function, _) in made.items():
            # transformers' batched matmul copies the weights for every assignment: compared at few tokens
            # only.
            if side != "dense" and (side != "transformers batched_mm" or tokens <= 64):
                worst = float((function(x).float() - wanted).abs().max() / wanted.abs().max())
                assert worst < (1e-5 if dtype == torch.float32 else 3e-2), f"{side} differs by {worst}"
    left_out, repeats = {}, {}
    for side, (function, weights) in list(made.items()):
        if side == "transformers batched_mm":
            # It copies the weights for every assignment, and their gradients too.
            needed = tokens * CHOSEN * 3 * hidden * hidden * dtype.itemsize * (3 if training else 1)
            if needed > options.most_gigabytes * 1e9:
                left_out[side] = f"a call takes {needed / 1e9:.0f} GB"
                del made[side]
                continue
        seconds(function, x, weights, grad, 1)
        one = seconds(function, x, weights, grad, 1)
        if one > options.most_seconds and side not in ("ours", "dense"):
            left_out[side] = f"a call takes {one:.1f} s"
            del made[side]
        repeats[side] = max(1, min(200, round(0.02 / one)))
    shape = (CHOSEN * tokens // EXPERTS, hidden, 2 * hidden)
    samples: dict[str, list[float]] = {side: [] for side in made}
    ceilings: list[float] = []
    before = matmul_rate(shape, dtype, device=device)
    order = random.Random(0)
    for _ in range(options.rounds):
        # A random order each time, because the caches hold the data of the side before.
        for side in order.sample([*made], len(made)):
            function, weights = made[side]
            samples[side].append(seconds(function, x, weights, grad, repeats[side]))
        after = matmul_rate(shape, dtype, device=device)
        ceilings.append(min(before, after))
        before = after
    best = statistics.median(ceilings)
    kept = [index for index, rate in enumerate(ceilings) if rate >= 0.8 * best]
    medians = {side: statistics.median(samples[side][index] for index in kept) for side in made}
    theirs = {side: value for side, value in medians.items() if side.startswith("transformers")}
    if not theirs:
        sys.exit(
            f"every implementation of transformers was left out ({left_out}); give a larger --most-seconds"
        )
    peer = min(theirs, key=lambda side: theirs[side])

    def ratio(over: str, under: str) -> dict[str, Any]:
        found = sorted(samples[over][index] / samples[under][index] for index in kept)
        return {"median": statistics.median(found), "spread": [found[0], found[-1]]}

    operations = 2 * tokens * CHOSEN * 3 * hidden * hidden * (3 if training else 1)
    return {
        "hidden": hidden,
        "tokens": tokens,
        "dtype": name,
        "training": training,
        "seconds": medians,
        "rounds": len(kept),
        "best_of_transformers": peer,
        "ratio": ratio(peer, "ours"),
        "over_dense": ratio("ours", "dense"),
        "share_of_ceiling": operations / medians["ours"] / max(ceilings),
        "left_out": left_out,
    }


def models(options: argparse.Namespace) -> dict[str, Any]:
    """Measure tokens per second of each kind of mixture beside its dense seed."""
    base = preset("koine-4m")
    names = ("seed", "code", "law", "maths")
    kinds: dict[str, ModelConfig] = {
        "dense": base,
        "btx": replace(base, mixture=MixtureConfig(experts=names)),
        "bam shared-kv": replace(base, mixture=MixtureConfig(experts=names, attention="shared-kv")),
        "bam kv-experts": replace(base, mixture=MixtureConfig(experts=names, attention="kv-experts")),
        "nexus": replace(base, mixture=MixtureConfig(experts=names[1:], shared_expert=True, domain_size=64)),
    }
    torch.manual_seed(0)
    made = {name: Decoder(config).to(options.device) for name, config in kinds.items()}
    tokens = torch.randint(8, base.vocab_size, (4, 512)).to(options.device)

    def training(model: Decoder) -> int:
        model.train()
        hidden = model(tokens)
        chunked_cross_entropy(hidden, model.output_weight, tokens, scale=model.logit_scale).backward()  # type: ignore[no-untyped-call]
        model.zero_grad()
        return tokens.numel()

    def context(model: Decoder) -> int:
        with torch.inference_mode():
            model.eval()(tokens)
        return tokens.numel()

    def latency(model: Decoder) -> int:
        # As in arXiv 2408.08274: a prompt of 256 tokens, then 16 more.
        generate(model.eval(), [tokens[0, :256].tolist()], Sampling(max_new_tokens=16, temperature=0.0))
        return 272

    result: dict[str, Any] = {
        "parameters": {
            name: {"total": count_parameters(config).total, "active": count_parameters(config).active}
            for name, config in kinds.items()
        }
    }
    for kind, function in (("training", training), ("reading", context), ("latency", latency)):
        for model in made.values():
            function(model)
        rounds: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(options.rounds):
            for name, model in made.items():
                start = time.perf_counter()
                count = function(model)
                wait(tokens)
                rounds[name].append((time.perf_counter() - start) / count)
        result[kind] = {
            name: {
                "tokens_per_second": 1 / statistics.median(values),
                "seconds_over_dense": statistics.median(
                    a / b for a, b in zip(values, rounds["dense"], strict=True)
                ),
                "spread": sorted(a / b for a, b in zip(values, rounds["dense"], strict=True))[
                    :: max(1, options.rounds - 1)
                ],
            }
            for name, values in rounds.items()
        }
        print(kind, json.dumps(result[kind]), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, nargs="+", default=list(HIDDEN))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--most-seconds", type=float, default=1.0, help="longest call to wait for")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--most-gigabytes", type=float, default=4.0, help="largest memory of a call that is tried"
    )
    parser.add_argument("--models", action="store_true")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    result: dict[str, Any] = {
        "name": "moe_models" if options.models else "moe",
        "experts": EXPERTS,
        "chosen": CHOSEN,
        "machine": {
            "processor": processor_name() if options.device == "cpu" else torch.cuda.get_device_name(),
            "threads": options.threads,
            "python": platform.python_version(),
        },
        "torch": torch.__version__,
    }
    if options.models:
        result |= models(options)
    else:
        import transformers

        result |= {"transformers": transformers.__version__, "results": []}
        for hidden in options.hidden:
            for tokens in options.tokens:
                for dtype in options.dtypes:
                    for training in (False, True):
                        row = compare(hidden, tokens, dtype, training, options)
                        result["results"].append(row)
                        print(json.dumps(row), flush=True)
    if options.out:
        write_json(options.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
