"""One side of benchmarks/generation.py and families.py: it prefills prompts and decodes greedily on command.

It reads one JSON object a line (`{"do": "prepare", "batch": 8, "context": 512}`, `{"do": "decode", "steps":
16}`, `{"do": "end"}`) and answers with one. It runs in the environment of its side: `ours` needs koine;
`transformers` and `llama_cpp` need only themselves, `llama_server` the program `llama-server` beside the
interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CHUNK = 2048
"""Tokens of a prefill chunk, ours and transformers'."""
PREFILL = 512
"""The same for llama.cpp: its default."""
ROOM = 1024
"""Positions for new tokens after a prompt, where a cache has a fixed size and the order names no other."""


def prompts(batch: int, context: int, vocabulary: int) -> list[list[int]]:
    """Draw the same random prompts for every side."""
    draw = random.Random(batch * 100_000 + context)
    return [[draw.randrange(10, vocabulary) for _ in range(context)] for _ in range(batch)]


class Ours:
    """Our scheduler with prepacked weights, as `LocalEngine` uses them; other classes one request at a time."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        from koine.generate.cpu.prepacked_linear import prepack
        from koine.model import Decoder, load_causal_lm

        model = load_causal_lm(Path(options.weights), dtype=getattr(torch, options.dtype))
        self.model: Any = prepack(model) if isinstance(model, Decoder) else model
        self.batched = isinstance(model, Decoder)

    def prepare(self, batch: int, context: int, room: int) -> dict[str, Any]:
        from koine.generate import Scheduler
        from koine.generate.sampling import Sampling
        from koine.generate.sequential import SequentialGenerator

        self.scheduler: Any
        if self.batched:
            self.scheduler = Scheduler(self.model, max_batch=batch, prefill_chunk=CHUNK, prefixes=0)
        else:
            self.scheduler = SequentialGenerator(self.model, prefill_chunk=CHUNK)
        self.batch = batch
        self.requests = [
            self.scheduler.submit(prompt, Sampling(max_new_tokens=100_000, temperature=0))
            for prompt in prompts(batch, context, self.model.vocab_size)
        ]
        start = time.perf_counter()
        while not self.requests[0].tokens:
            self.scheduler.step()
        first = time.perf_counter() - start
        while self.batched and any(not request.tokens for request in self.requests):
            self.scheduler.step()
        whole = self.batched or batch == 1
        seconds = time.perf_counter() - start if whole else None
        return {"first_token_seconds": first, "prefill_seconds": seconds}

    def decode(self, steps: int) -> None:
        """Sample `steps` tokens a row; one at a time, the same number of tokens of the first row."""
        for _ in range(steps if self.batched else steps * self.batch):
            self.scheduler.step()

    def tokens(self) -> list[list[int]]:
        return [request.tokens for request in self.requests if request.tokens]

    def cache(self) -> dict[str, Any]:
        if not self.batched:
            return {"held": None, "reserved": None, "lengths": []}
        cache = self.scheduler.cache
        lengths = [sequence.length for sequence in cache.sequences]
        return {"held": cache.bytes_held(), "reserved": cache.bytes_reserved(), "lengths": lengths}


class Transformers:
    """`generate` of its class from a prefilled KV cache; long rows of a batch are copies of one."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch, self.static, self.compile = torch, options.cache == "static", options.compile
        self.model = AutoModelForCausalLM.from_pretrained(
            options.weights,
            dtype=getattr(torch, options.dtype),
            attn_implementation=options.attention,
            local_files_only=True,
            trust_remote_code=False,
        ).eval()

    def prepare(self, batch: int, context: int, room: int) -> dict[str, Any]:
        torch = self.torch
        from transformers import DynamicCache

        rows = torch.tensor(prompts(batch, context, self.model.config.vocab_size))
        copied = context >= CHUNK and batch > 1
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
        self.past = self.static_cache(past, context + room) if self.static else past
        self.ids, self.context = torch.cat((rows, first), dim=1), context
        return {
            "first_token_seconds": None if batch > 1 else seconds,
            "prefill_seconds": None if copied else seconds,
        }

    def static_cache(self, past: Any, length: int) -> Any:
        """Copy a cache into one of fixed size, which `generate` can compile."""
        from transformers import StaticCache

        cache = StaticCache(config=self.model.config, max_cache_len=length)
        for number, layer in enumerate(past.layers):
            # Clones: a tensor of inference mode cannot be updated outside of it.
            cache.update(layer.keys.clone(), layer.values.clone(), number)
        return cache

    def decode(self, steps: int) -> None:
        from transformers import CompileConfig

        torch = self.torch
        compiling = CompileConfig(mode="default") if self.compile else None
        if compiling is not None:
            # By default generate compiles on accelerators only.
            compiling._compile_all_devices = True
        self.ids = self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            past_key_values=self.past,
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            pad_token_id=0,
            compile_config=compiling,
            disable_compile=not self.compile,
        )

    def tokens(self) -> list[list[int]]:
        found: list[list[int]] = self.ids[:, self.context :].tolist()
        return found

    def cache(self) -> dict[str, Any]:
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in self.past.layers)
        return {"held": held, "reserved": held, "lengths": [self.ids.shape[1] - 1] * len(self.ids)}


