"""Merging: models that do not fit together, recipes that make no sense, and what happens on the way."""

from __future__ import annotations

from . import worlds
from .case import Case

LINEAR = "merge linear model branch --weights 0.5,0.5 --out new"

CASES = (
    Case(
        mistake="a merging method with a typo",
        command="merge linaer model branch --out new",
        says="unknown method 'linaer'; did you mean 'linear' or 'dare-linear' or 'slerp'?",
    ),
    Case(
        mistake="too few weights",
        command="merge linear model branch --weights 1 --out new",
        prepare=worlds.having("model", "branch"),
        says="1 weights for 2 models; give one each, with commas between",
    ),
    Case(
        mistake="weights that are no numbers",
        command="merge linear model branch --weights a,b --out new",
        says="--weights: 'a,b' is no list of numbers; for example 0.5,0.5",
    ),
    Case(
        mistake="weights that sum to nothing",
        command="merge linear model branch --weights 1,-1 --out new",
        prepare=worlds.having("model", "branch"),
        says="the weights sum to 0; they are divided by their sum: choose others, or --no-normalize",
    ),
    Case(
        mistake="weights for tensors that do not exist",
        command="merge linear model branch --weights-for *.attn.*=0.2,0.8 --out new",
        prepare=worlds.having("model", "branch"),
        says="--weights-for: no tensor is named '*.attn.*'; names are like …",
    ),
    Case(
        mistake="a merge without the ancestor that it needs",
        command="merge ties model branch --out new",
        prepare=worlds.having("model", "branch"),
        says="ties needs the common ancestor; give --base MODEL",
    ),
    Case(
        mistake="three models for a merge of two",
        command="merge slerp model branch unrelated --t 0.5 --out new",
        says="slerp merges 2 models, and 3 are given",
    ),
    Case(
        mistake="an impossible density",
        command="merge ties branch --base model --density 1.5 --out new",
        says="density is 1.5; it must be at most 1",
    ),
    Case(
        mistake="models of different sizes",
        command=LINEAR,
        prepare=worlds.having("model", "branch", then=worlds.other_shape("branch/model.safetensors")),
        says="branch: model.norm.weight has shape [3], and […] in model; models of one size can be merged",
    ),
    Case(
        mistake="models of different architectures",
        command=LINEAR,
        prepare=worlds.having(
            "model", "branch", then=worlds.edited_json("branch/config.json", model_type="llama")
        ),
        says="branch: is a llama, and model a cohere2; models of one architecture can be merged",
    ),
    Case(
        mistake="models with different vocabularies",
        command=LINEAR,
        prepare=worlds.having("model", "branch", then=worlds.add_tokens("branch/tokenizer.json")),
        says="branch: its vocabulary is another than that of model; say whose the result has: --tokenizer first, base, or a model's folder; rows are then merged token by token",
    ),
    Case(
        mistake="models that turn positions by another base",
        command=LINEAR,
        prepare=worlds.having(
            "model",
            "branch",
            then=worlds.edited_json("branch/config.json", rope_parameters={"rope_theta": 5e5}),
        ),
        says="branch/config.json: rope_theta is 500000.0, and 10000.0 in model; the same weights compute something else then: models of one configuration can be merged",
    ),
    Case(
        mistake="models with equal vocabularies and different tokenizers",
        command=LINEAR,
        prepare=worlds.having(
            "model", "branch", then=worlds.edited_json("branch/tokenizer.json", normalizer=None)
        ),
        says="branch/tokenizer.json: its tokenizer is another than that of model (they differ in normalizer); say whose the result has: --tokenizer first, base, or a model's folder",
    ),
    Case(
        mistake="models without a common ancestor",
        command="merge linear model unrelated --out new",
        prepare=worlds.having("model", "unrelated"),
        says="unrelated: has no common ancestor with model (the cosine of their matrices is …); weights of independent models have no common order; to merge them all the same, add --unrelated",
    ),
    Case(
        mistake="the tokenizer of a base where there is none",
        command=LINEAR + " --tokenizer base",
        prepare=worlds.having("model", "branch"),
        says="--tokenizer: there is no base; give first, or a model's folder",
    ),
    Case(
        mistake="a share of SLERP's way that is no number",
        command="merge slerp model branch --t nan --out new",
        prepare=worlds.having("model", "branch"),
        says="t is nan; it must be a number",
    ),
    Case(
        mistake="a share of SLERP's way beyond its end",
        command="merge slerp model branch --t 7 --out new",
        prepare=worlds.having("model", "branch"),
        says="t is 7.0; it must be at most 1",
    ),
    Case(
        mistake="a scale that is no number",
        command="merge task-arithmetic branch --base model --scale nan --out new",
        prepare=worlds.having("model", "branch"),
        says="scale is nan; it must be a number",
    ),
    Case(
        mistake="weights and a scale that are too large for any number",
        command="merge task-arithmetic branch --base model --weights 1e30 --scale 1e30 --out new",
        prepare=worlds.having("model", "branch"),
        says="the merged … holds NaN or infinity as float32; the weights or the scale are too large, or --dtype too narrow",
    ),
    Case(
        mistake="files of endless size",
        command=LINEAR + " --max-shard-size inf",
        prepare=worlds.having("model", "branch"),
        says="--max-shard-size: 'inf' is no size; for example 5GB or 200MB",
    ),
    Case(
        mistake="a merge into one of its models",
        command="merge linear model branch --out model/new",
        prepare=worlds.having("model", "branch"),
        says="model/new: lies inside model, which is read; choose another --out, beside it",
    ),
    Case(
        mistake="a model of which a shard is missing",
        command=LINEAR,
        prepare=worlds.having(
            "model",
            "branch",
            then=worlds.both(
                worlds.renamed("branch/model.safetensors", "branch/model-1.safetensors"),
                worlds.written(
                    "branch/model.safetensors.index.json",
                    '{"weight_map": {"model.norm.weight": "model-2.safetensors"}}',
                ),
            ),
        ),
        says="branch: the shard model-2.safetensors is missing; copy the whole folder again",
    ),
    Case(
        mistake="a model whose weights are cut short",
        command=LINEAR,
        prepare=worlds.having("model", "branch", then=worlds.cut("branch/model.safetensors")),
        says="branch/model.safetensors: not a whole safetensors file (…); it is truncated or damaged; copy or build it again",
    ),
    Case(
        mistake="a tensor that holds NaN",
        command=LINEAR,
        prepare=worlds.having("model", "branch", then=worlds.with_nan("branch/model.safetensors")),
        says="branch: model.norm.weight holds NaN or infinity; this checkpoint is broken; use an earlier one",
    ),
    Case(
        mistake="a merge into a folder that is there",
        command="merge linear model branch --weights 0.5,0.5 --out model",
        prepare=worlds.having("model", "branch"),
        says="model: exists already; choose another --out or remove it first",
    ),
    Case(
        mistake="a disk that is full in mid-merge",
        command=LINEAR,
        prepare=worlds.having("model", "branch"),
        during=worlds.full_disk,
        simulated="fsync reports that no space is left",
        says="new: the disk is full; free some space or choose another place; nothing half-written was kept",
    ),
    Case(
        mistake="a merge across modalities without a multimodal model",
        command="merge cross-modal model branch --out new",
        prepare=worlds.having("model", "branch"),
        says="model: holds no tensor of a language model inside; give the multimodal model first",
    ),
    Case(
        mistake="a merge across modalities with a larger text model",
        command="merge cross-modal multimodal model --out new",
        prepare=worlds.having("model", then=worlds.inside_another),
        says="model: has …, which the language model inside multimodal lacks; give the text model that the other began as",
    ),
    Case(
        mistake="a search over the weights of one model",
        command="merge search model --data text.jsonl",
        says="one model is given; give at least two: there is nothing to weigh",
    ),
    Case(
        mistake="a search by nothing",
        command="merge search model branch",
        says="nothing to measure by is given; give --data, --questions or both",
    ),
    Case(
        mistake="a search by two files of one name",
        command="merge search model branch --data text.jsonl --questions text.jsonl",
        prepare=worlds.having("model", "branch", "text"),
        says="two scores are named 'text'; name them: --questions NAME=PATH",
    ),
    Case(
        mistake="a search for a method that has nothing to search",
        command="merge search model branch --data text.jsonl --method model-stock",
        prepare=worlds.having("model", "branch", "text"),
        says="model-stock has no weights to search; take linear, slerp, task-arithmetic, ties or a dare method",
    ),
    Case(
        mistake="a search with an option that its method has not",
        command="merge search model branch --data text.jsonl --scale 2",
        prepare=worlds.having("model", "branch", "text"),
        says="linear has no option 'scale'; known: normalize",
    ),
    Case(
        mistake="a search with a model that holds NaN",
        command="merge search model branch --data text.jsonl",
        prepare=worlds.having("model", "branch", "text", then=worlds.with_nan("branch/model.safetensors")),
        says="branch: … holds NaN or infinity; this checkpoint is broken; use an earlier one",
    ),
    Case(
        mistake="a search with a grid larger than its budget",
        command="merge search model branch --data text.jsonl --parts 500",
        prepare=worlds.having("model", "branch", "text"),
        says="the grid has 501 points and the budget is 200; take fewer parts, or a larger budget",
    ),
)
