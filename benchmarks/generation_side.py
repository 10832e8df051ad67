"""One side of benchmarks/generation.py: a process that prefills prompts and decodes greedily on command.

It reads one JSON object a line (`{"do": "prepare", "batch": 8, "context": 512}`, `{"do": "decode", "steps":
16}`, `{"do": "end"}`) and answers with one. It runs in the environment of its side: `ours` needs koine;
`transformers` and `llama_cpp` need only themselves.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

CHUNK = 2048
"""Tokens of a prefill chunk, on both sides."""


def prompts(batch: int, context: int, vocabulary: int) -> list[list[int]]:
    """Draw the same random prompts for every side."""
    draw = random.Random(batch * 100_000 + context)
    return [[draw.randrange(10, vocabulary) for _ in range(context)] for _ in range(batch)]


class Ours:
    """Our scheduler with prepacked weights, as `LocalEngine` uses them."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        from koine.generate.cpu.prepacked_linear import prepack
        from koine.model import Decoder, load_causal_lm

        model = load_causal_lm(Path(options.weights), dtype=getattr(torch, options.dtype))
        assert isinstance(model, Decoder)
        self.model = prepack(model)

    def prepare(self, batch: int, context: int) -> dict[str, Any]:
        from koine.generate import Scheduler
        from koine.generate.sampling import Sampling

        self.scheduler = Scheduler(self.model, max_batch=batch, prefill_chunk=CHUNK, prefixes=0)
        self.requests = [
            self.scheduler.submit(prompt, Sampling(max_new_tokens=100_000, temperature=0))
            for prompt in prompts(batch, context, self.model.config.vocab_size)
        ]
        start = time.perf_counter()
        while not self.requests[0].tokens:
            self.scheduler.step()
        first = time.perf_counter() - start
        while any(not request.tokens for request in self.requests):
            self.scheduler.step()
        return {"first_token_seconds": first, "prefill_seconds": time.perf_counter() - start}

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self.scheduler.step()

    def tokens(self) -> list[list[int]]:
        return [request.tokens for request in self.requests]

    def cache(self) -> dict[str, Any]:
        cache = self.scheduler.cache
        lengths = [sequence.length for sequence in cache.sequences]
        return {"held": cache.bytes_held(), "reserved": cache.bytes_reserved(), "lengths": lengths}


class Transformers:
    """`generate` of Cohere2ForCausalLM from a prefilled KV cache; long rows of a batch are copies of one."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch
        from transformers import Cohere2ForCausalLM

        self.torch = torch
        self.model = Cohere2ForCausalLM.from_pretrained(
            options.weights,
            dtype=getattr(torch, options.dtype),
            local_files_only=True,
            trust_remote_code=False,
        ).eval()

    def prepare(self, batch: int, context: int) -> dict[str, Any]:
        torch = self.torch
        from transformers import DynamicCache

        rows = torch.tensor(prompts(batch, context, self.model.config.vocab_size))
        copied = context > CHUNK and batch > 1
        past = DynamicCache(config=self.model.config)
        start = time.perf_counter()
        with torch.inference_mode():
            for begin in range(0, context, CHUNK):
                out = self.model(
                    (rows[:1] if copied else rows)[:, begin : begin + CHUNK],
                    past_key_values=past,
                    use_cache=True,
                    logits_to_keep=1,
                )
            first = out.logits[:, -1].argmax(-1, keepdim=True)
            seconds = time.perf_counter() - start
            if copied:
                past.batch_repeat_interleave(batch)
                rows, first = rows[:1].expand(batch, -1), first.expand(batch, -1)
        self.past, self.ids, self.context = past, torch.cat((rows, first), dim=1), context
        return {
            "first_token_seconds": None if batch > 1 else seconds,
            "prefill_seconds": None if copied else seconds,
        }

    def decode(self, steps: int) -> None:
        torch = self.torch
        self.ids = self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            past_key_values=self.past,
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            pad_token_id=0,
        )

    def tokens(self) -> list[list[int]]:
        found: list[list[int]] = self.ids[:, self.context :].tolist()
        return found

    def cache(self) -> dict[str, Any]:
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in self.past.layers)
        return {"held": held, "reserved": held, "lengths": [self.past.get_seq_length()] * len(self.ids)}


class LlamaCpp:
    """llama.cpp through its Python package: one sequence, argmax outside as on the other sides."""

    def __init__(self, options: argparse.Namespace) -> None:
        from llama_cpp import Llama

        self.path, self.threads, self.make = options.gguf, options.threads, Llama

    def prepare(self, batch: int, context: int) -> dict[str, Any]:
        if batch != 1:
            raise RuntimeError("one sequence at a time")
        self.llama = self.make(
            model_path=self.path,
            n_ctx=context + 2048,
            n_batch=512,
            n_threads=self.threads,
            n_threads_batch=self.threads,
            verbose=False,
        )
        [prompt] = prompts(1, context, self.llama.n_vocab())
        start = time.perf_counter()
        self.llama.eval(prompt)
        self.written = [self._best()]
        seconds = time.perf_counter() - start
        return {"first_token_seconds": seconds, "prefill_seconds": seconds}

    def _best(self) -> int:
        import llama_cpp
        import numpy as np

        count = self.llama.n_vocab()
        logits = llama_cpp.llama_get_logits_ith(self.llama.ctx, -1)
        return int(np.ctypeslib.as_array(logits, shape=(count,)).argmax())

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self.llama.eval([self.written[-1]])
            self.written.append(self._best())

    def tokens(self) -> list[list[int]]:
        return [self.written]

    def cache(self) -> dict[str, Any]:
        return {"held": None, "reserved": None, "lengths": []}


def peak_bytes() -> int:
    """Return the peak resident memory of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=["ours", "transformers", "llama_cpp"])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--gguf", default="")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    answers = sys.stdout
    sys.stdout = sys.stderr
    if options.side != "llama_cpp":
        import torch

        torch.set_num_threads(options.threads)
    sides = {"ours": Ours, "transformers": Transformers, "llama_cpp": LlamaCpp}
    side: Any = sides[options.side](options)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    answer({"ready": True})
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "prepare":
            answer(side.prepare(order["batch"], order["context"]))
        elif order["do"] == "decode":
            start = time.perf_counter()
            side.decode(order["steps"])
            answer({"seconds": time.perf_counter() - start})
        else:
            answer({"tokens": side.tokens(), "cache": side.cache(), "peak_memory_bytes": peak_bytes()})


if __name__ == "__main__":
    main()