class LlamaCpp:
    """llama.cpp through the C functions of its Python package: one batch of all sequences a step.

    Its server does the same for its slots, with HTTP around it. Argmax is outside, as on the other sides.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        import llama_cpp

        self.api, self.options = llama_cpp, options
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            options.gguf.encode(), llama_cpp.llama_model_default_params()
        )
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def prepare(self, batch: int, context: int, room: int) -> dict[str, Any]:
        api, threads = self.api, self.options.threads
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = batch * (context + room), batch
        settings.n_batch = settings.n_ubatch = PREFILL
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type = {"auto": -1, "off": 0, "on": 1}[self.options.flash]
        self.context = api.llama_init_from_model(self.model, settings)
        self.place = api.llama_batch_init(max(PREFILL, batch), 0, 1)
        self.written: list[list[int]] = [[] for _ in range(batch)]
        self.lengths = [0] * batch
        start, first = time.perf_counter(), None
        for row, prompt in enumerate(prompts(batch, context, self.vocabulary)):
            for begin in range(0, context, PREFILL):
                part = prompt[begin : begin + PREFILL]
                self._run([(row, token, begin + len(part) == context) for token in part], last_only=True)
            self.written[row].append(self._best(self.place.n_tokens - 1))
            first = first or time.perf_counter() - start
        return {"first_token_seconds": first, "prefill_seconds": time.perf_counter() - start}

    def _run(self, tokens: list[tuple[int, int, bool]], *, last_only: bool = False) -> None:
        """Run one batch of (row, token, whether logits are wanted)."""
        place = self.place
        place.n_tokens = len(tokens)
        for number, (row, token, wanted) in enumerate(tokens):
            place.token[number], place.pos[number] = token, self.lengths[row]
            place.n_seq_id[number], place.seq_id[number][0] = 1, row
            place.logits[number] = wanted and (not last_only or number == len(tokens) - 1)
            self.lengths[row] += 1
        if self.api.llama_decode(self.context, place):
            raise RuntimeError("llama_decode failed")

    def _best(self, number: int) -> int:
        import numpy as np

        logits = self.api.llama_get_logits_ith(self.context, number)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax())

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self._run([(row, written[-1], True) for row, written in enumerate(self.written)])
            for row, written in enumerate(self.written):
                written.append(self._best(row))

    def tokens(self) -> list[list[int]]:
        return self.written

    def cache(self) -> dict[str, Any]:
        return {"held": None, "reserved": None, "lengths": self.lengths}


class LlamaServer:
    """llama.cpp's `llama-server` with a slot a sequence, asked over HTTP on the loopback address.

    A turn asks every slot for new tokens after its prompt at once; the prompt is in the slot's cache.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options

    def prepare(self, batch: int, context: int, room: int) -> dict[str, Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        threads = str(self.options.threads)
        command = [
            str(Path(sys.executable).parent / "llama-server"),
            *("--model", self.options.gguf, "--host", "127.0.0.1", "--port", str(self.port)),
            *("--parallel", str(batch), "--ctx-size", str(batch * (context + room))),
            *("--threads", threads, "--threads-batch", threads, "--flash-attn", self.options.flash),
            *("--batch-size", "2048", "--ubatch-size", str(PREFILL), "--cache-ram", "0"),
        ]
        # It must end with this process, also where that is killed.
        self.server = subprocess.Popen(
            command, stdout=sys.stderr, stderr=sys.stderr, preexec_fn=end_with_parent
        )
        self._wait(seconds=120)
        self.prompts = prompts(batch, context, self.options.vocabulary)
        self.written: list[list[int]] = []
        start = time.perf_counter()
        self._ask_all(1)
        return {"first_token_seconds": None, "prefill_seconds": time.perf_counter() - start}

    def _wait(self, seconds: float) -> None:
        """Wait until the server has loaded the model."""
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).read()
                return
            time.sleep(0.2)
        raise RuntimeError("llama-server did not start")

    def _ask(self, slot: int, steps: int) -> list[int]:
        body = {
            "prompt": self.prompts[slot],
            "id_slot": slot,
            "n_predict": steps,
            "cache_prompt": True,
            "ignore_eos": True,
            "return_tokens": True,
            "temperature": 0,
            "samplers": ["temperature"],
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        answer = json.loads(urllib.request.urlopen(request, timeout=3600).read())
        found: list[int] = answer["tokens"]
        if len(found) != steps:
            raise RuntimeError(f"llama-server wrote {len(found)} tokens, not {steps}")
        return found

    def _ask_all(self, steps: int) -> None:
        with ThreadPoolExecutor(len(self.prompts)) as pool:
            self.written = list(pool.map(lambda slot: self._ask(slot, steps), range(len(self.prompts))))

    def decode(self, steps: int) -> None:
        self._ask_all(steps)

    def tokens(self) -> list[list[int]]:
        return self.written

    def cache(self) -> dict[str, Any]:
        return {"held": None, "reserved": None, "lengths": []}


def end_with_parent() -> None:
    """Ask Linux to kill this process when the one that started it ends."""
    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def peak_bytes(process: str | int = "self") -> int:
    """Return the peak resident memory of a process in bytes."""
    status = Path(f"/proc/{process}/status")
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no VmHWM in {status}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=["ours", "transformers", "llama_cpp", "llama_server"])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--gguf", default="")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", default="dynamic", choices=["dynamic", "static"])
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--flash", default="auto", choices=["auto", "on", "off"])
    parser.add_argument("--vocabulary", type=int, help="ids of the model, for llama-server")
    options = parser.parse_args()
    answers = sys.stdout
    sys.stdout = sys.stderr
    if not options.side.startswith("llama_"):
        import torch

        torch.set_num_threads(options.threads)
    sides = {
        "ours": Ours,
        "transformers": Transformers,
        "llama_cpp": LlamaCpp,
        "llama_server": LlamaServer,
    }
    side: Any = sides[options.side](options)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    answer({"ready": True})
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "prepare":
            answer(side.prepare(order["batch"], order["context"], order.get("room", ROOM)))
        elif order["do"] == "decode":
            start = time.perf_counter()
            side.decode(order["steps"])
            answer({"seconds": time.perf_counter() - start})
        else:
            measured = side.server.pid if isinstance(side, LlamaServer) else "self"
            peak = peak_bytes(measured)
            answer({"tokens": side.tokens(), "cache": side.cache(), "peak_memory_bytes": peak})


if __name__ == "__main__":
    main()
