"""Bad inputs in configurations: fields of another type or out of their bounds, JSON that Python cannot hold."""

from __future__ import annotations

from typing import Any

from . import worlds
from .case import Case

PRETRAIN = "train pretrain --preset koine-0.5m --tokenizer tokenizer --steps 2 --batch-size 2 --sequence-length 32 --out new"
MIXTURE = "train pretrain --preset koine-0.5m --tokenizer tokenizer --mixture mixture.json --out new"
CONFIG = "model/config.json"


def model(mistake: str, says: str, **fields: Any) -> Case:
    """A model whose config.json has these fields."""
    return Case(
        mistake=mistake,
        command="model describe model",
        prepare=worlds.having("model", then=worlds.edited_json(CONFIG, **fields)),
        says=f"{CONFIG}: {says}",
    )


def training(mistake: str, options: str, says: str) -> Case:
    return Case(
        mistake=mistake,
        command=f"{PRETRAIN} --data tokens {options}",
        prepare=worlds.having("tokens", "tokenizer"),
        says=says,
    )


def mixture(mistake: str, says: str, **changes: Any) -> Case:
    return Case(
        mistake=mistake,
        command=MIXTURE,
        prepare=worlds.having("tokens", "tokenizer", then=worlds.write_mixture(**changes)),
        says=says,
    )


def file_is(path: str, content: str) -> Any:
    return worlds.written(path, content)


CASES = (
    model("a window of nothing", "the field 'sliding_window' is 0; it must be at least 1", sliding_window=0),
    model("a window of minus one", "the field 'sliding_window' is -1; it must be at least 1", sliding_window=-1),
    model("a head that is no part of the width", "num_heads 2 is not a multiple of num_kv_heads 3; each key head serves the same number of query heads", num_key_value_heads=3),
    model("an odd width of a head", "head_dim 15 is odd; RoPE rotates pairs", head_dim=15),
    model("a negative base of the rotary embedding", "rope_theta is -1.0; it must be at least 1", rope_parameters={"rope_theta": -1.0}),
    model("a base of the rotary embedding that is not finite", "the field 'rope_theta' is inf; it must be finite", rope_parameters={"rope_theta": float("inf")}),
    model("an epsilon that is no number", "the field 'layer_norm_eps' is nan; it must be a number", layer_norm_eps=float("nan")),
    model("an epsilon of nothing", "norm_eps is 0.0; it must be greater than 0", layer_norm_eps=0.0),
    model("a logit scale of nothing", "logit_scale is 0.0; it must be greater than 0", logit_scale=0),
    model("the word false where false is meant", "the field 'tie_word_embeddings' is 'false'; it must be true or false", tie_word_embeddings="false"),
    model("true where a number is meant", "the field 'num_hidden_layers' is True; it must be an integer", num_hidden_layers=True),
    model("a vocabulary of hundreds of digits", "the field 'vocab_size' is an integer of 401 digits; it must be at most 268435456", vocab_size=10**400),
    model("a billion layers", "the field 'num_hidden_layers' is 1000000000; it must be at most 1024", num_hidden_layers=10**9),
    model("a list for the rotary embedding", "the field 'rope_parameters' is [1]; it must be an object", rope_parameters=[1]),
    Case(
        mistake="a configuration that is a list",
        command="model describe model",
        prepare=worlds.having("model", then=file_is(CONFIG, "[]")),
        says=f"{CONFIG}: is not a JSON object; it is no model's configuration",
    ),
    Case(
        mistake="a configuration nested without end",
        command="model describe model",
        prepare=worlds.having("model", then=file_is(CONFIG, '{"a":' * 50_000)),
        says=f"{CONFIG}: not valid JSON (nested too deeply); the file is damaged or truncated; write it again",
    ),
    Case(
        mistake="a configuration with a number of 5,000 digits",
        command="model describe model",
        prepare=worlds.having("model", then=file_is(CONFIG, '{"vocab_size": ' + "7" * 5000 + "}")),
        says=f"{CONFIG}: not valid JSON (an integer has thousands of digits); the file is damaged or truncated; write it again",
    ),
    Case(
        mistake="half a surrogate pair in a configuration",
        command="model describe model",
        prepare=worlds.having("model", then=file_is(CONFIG, '{"model_type": "\\ud800"}')),
        says=f"{CONFIG}: not valid JSON (a string holds half of a surrogate pair); the file is damaged or truncated; write it again",
    ),
    training("a learning rate that is no number", "--learning-rate nan", "learning_rate is nan; it must be a number"),
    training("a learning rate without end", "--learning-rate inf", "learning_rate is inf; it must be at most 1000"),
    training("an epsilon below what float32 holds", "--epsilon 1e-40", "epsilon is 1e-40; it must be at least 1e-30"),
    training("a seed of 40 digits", "--seed 1" + "0" * 40, "seed is 1" + "0" * 40 + "; it must be at most 9223372036854775807"),
    training("a million threads", "--threads 1000000", "threads is 1000000; it must be at most 4096"),
    mixture("a mixture whose seed has hundreds of digits", "mixture.json: seed is an integer of 401 digits; it must be at most 9223372036854775807", seed=10**400),
    mixture("a step of more tokens than any machine takes", "mixture.json: a step has 2,000,000,000 tokens; 268,435,456 are possible: give it fewer rows", batch_size=20_000, sequence_length=100_000),
    mixture("a proportion of NaN", "mixture.json: source 'tales': proportion is nan; it must be a number", source={"proportion": float("nan")}),
    mixture("two weights for one language", "mixture.json: source 'tales': two weights for 'de'; give one", source={"languages": {"de": 1.0, "deu": 1.0}}),
    mixture("a weight without end", "mixture.json: source 'tales': the weight of 'de' is inf; it must be at most 1e+12", source={"languages": {"de": float("inf")}}),
    Case(
        mistake="a mixture nested without end",
        command=MIXTURE,
        prepare=worlds.having("tokens", "tokenizer", then=file_is("mixture.json", "[" * 100_000)),
        says="mixture.json: not valid JSON (nested too deeply); the file is damaged or truncated; write it again",
    ),
    Case(
        mistake="a record of a training that names no data",
        command="data at-step trained 0",
        prepare=worlds.having("trained", then=worlds.edited_json("trained/training.json", identity={"sources": 3})),
        says="trained/training.json: the field 'sources' is 3; it must be an object",
    ),
    Case(
        mistake="a record of experts that is a list",
        command="extend mixture --remove code --out new",
        prepare=worlds.having("mixture", then=file_is("mixture/mixture.json", "[]")),
        says="mixture/mixture.json: is not a JSON object; remove it, or upcycle again",
    ),
)  # fmt: skip
