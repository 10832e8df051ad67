"""Run by the Python of the peer `llama_cpp`: what llama.cpp makes of a GGUF file.

Request: JSON on standard input; logits: an .npz file.

Knows nothing of koine, which that environment does not have.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from llama_cpp import Llama

GGML_TYPE_F32 = 0


def main() -> None:
    request = json.load(sys.stdin)
    # float32 caches: the default of float16 would hide what is compared.
    llama = Llama(
        request["model"],
        n_ctx=request["context"],
        n_batch=request["context"],
        n_ubatch=request["context"],
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        verbose=False,
    )
    logits = {}
    for number, tokens in enumerate(request["prompts"]):
        llama.reset()
        llama.eval(tokens)
        logits[str(number)] = np.array(llama.scores[: len(tokens)])
    np.savez(request["logits"], **logits)
    answers = []
    for prompt in request["prompts"]:
        llama.reset()
        llama.eval(prompt)
        answer: list[int] = []
        while len(answer) < request["new_tokens"]:
            answer.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
            llama.eval([answer[-1]])
        answers.append(answer)
    ids = [llama.tokenize(text.encode(), add_bos=False, special=False) for text in request["texts"]]
    with_bos = llama.tokenize(b"", add_bos=True, special=False)
    json.dump(
        {
            "answers": answers,
            "ids": ids,
            "with_bos": with_bos,
            "eos": llama.token_eos(),
            "template": llama.metadata.get("tokenizer.chat_template"),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
