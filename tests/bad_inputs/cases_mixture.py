"""Mixtures of experts: what is no branch of the seed, and what cannot be added or removed."""

from __future__ import annotations

from . import worlds
from .case import Case

BTX = "upcycle btx --seed-model model --experts branch --out new"

CASES = (
    Case(
        mistake="an expert that is no branch of the seed",
        command="upcycle btx --seed-model model --experts unrelated --out new",
        prepare=worlds.having("model", "unrelated"),
        says="unrelated: has no common ancestor with model (the cosine of their matrices is …); give branches of one seed: models that were trained on from it",
    ),
    Case(
        mistake="an expert of another shape",
        command=BTX,
        prepare=worlds.having(
            "model", "branch", then=worlds.edited_json("branch/config.json", layer_norm_eps=0.001)
        ),
        says="branch/config.json: norm_eps is 0.001, and 1e-05 in model; experts are branches of one seed: give models of equal shape",
    ),
    Case(
        mistake="branches of two families",
        command="upcycle btx --seed-model llama --experts qwen --out new",
        prepare=worlds.having("llama", "qwen"),
        says="qwen/config.json: is a qwen3 model, and llama a llama model (qk_norm of layer 0 is head, and not given there); experts are branches of one seed: give models of one family",
    ),
    Case(
        mistake="an expert with another tokenizer",
        command=BTX,
        prepare=worlds.having(
            "model", "branch", then=worlds.edited_json("branch/tokenizer.json", normalizer=None)
        ),
        says="branch/tokenizer.json: its tokenizer is another than that of model (they differ in normalizer); experts are branches of one seed, with one vocabulary",
    ),
    Case(
        mistake="an expert whose weights are gone",
        command=BTX,
        prepare=worlds.having("model", "branch", then=worlds.removed("branch/model.safetensors")),
        says="branch: holds no model.safetensors; weights in another format must be converted first",
    ),
    Case(
        mistake="two experts with one name",
        command="upcycle btx --seed-model model --experts branch other/branch --out new",
        says="two experts are named 'branch'; name them: --experts code=A --experts law=B",
    ),
    Case(
        mistake="a Nexus without text of a domain",
        command="upcycle nexus --seed-model model --experts branch --out new",
        prepare=worlds.having("model", "branch"),
        says="no text of the domain of 'branch'; add --domain-text branch=DATA, or --router linear",
    ),
    Case(
        mistake="a domain of an expert that is not there",
        command="upcycle nexus --seed-model model --experts branch --domain-text brunch=text.jsonl --out new",
        prepare=worlds.having("model", "branch", "text"),
        says="--domain-text: no expert is named 'brunch'; did you mean 'branch'?",
    ),
    Case(
        mistake="fewer documents than dimensions of a domain's embedding",
        command="upcycle nexus --seed-model model --experts branch --domain-text branch=text.jsonl --domain-size 1000 --out new",
        prepare=worlds.having("model", "branch", "text"),
        says="… documents for domain embeddings of 1000 dimensions; give more documents, or a smaller --domain-size",
    ),
    Case(
        mistake="more experts a token than there are",
        command="upcycle btx --seed-model model --experts branch --top-k 3 --out new",
        prepare=worlds.having("model", "branch"),
        says="top_k is 3; it must lie between 1 and the 2 experts",
    ),
    Case(
        mistake="a disk that is full while upcycling",
        command=BTX,
        prepare=worlds.having("model", "branch"),
        during=worlds.full_disk,
        simulated="fsync reports that no space is left",
        says="new: the disk is full; free some space or choose another place; nothing half-written was kept",
    ),
    Case(
        mistake="an expert for a dense model",
        command="extend model --expert branch --out new",
        prepare=worlds.having("model", "branch"),
        says="model: is a dense model; give a mixture: see `koine upcycle`",
    ),
    Case(
        mistake="one more expert for linear routers that are to stay",
        command="extend mixture --expert branch --out new",
        prepare=worlds.having("mixture", "branch"),
        says="mixture: its router is linear and cannot score an expert that it has not seen; add --reset-router and fine-tune the mixture, or upcycle by nexus",
    ),
    Case(
        mistake="an expert to remove that is not there",
        command="extend mixture --remove cod --out new",
        prepare=worlds.having("mixture"),
        says="mixture: has no expert 'cod'; did you mean 'code'?",
    ),
    Case(
        mistake="an expert to remove, with another model than it was made of",
        command="extend mixture --remove code --expert model --out new",
        prepare=worlds.having("mixture", "model"),
        says="model: is not the model that expert 'code' of mixture was made of (the sha256 of its weights is another); give that one: it was …",
    ),
    Case(
        mistake="nothing to add or remove",
        command="extend mixture --out new",
        says="nothing to do; give --expert MODEL to add one, or --remove NAME",
    ),
    Case(
        mistake="a mixture for llama.cpp",
        command="model export mixture --format gguf --out model.gguf",
        prepare=worlds.having("mixture"),
        says="mixture/config.json: llama.cpp has no architecture for this model: it is a mixture of experts; export the dense models that it was made of",
    ),
    Case(
        mistake="a branch-train-mix of one domain",
        command="run branch_train_mix --set seed_model=model --set domains=code=text.jsonl",
        prepare=worlds.having("model", "text"),
        says="1 domains are given; give at least two: --set domains=code=DATA,law=DATA",
    ),
    Case(
        mistake="a seed model under --seed, which is the random seed",
        command="upcycle btx --seed model --seed-model model --experts branch --out new",
        says="--seed is 'model', and the random seed is an integer; a seed model is given as --seed-model model",
    ),
)
