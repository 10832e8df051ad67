"""Models, tokenizers and configurations that do not fit are refused; harmless differences are not."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from koine.combine.merging import tensor as tensor_module
from koine.combine.merging.config import MergeConfig
from koine.combine.merging.plan import plan_merge
from koine.combine.merging.runner import run_merge
from koine.combine.moe.upcycle import upcycle_btx
from koine.errors import KoineWarning, UserError
from koine.files import read_json
from koine.model import Decoder, load_model, save_model
from tests.combine.merge_configs import config_of, tensors
from tests.combine.models import small_config, write_branches


def _grow_vocabulary(folder: Path, extra: list[str]) -> None:
    """Add tokens at the front of the ids, with rows of their own."""
    content = json.loads((folder / "tokenizer.json").read_text())
    count = len(extra)
    vocabulary = {token: row + count for token, row in content["model"]["vocab"].items()}
    content["model"]["vocab"] = {token: row for row, token in enumerate(extra)} | vocabulary
    for token in content["added_tokens"]:
        token["id"] += count
    (folder / "tokenizer.json").write_text(json.dumps(content))
    stored = load_file(folder / "model.safetensors")
    old = stored["model.embed_tokens.weight"]
    stored["model.embed_tokens.weight"] = torch.cat((torch.randn(count, old.shape[1]), old))
    save_file(stored, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] += count
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("policy", ["first", "MODEL", "base"])
def test_rows_of_other_vocabularies_are_matched_by_token(
    models: dict[str, Path], tmp_path: Path, policy: str
) -> None:
    _grow_vocabulary(models["b"], ["neu", "wort"])
    with pytest.raises(UserError, match="its vocabulary is another than that of"):
        plan_merge(config_of("linear", models))
    method = "task-arithmetic" if policy == "base" else "linear"
    tokenizer = str(models["b"]) if policy == "MODEL" else policy
    run_merge(config_of(method, models, tokenizer=tokenizer), tmp_path / "out")
    name = "model.embed_tokens.weight"
    a, b, base, got = (
        tensors(path)[name] for path in (models["a"], models["b"], models["base"], tmp_path / "out")
    )
    expected = 0.25 * a + 0.75 * b[2:]
    shared = got[2:] if policy == "MODEL" else got
    assert torch.allclose(shared, expected, atol=1e-6)
    if policy == "MODEL":
        # Only one model has these.
        assert torch.allclose(got[:2], b[:2])
        assert base.shape[0] == got.shape[0] - 2
    assert load_model(tmp_path / "out").config.vocab_size == got.shape[0]
    source = models["b"] if policy == "MODEL" else models["a"]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()


def _permute_vocabulary(folder: Path) -> None:
    """Move the same tokens to other ids, each with its row."""
    content = json.loads((folder / "tokenizer.json").read_text())
    stored = load_file(folder / "model.safetensors")
    rows = stored["model.embed_tokens.weight"]
    to = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {token: int(to[row]) for token, row in vocabulary.items()}
    for token in content["added_tokens"]:
        token["id"] = int(to[token["id"]])
    (folder / "tokenizer.json").write_text(json.dumps(content))
    stored["model.embed_tokens.weight"] = torch.empty_like(rows).index_copy_(0, to, rows)
    save_file(stored, folder / "model.safetensors")


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "dare-ties", "model-stock"])
@pytest.mark.parametrize("whole", [True, False])
def test_the_order_of_the_rows_changes_nothing(
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    whole: bool,
) -> None:
    """Rows gathered by their tokens, in blocks or at once, are merged as rows in order."""
    monkeypatch.setattr(tensor_module, "BLOCK", 320)
    if not whole:
        monkeypatch.setattr(tensor_module, "IN_MEMORY_ENTRIES", 0)
    run_merge(config_of(method, models), tmp_path / "in-order")
    _permute_vocabulary(models["b"])
    run_merge(config_of(method, models, tokenizer="first"), tmp_path / "permuted")
    in_order, permuted = tensors(tmp_path / "in-order"), tensors(tmp_path / "permuted")
    # A dot product of Model Stock may be summed in another order, depending on memory alignment.
    assert all(torch.allclose(in_order[name], permuted[name], rtol=0.0, atol=1e-7) for name in in_order)


def _lose_shard(path: Path) -> None:
    plain = load_file(path / "model.safetensors")
    names = sorted(plain)
    (path / "model.safetensors").unlink()
    save_file({name: plain[name] for name in names[1:]}, path / "one.safetensors")
    index = {
        "weight_map": {name: "two.safetensors" if name == names[0] else "one.safetensors" for name in names}
    }
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _change(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    content = load_file(path / "model.safetensors")
    change(content)
    save_file(content, path / "model.safetensors")


def _set_nan(content: dict[str, torch.Tensor]) -> None:
    content["model.norm.weight"][1] = float("nan")


def _cut(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


def _edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps({**content, **changes}))

    return edit


def _unrelated(path: Path) -> None:
    torch.manual_seed(99)
    save_model(Decoder(small_config()), path)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: _change(path, _set_nan), "model.norm.weight holds NaN or infinity"),
        (lambda path: _change(path, lambda c: c.pop("model.norm.weight")), "lacks model.norm.weight"),
        (lambda path: _change(path, lambda c: c.update(more=torch.ones(1))), "has more, which"),
        (
            lambda path: _change(path, lambda c: c.update({"model.norm.weight": torch.ones(7)})),
            r"model.norm.weight has shape \[7\], and \[32\]",
        ),
        (_lose_shard, "the shard two.safetensors is missing"),
        (_cut, "not a whole safetensors file"),
        (lambda path: (path / "model.safetensors").write_bytes(b"abc"), "it has no header"),
        (lambda path: (path / "config.json").write_text('{"model_type": "llama"}'), "is a llama, and"),
        (shutil.rmtree, "no such folder"),
        (_edit("config.json", layer_norm_eps=0.001), "norm_eps is 0.001, and 1e-05 in"),
        (_edit("config.json", num_attention_heads=8, head_dim=8), "num_heads is 8, and 4 in"),
        (_edit("config.json", rope_parameters={"rope_theta": 5e5}), "rope_theta is 500000.0, and 10000.0 in"),
        (_edit("config.json", logit_scale=1.0), "logit_scale is 1.0, and 0.25 in"),
        (_edit("config.json", tie_word_embeddings=False), "tie_embeddings is False, and True in"),
        (_edit("tokenizer.json", normalizer=None), r"another than that of .* \(they differ in normalizer\)"),
        (_unrelated, "has no common ancestor with"),
    ],
)
def test_models_that_do_not_fit_are_refused(
    models: dict[str, Path], tmp_path: Path, spoil: Callable[[Path], None], says: str
) -> None:
    spoil(models["b"])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=says):
        run_merge(config_of("linear", models), tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("method", "change", "says"),
    [
        ("linear", {"weights": (1.0,)}, "1 weights for 2 models"),
        ("linear", {"weights": (1.0, -1.0)}, "the weights sum to 0"),
        ("linear", {"weights": (1.0, float("nan"))}, "the weights are 1.0, nan"),
        ("linear", {"base": Path("base")}, "linear uses no base"),
        ("ties", {"base": None}, "ties needs the common ancestor"),
        ("ties", {"options": {"density": 0.0}}, "density is 0.0; it must be greater than 0"),
        ("ties", {"options": {"densty": 0.5}}, "ties has no option 'densty'; did you mean 'density'"),
        ("slerp", {"options": {}}, "slerp needs --t"),
        ("slerp", {"weights": (0.5, 0.5)}, "slerp uses no weights"),
        ("linear", {"weights_for": (("*.attn.*", (0.5, 0.5)),)}, r"no tensor is named '\*.attn.\*'"),
        ("linear", {"dtype": "bf16"}, "unknown dtype 'bf16'; did you mean 'bfloat16'"),
        ("linear", {"tokenizer": "second"}, "'second' is none of the models"),
        ("linear", {"tokenizer": "base"}, "there is no base"),
        ("slerp", {"options": {"t": float("nan")}}, "t is nan; it must be a number"),
        ("slerp", {"options": {"t": 7.0}}, "t is 7.0; it must be at most 1"),
        ("ties", {"options": {"scale": float("inf")}}, "scale is inf; it must be at most 1e"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(
    models: dict[str, Path], method: str, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        plan_merge(config_of(method, models, **change))


def test_unrelated_models_are_merged_on_request(models: dict[str, Path], tmp_path: Path) -> None:
    _unrelated(models["b"])
    run_merge(config_of("linear", models, unrelated=True), tmp_path / "out")
    base = models["base"]
    _unrelated(base)
    with pytest.raises(UserError, match="has no common ancestor with"):
        plan_merge(config_of("task-arithmetic", {**models, "b": models["a"]}))


def test_the_order_of_experts_must_be_equal(tmp_path: Path) -> None:
    seed, branches = write_branches(tmp_path, ("code", "law"))
    upcycle_btx(seed, branches, tmp_path / "one")
    upcycle_btx(seed, dict(reversed(branches.items())), tmp_path / "two")
    config = MergeConfig(method="linear", models=(tmp_path / "one", tmp_path / "two"), weights=(0.5, 0.5))
    with pytest.raises(UserError, match="mixture.experts is seed, law, code, and seed, code, law in"):
        plan_merge(config)


def test_fields_of_training_and_defaults_are_no_difference(models: dict[str, Path]) -> None:
    _edit("config.json", initializer_range=0.5, max_position_embeddings=64, transformers_version="9")(
        models["b"]
    )
    plan_merge(config_of("linear", models)).close()


def test_configurations_of_other_architectures(tmp_path: Path) -> None:
    """They are compared by their fields; one that a file leaves out has the library's default."""
    pytest.importorskip("transformers")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_file({"w": torch.ones(2, 2)}, tmp_path / name / "model.safetensors")
    config = {"model_type": "llama", "num_attention_heads": 4, "hidden_size": 8}
    merge_config = MergeConfig(method="linear", models=(tmp_path / "a", tmp_path / "b"), weights=(0.5, 0.5))
    for more, says in (
        ({"num_attention_heads": 2}, "num_attention_heads is 2, and 4 in"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps is 0.001, and 1e-06 in"),
        ({"rms_norm_eps": 1e-6, "attention_dropout": 0.1}, None),
    ):
        (tmp_path / "a" / "config.json").write_text(json.dumps(config))
        (tmp_path / "b" / "config.json").write_text(json.dumps({**config, **more}))
        if says is None:
            plan_merge(merge_config).close()
        else:
            with pytest.raises(UserError, match=says):
                plan_merge(merge_config)


def test_the_result_has_the_chosen_tokenizer_and_template(models: dict[str, Path], tmp_path: Path) -> None:
    first = (models["a"] / "chat_template.jinja").read_text()
    (models["b"] / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.warns(
        KoineWarning, match="the chat template of .*b is another than that of .*a, which is kept"
    ):
        run_merge(config_of("linear", models), tmp_path / "silent")
    assert (tmp_path / "silent" / "chat_template.jinja").read_text() == first
    _edit("tokenizer.json", normalizer=None)(models["b"])
    _edit("config.json", eos_token_id=6)(models["b"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_merge(config_of("linear", models, tokenizer=str(models["b"])), tmp_path / "second")
        run_merge(config_of("linear", models, tokenizer="first"), tmp_path / "first")
    assert (tmp_path / "second" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert read_json(tmp_path / "second" / "tokenizer.json")["normalizer"] is None
    assert read_json(tmp_path / "second" / "config.json")["eos_token_id"] == 6
    assert read_json(tmp_path / "first" / "tokenizer.json") == read_json(models["a"] / "tokenizer.json")


def test_rows_whose_weights_cancel_out_are_averaged(models: dict[str, Path], tmp_path: Path) -> None:
    """A token that only a and b have, with weights 1 and -1, which cancel out."""
    for name in ("a", "b"):
        _grow_vocabulary(models[name], ["neu"])
    config = MergeConfig(
        method="linear",
        models=(models["a"], models["b"], models["base"]),
        weights=(1.0, -1.0, 1.0),
        options={"normalize": False},
        tokenizer="first",
    )
    run_merge(config, tmp_path / "out")
    got, a, b = (
        tensors(path)["model.embed_tokens.weight"][0] for path in (tmp_path / "out", models["a"], models["b"])
    )
    assert torch.allclose(got, (a + b) / 2, atol=1e-6)


@pytest.mark.parametrize("policy", ["first", "b"])
def test_tokens_beyond_the_rows_of_a_model(models: dict[str, Path], tmp_path: Path, policy: str) -> None:
    """A tokenizer may have more ids than its model has rows: the model has no row for such a token."""
    content = json.loads((models["b"] / "tokenizer.json").read_text())
    last = max(content["model"]["vocab"].values())
    content["added_tokens"].append({**content["added_tokens"][0], "id": last + 1, "content": "<beyond>"})
    (models["b"] / "tokenizer.json").write_text(json.dumps(content))
    if policy == "first":
        # The first has a row for it.
        (models["a"] / "tokenizer.json").write_text(json.dumps(content))
        stored = load_file(models["a"] / "model.safetensors")
        rows = stored["model.embed_tokens.weight"]
        stored["model.embed_tokens.weight"] = torch.cat((rows, torch.ones(1, rows.shape[1])))
        save_file(stored, models["a"] / "model.safetensors")
        _edit("config.json", vocab_size=len(rows) + 1)(models["a"])
    tokenizer = policy if policy == "first" else str(models["b"])
    run_merge(config_of("linear", models, tokenizer=tokenizer), tmp_path / "out")
    got, a, b = (
        tensors(path)["model.embed_tokens.weight"] for path in (tmp_path / "out", models["a"], models["b"])
    )
    assert torch.allclose(got[: len(b)], 0.25 * a[: len(b)] + 0.75 * b, atol=1e-6)
    if policy == "first":
        assert torch.equal(got[-1], torch.ones(32))


def test_out_inside_a_model_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    for folder in (models["a"], models["base"]):
        with pytest.raises(UserError, match="lies inside .*, which is read"):
            run_merge(config_of("ties", models), folder / "deeper" / "out")
    assert not (models["a"] / "deeper").exists()
