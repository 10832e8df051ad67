"""Compare our feed-forward experts with transformers' experts, a loop over experts, and a dense layer.

    python benchmarks/moe.py --out benchmarks/results/moe.json
    python benchmarks/moe.py --threads 1 --cpu-time --tokens 64 4096
    python benchmarks/moe.py --models --out benchmarks/results/moe_models.json

Eight experts, two for each token, SwiGLU, each as wide as the hidden size: forward, and forward with
backward, in float32 and bfloat16. All sides run in one process on the same weights and the same assignments,
in a random order each round. Each round stands between two matmuls of the experts' shape. Rounds in which one
of them is slow are dropped, because the machine was busy. The last line printed is one line of JSON.

`ratio`: time of the best of transformers' implementations over ours. `over_dense`: our time over that of a
dense layer with as many operations (the ideal). A side that takes longer than --most-seconds a call is left
out, and the result says so. transformers' further implementations (deepgemm, sonicmoe) need packages for
accelerators.

--device cuda measures the same there. --cpu-time counts the CPU time of one thread: use it on a machine that
is shared with others. --models measures whole models instead: tokens per second of BTX, BAM (both kinds) and
Nexus beside the dense seed, in training, prefill and generation.
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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from koine.allocator import keep_freed_memory
from koine.files import write_json
from koine.generate import generate
from koine.generate.sampling import Sampling
from koine.hardware import processor_name
from koine.model import Decoder, ModelConfig, preset
from koine.model.config import MixtureConfig
from koine.model.counting import count_parameters
from koine.model.moe.experts import Assignments, assign_top_k, feed_forward_experts
from koine.train.loss import chunked_cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parent))
from train_step import matmul_rate

EXPERTS, TOP_K = 8, 2
HIDDEN = (256, 1024)
TOKENS = (64, 512, 4096)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TRANSFORMERS = ("eager", "grouped_mm", "batched_mm")

Function = Callable[[Tensor], Tensor]


class Side(NamedTuple):
    """A side of the comparison: a function of the tokens, and its weights."""

    function: Function
    weights: list[Tensor]


def loop(x: Tensor, w_in: Tensor, w_out: Tensor, assigned: Assignments) -> Tensor:
    """Compute one expert after the other, with masks."""
    output = torch.zeros_like(x)
    for expert in range(len(w_in)):
        rows, place = torch.where(assigned.experts == expert)
        gate, up = F.linear(x[rows], w_in[expert]).chunk(2, dim=-1)
        expert_out = F.linear(F.silu(gate) * up, w_out[expert]) * assigned.gates[rows, place, None]
        output = output.index_add(0, rows, expert_out)
    return output


def make_sides(hidden: int, tokens: int, dtype: torch.dtype, device: str) -> dict[str, Side]:
    """Build all sides with equal weights; the dense layer has weights of its own."""
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    width = hidden
    w_in = (torch.randn(EXPERTS, 2 * width, hidden) / hidden**0.5).to(device, dtype)
    w_out = (torch.randn(EXPERTS, hidden, width) / width**0.5).to(device, dtype)
    experts, gates = assign_top_k(torch.randn(tokens, EXPERTS).softmax(-1).to(device), TOP_K)
    assigned = Assignments(experts, gates.to(dtype))
    dense_in = (torch.randn(2 * TOP_K * width, hidden) / hidden**0.5).to(device, dtype).requires_grad_()
    dense_out = (torch.randn(hidden, TOP_K * width) / width**0.5).to(device, dtype).requires_grad_()
    ours = [w_in.clone().requires_grad_(), w_out.clone().requires_grad_()]
    looped = [w_in.clone().requires_grad_(), w_out.clone().requires_grad_()]

    def dense(x: Tensor) -> Tensor:
        gate, up = F.linear(x, dense_in).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, dense_out)

    sides = {
        "ours": Side(lambda x: feed_forward_experts(x, ours[0], ours[1], assigned), ours),
        "dense": Side(dense, [dense_in, dense_out]),
        "loop": Side(lambda x: loop(x, looped[0], looped[1], assigned), looped),
    }
    for implementation in TRANSFORMERS:
        config = MixtralConfig(
            hidden_size=hidden, intermediate_size=width, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K
        )
        config._experts_implementation = implementation
        module = MixtralExperts(config).to(device, dtype)
        with torch.no_grad():
            module.gate_up_proj.copy_(w_in)
            module.down_proj.copy_(w_out)
        sides[f"transformers {implementation}"] = Side(
            lambda x, module=module: module(x, assigned.experts, assigned.gates),  # type: ignore[misc]
            list(module.parameters()),
        )
    return sides


def synchronize(x: Tensor) -> None:
    """Wait for the accelerator."""
    if x.device.type == "cuda":
        torch.cuda.synchronize()


def choose_clock(*, cpu_time: bool) -> Callable[[], float]:
    """Return the clock of all measurements, the matmuls between them included."""
    return time.thread_time if cpu_time else time.perf_counter


def seconds(side: Side, x: Tensor, grad: Tensor | None, repeats: int, *, cpu_time: bool) -> float:
    """Return the mean time of a call, forward or (with `grad`) forward and backward."""
    clock = choose_clock(cpu_time=cpu_time)
    start = clock()
    for _ in range(repeats):
        if grad is None:
            with torch.no_grad():
                side.function(x)
        else:
            torch.autograd.grad(side.function(x), [x, *side.weights], grad)
    synchronize(x)
    return (clock() - start) / repeats


def check_agreement(sides: dict[str, Side], x: Tensor) -> None:
    """Assert that all sides but the dense layer compute the same."""
    with torch.no_grad():
        wanted = sides["loop"].function(x).float()
        for name, side in sides.items():
            # batched_mm copies the weights for each assignment; it is compared at few tokens.
            if name != "dense" and (name != "transformers batched_mm" or len(x) <= 64):
                worst = float((side.function(x).float() - wanted).abs().max() / wanted.abs().max())
                assert worst < (1e-5 if x.dtype == torch.float32 else 3e-2), f"{name} differs by {worst}"


def drop_slow_sides(
    sides: dict[str, Side], x: Tensor, grad: Tensor | None, options: argparse.Namespace
) -> tuple[dict[str, str], dict[str, int]]:
    """Remove sides that need too much time or memory.

    Returns:
        The reason for each side removed, and for the others the calls of a round.
    """
    left_out, repeats = {}, {}
    for name, side in list(sides.items()):
        if name == "transformers batched_mm":
            # It copies the weights for each assignment, and their gradients with them.
            copies = x.shape[0] * TOP_K * 3 * x.shape[1] ** 2 * x.dtype.itemsize
            needed = copies * (1 if grad is None else 3)
            if needed > options.most_gigabytes * 1e9:
                left_out[name] = f"a call takes {needed / 1e9:.0f} GB"
                del sides[name]
                continue
        seconds(side, x, grad, 1, cpu_time=options.cpu_time)
        one = seconds(side, x, grad, 1, cpu_time=options.cpu_time)
        if one > options.most_seconds and name not in ("ours", "dense"):
            left_out[name] = f"a call takes {one:.1f} s"
            del sides[name]
        repeats[name] = max(1, min(200, round(0.02 / one)))
    return left_out, repeats


def compare(
    hidden: int, tokens: int, dtype_name: str, training: bool, options: argparse.Namespace
) -> dict[str, Any]:
    """Measure all sides in turn, for one row of the table."""
    dtype, device = DTYPES[dtype_name], options.device
    x = torch.randn(tokens, hidden).to(device, dtype).requires_grad_()
    grad = torch.randn(tokens, hidden).to(device, dtype) if training else None
    sides = make_sides(hidden, tokens, dtype, device)
    check_agreement(sides, x)
    left_out, repeats = drop_slow_sides(sides, x, grad, options)
    shape = (TOP_K * tokens // EXPERTS, hidden, 2 * hidden)
    samples: dict[str, list[float]] = {name: [] for name in sides}
    rates: list[float] = []
    clock = choose_clock(cpu_time=options.cpu_time)
    before = matmul_rate(shape, dtype, device=device, clock=clock)
    order = random.Random(0)
    for _ in range(options.rounds):
        # In a random order: a side finds in the caches what the one before it left there.
        for name in order.sample([*sides], len(sides)):
            samples[name].append(seconds(sides[name], x, grad, repeats[name], cpu_time=options.cpu_time))
        after = matmul_rate(shape, dtype, device=device, clock=clock)
        rates.append(min(before, after))
        before = after
    kept = [
        index
        for index, rate in enumerate(rates)
        if options.cpu_time or rate >= 0.8 * statistics.median(rates)
    ]
    medians = {name: statistics.median(samples[name][index] for index in kept) for name in sides}
    peers = {name: value for name, value in medians.items() if name.startswith("transformers")}
    if not peers:
        sys.exit(
            f"every implementation of transformers was left out ({left_out}); give a larger --most-seconds"
        )
    peer = min(peers, key=lambda name: peers[name])

    def ratio(over: str, under: str) -> dict[str, Any]:
        found = sorted(samples[over][index] / samples[under][index] for index in kept)
        return {"median": statistics.median(found), "spread": [found[0], found[-1]]}

    operations = 2 * tokens * TOP_K * 3 * hidden * hidden * (3 if training else 1)
    return {
        "hidden": hidden,
        "tokens": tokens,
        "dtype": dtype_name,
        "training": training,
        "seconds": medians,
        "rounds": len(kept),
        "best_of_transformers": peer,
        "ratio": ratio(peer, "ours"),
        "over_dense": ratio("ours", "dense"),
        "share_of_ceiling": operations / medians["ours"] / max(rates),
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
        loss = chunked_cross_entropy(hidden, model.output_weight, tokens, scale=model.logit_scale)
        loss.backward()  # type: ignore[no-untyped-call]
        model.zero_grad()
        return tokens.numel()

    def prefill(model: Decoder) -> int:
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
    for kind, function in (("training", training), ("prefill", prefill), ("latency", latency)):
        for model in made.values():
            function(model)
        rounds: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(options.rounds):
            for name, model in made.items():
                start = time.perf_counter()
                count = function(model)
                synchronize(tokens)
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
    parser.add_argument("--most-seconds", type=float, default=1.0, help="longest call that is waited for")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--most-gigabytes", type=float, default=4.0, help="largest memory of a call that is tried"
    )
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of one thread, with --threads 1")
    parser.add_argument("--models", action="store_true")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.cpu_time and (options.threads != 1 or options.device != "cpu"):
        parser.error("--cpu-time needs --threads 1 and --device cpu")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    result: dict[str, Any] = {
        "name": "moe_models" if options.models else "moe",
        "experts": EXPERTS,
        "top_k": TOP_K,
        "machine": {
            "processor": processor_name() if options.device == "cpu" else torch.cuda.get_device_name(),
            "threads": options.threads,
            "clock": "CPU time of the thread" if options.cpu_time else "wall",
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
