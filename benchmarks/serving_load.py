"""64 requests of mixed length against one engine: continuous batching, and one by one, with the same weights.

    python benchmarks/serving_load.py --out benchmarks/results/serving_load.json

Requests arrive at random (exponential gaps, seeded), faster than one-by-one serving can finish them; both
ways get the same arrivals. The latency of a request runs from its arrival to its last token. Both ways must
finish all requests with the same tokens. The last line printed is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from koine.files import write_json
from koine.generate import Request, Scheduler
from koine.generate.cpu.prepacked_linear import prepack
from koine.generate.sampling import Sampling
from koine.hardware import processor_name
from koine.model import Decoder, preset
from koine.model.counting import count_parameters


@dataclass(frozen=True)
class Arrival:
    """A request before it is sent: seconds after the start, prompt, maximum new tokens."""

    at: float
    prompt: list[int]
    answer: int


def arrivals(count: int, rate: float, vocabulary: int, seed: int) -> list[Arrival]:
    """Draw prompts of 16 to 1,024 tokens and outputs of 16 to 256, both log-uniform, `rate` a second."""
    draw = random.Random(seed)
    at, found = 0.0, []
    for _ in range(count):
        at += draw.expovariate(rate)
        prompt = [draw.randrange(10, vocabulary) for _ in range(int(2 ** draw.uniform(4, 10)))]
        found.append(Arrival(at, prompt, int(2 ** draw.uniform(4, 8))))
    return found


def serve(model: Decoder, wanted: list[Arrival], max_batch: int) -> dict[str, Any]:
    """Serve all requests; return total seconds, latencies and outputs."""
    scheduler = Scheduler(model, max_batch=max_batch, prefixes=0)
    start = time.perf_counter()
    waiting, running = list(wanted), {}
    requests: list[Request] = []
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    while waiting or scheduler.busy:
        now = time.perf_counter() - start
        while waiting and waiting[0].at <= now:
            arrival = waiting.pop(0)
            request = scheduler.submit(arrival.prompt, Sampling(max_new_tokens=arrival.answer, temperature=0))
            running[id(request)] = arrival
            requests.append(request)
        if not scheduler.busy:
            time.sleep(max(0.0, waiting[0].at - now))
            continue
        new = scheduler.step()
        now = time.perf_counter() - start
        for request, _ in new:
            arrival = running[id(request)]
            first.setdefault(id(request), now - arrival.at)
            last[id(request)] = now - arrival.at
    seconds = time.perf_counter() - start
    written = sum(len(request.tokens) for request in requests)
    return {
        "seconds": seconds,
        "tokens_per_second": written / seconds,
        "requests_per_second": len(requests) / seconds,
        "first_token": percentiles(list(first.values())),
        "latency": percentiles(list(last.values())),
        "answers": [request.tokens for request in requests],
        "finished": sum(request.finish == "length" for request in requests),
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """Return the 50th, 90th and 99th percentile."""
    ordered = sorted(values)
    return {
        f"p{share}": ordered[min(len(ordered) - 1, int(share / 100 * len(ordered)))] for share in (50, 90, 99)
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="koine-8m")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rate", type=float, default=64.0, help="arrivals a second")
    parser.add_argument("--max-batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    # A wide initialisation keeps the two best logits apart, so that rounding does not choose the greedy
    # token.
    config = replace(preset(options.preset), initializer_range=0.1)
    model = prepack(Decoder(config))
    wanted = arrivals(options.requests, options.rate, config.vocab_size, seed=1)
    serve(model, wanted[:4], options.max_batch)
    rounds: list[dict[str, dict[str, Any]]] = []
    for _ in range(options.rounds):
        rounds.append(
            {"one_by_one": serve(model, wanted, 1), "together": serve(model, wanted, options.max_batch)}
        )
    answers = [way.pop("answers") for sides in rounds for way in sides.values()]
    ratios = sorted(
        sides["together"]["tokens_per_second"] / sides["one_by_one"]["tokens_per_second"] for sides in rounds
    )
    middle = rounds[len(rounds) // 2]
    result: dict[str, Any] = {
        "name": "serving_load",
        "model": options.preset,
        "parameters": count_parameters(config).total,
        "machine": {
            "processor": processor_name(),
            "threads": options.threads,
            "python": platform.python_version(),
        },
        "torch": torch.__version__,
        "requests": options.requests,
        "max_batch": options.max_batch,
        "arrivals_per_second": options.rate,
        "ratio": statistics.median(ratios),
        "ratio_spread": [ratios[0], ratios[-1]],
        "lost": options.requests - min(way["finished"] for sides in rounds for way in sides.values()),
        "same_answers": all(one == answers[0] for one in answers),
        **middle,
    }
    if options.out:
        write_json(options.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
