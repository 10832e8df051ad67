"""Whole checkpoints: pieces and shards change nothing, an interrupted merge goes on, and what does not fit is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from koine.combine import merge as merging
from koine.combine.fit import plan_merge
from koine.combine.memory import LIBRARIES, ByteBudget, need, workers_of
from koine.combine.merge import merge
from koine.combine.methods import METHODS
from koine.combine.recipe import Recipe
from koine.combine.tensor_files import Checkpoint, CheckpointWriter
from koine.combine.upcycle import upcycle_btx
from koine.errors import KoineWarning, UserError
from koine.files import read_json
from koine.model import Decoder, load_model, save_model

from .models import small_config, write_branches


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """`base`, and `a` and `b` branched from it."""
    base, branches = write_branches(tmp_path, ("a", "b"))
    return {"base": base, **branches}


def recipe_of(method: str, models: dict[str, Path], **more: Any) -> Recipe:
    info = METHODS[method]
    fields: dict[str, Any] = {"method": method, "models": (models["a"], models["b"])}
    if info.takes("weights"):
        fields["weights"] = (0.25, 0.75)
    if info.takes("base"):
        fields["base"] = models["base"]
    if "t" in info.parameters:
        fields["options"] = {"t": 0.3}
    return Recipe(**(fields | more))


def tensors(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_pieces_threads_and_shards_change_nothing(
    method: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(recipe_of(method, models), tmp_path / "whole", threads=1)
    monkeypatch.setattr(merging, "SYNC_BYTES", 1000)
    merge(recipe_of(method, models, max_shard_bytes=20_000), tmp_path / "shards", threads=3)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    whole, shards = tensors(tmp_path / "whole"), tensors(tmp_path / "shards")
    assert whole.keys() == shards.keys() == tensors(models["a"]).keys()
    for name in whole:
        assert torch.equal(whole[name], shards[name])
    # Sharded models are read as well.
    again = {"a": tmp_path / "shards", "b": tmp_path / "shards", "base": models["base"]}
    if method == "linear":
        merge(recipe_of(method, again), tmp_path / "again")
        for name, tensor in tensors(tmp_path / "again").items():
            assert torch.allclose(tensor, whole[name], atol=1e-7)
    load_model(tmp_path / "shards")
    assert METHODS[method].source in (tmp_path / "whole" / "README.md").read_text()


def test_values_by_hand_and_weights_by_pattern(models: dict[str, Path], tmp_path: Path) -> None:
    patterns = (("model.layers.[01].*", (1.0, 0.0)), ("*mlp*", (0.0, 1.0)))
    report = merge(recipe_of("linear", models, weights_for=patterns), tmp_path / "out")
    a, b, got = (tensors(path) for path in (models["a"], models["b"], tmp_path / "out"))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(got[name], a[name])
    name = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(got[name], b[name])
    name = "model.layers.2.self_attn.q_proj.weight"
    assert torch.allclose(got[name], 0.25 * a[name] + 0.75 * b[name], atol=1e-7)
    assert report["recipe"]["weights"] == (0.25, 0.75)
    figures = read_json(tmp_path / "out" / "merge_report.json")["tensors"][name]
    middle = (a[name] + b[name]) / 2
    assert figures["distance"][0] == pytest.approx(float((a[name] - middle).norm() / middle.norm()), rel=0.05)


def test_blocks_of_rows_are_put_together(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(recipe_of("task-arithmetic", models), tmp_path / "whole")
    monkeypatch.setattr(merging, "BLOCK_ENTRIES", 100)
    merge(recipe_of("task-arithmetic", models), tmp_path / "blocks")
    whole, blocks = tensors(tmp_path / "whole"), tensors(tmp_path / "blocks")
    assert all(torch.equal(whole[name], blocks[name]) for name in whole)


def test_sign_conflicts_are_counted(models: dict[str, Path], tmp_path: Path) -> None:
    report = merge(recipe_of("ties", models), tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    base, a, b = (tensors(models[one])[name] for one in ("base", "a", "b"))
    share = float((((a - base) > 0) != ((b - base) > 0)).float().mean())
    # Estimated from every entry here: the tensor is small.
    assert report["tensors"][name]["sign_conflicts"] == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_merge_goes_on_and_ends_in_the_same_bytes(
    models: dict[str, Path], tmp_path: Path, number: signal.Signals
) -> None:
    """The child merges slowly, syncs after every tensor, and is killed when its journal has some lines."""
    script = (
        "import sys, time\nfrom pathlib import Path\n"
        "from tests.combine.test_merge import recipe_of\nfrom koine.combine import merge as merging\n"
        "merging.SYNC_BYTES = 1\nslow = merging._merge_tensor\n"
        "merging._merge_tensor = lambda *given: (time.sleep(0.1), slow(*given))[1]\n"
        "folder = Path(sys.argv[1])\n"
        "merging.merge(recipe_of('dare-ties', {n: folder / p for n, p in (('base', 'seed'), ('a', 'a'), ('b', 'b'))}), folder / 'out', threads=1)\n"
    )
    root = Path(__file__).resolve().parents[2]
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=root, stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"},
    )  # fmt: skip
    journal = tmp_path / ".out.merge" / "journal.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.exists() and len(journal.read_text().splitlines()) > 4):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(number)
    child.wait()
    assert not (tmp_path / "out").exists()
    named = {"base": tmp_path / "seed", "a": tmp_path / "a", "b": tmp_path / "b"}
    done = len(journal.read_text().splitlines()) - 1
    touched: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        real = merging._merge_tensor
        patch.setattr(
            merging,
            "_merge_tensor",
            lambda plan, writer, name: (touched.append(name), real(plan, writer, name))[1],
        )
        merge(recipe_of("dare-ties", named), tmp_path / "out")
    assert len(touched) == len(tensors(tmp_path / "out")) - done
    merge(recipe_of("dare-ties", named), tmp_path / "fresh")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "fresh"))
    assert first == second
    assert not journal.parent.exists()


def test_other_work_beside_the_result_is_begun_anew(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / ".out.merge").mkdir()
    (tmp_path / ".out.merge" / "journal.jsonl").write_text(
        '{"fingerprint": "another"}\n{"model.norm.weight": {}}\n'
    )
    merge(recipe_of("linear", models), tmp_path / "out")
    merge(recipe_of("linear", models), tmp_path / "fresh")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "fresh" / "model.safetensors"
    ).read_bytes()


def _grow_vocabulary(folder: Path, extra: list[str]) -> None:
    """More tokens, at the front of the ids, with rows of their own."""
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
def test_rows_of_other_vocabularies_meet_by_token(
    models: dict[str, Path], tmp_path: Path, policy: str
) -> None:
    _grow_vocabulary(models["b"], ["neu", "wort"])
    with pytest.raises(UserError, match="its vocabulary is another than that of"):
        plan_merge(recipe_of("linear", models))
    method = "task-arithmetic" if policy == "base" else "linear"
    tokenizer = str(models["b"]) if policy == "MODEL" else policy
    merge(recipe_of(method, models, tokenizer=tokenizer), tmp_path / "out")
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


def test_mixed_dtypes_whole_numbers_and_scalars(tmp_path: Path) -> None:
    for name, dtype in (("a", torch.bfloat16), ("b", torch.float32)):
        (tmp_path / name).mkdir()
        content = {
            "w": torch.full((3, 4), 1.0 if name == "a" else 2.0, dtype=dtype),
            "scale": torch.tensor(3.0, dtype=dtype),
            "steps": torch.tensor([1, 2]),
            "empty": torch.empty(0, 4, dtype=dtype),
        }
        save_file(content, tmp_path / name / "model.safetensors")
    recipe = Recipe(
        method="linear", models=(tmp_path / "a", tmp_path / "b"), weights=(0.5, 0.5), dtype="float32"
    )
    merge(recipe, tmp_path / "out")
    got = tensors(tmp_path / "out")
    assert got["w"].dtype == torch.float32
    assert torch.equal(got["w"], torch.full((3, 4), 1.5))
    assert float(got["scale"]) == 3.0
    assert torch.equal(got["steps"], torch.tensor([1, 2]))
    save_file({**got, "steps": torch.tensor([1, 3])}, tmp_path / "b" / "model.safetensors")
    with pytest.raises(UserError, match="steps is of whole numbers and differs"):
        merge(recipe, tmp_path / "other")
    assert not list(tmp_path.glob(".other*"))


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
        merge(recipe_of("linear", models), tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("method", "change", "says"),
    [
        ("linear", {"weights": (1.0,)}, "1 weights for 2 models"),
        ("linear", {"weights": (1.0, -1.0)}, "the weights sum to 0"),
        ("linear", {"weights": (1.0, float("nan"))}, "the weights are 1.0, nan"),
        ("linear", {"base": Path("base")}, "linear uses no base"),
        ("ties", {"base": None}, "ties needs the common ancestor"),
        ("ties", {"options": {"density": 0.0}}, "the density is 0.0"),
        ("ties", {"options": {"densty": 0.5}}, "ties has no option 'densty'; did you mean 'density'"),
        ("slerp", {"options": {}}, "slerp needs --t"),
        ("slerp", {"weights": (0.5, 0.5)}, "slerp uses no weights"),
        ("linear", {"weights_for": (("*.attn.*", (0.5, 0.5)),)}, r"no tensor is named '\*.attn.\*'"),
        ("linear", {"dtype": "bf16"}, "unknown dtype 'bf16'; did you mean 'bfloat16'"),
        ("linear", {"tokenizer": "second"}, "'second' is none of the models"),
        ("linear", {"tokenizer": "base"}, "there is no base"),
        ("slerp", {"options": {"t": float("nan")}}, "t is nan; it must be a number"),
        ("slerp", {"options": {"t": 7.0}}, "t is 7.0; it must lie between 0 and 1"),
        ("ties", {"options": {"scale": float("inf")}}, "scale is inf; it must be a number"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(
    models: dict[str, Path], method: str, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        plan_merge(recipe_of(method, models, **change))


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Two models of 200 MB merged in a process whose memory grows by less than half of one."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        layout = {f"layer.{number}": (torch.float32, (1024, 1024)) for number in range(50)}
        writer = CheckpointWriter(tmp_path / name, layout, max_shard_bytes=10**9)
        for number in range(50):
            writer.write(f"layer.{number}", torch.full((1024, 1024), float(number)))
        writer.close()
    script = (
        "import resource, sys\nfrom pathlib import Path\nfrom koine.combine.merge import merge\nfrom koine.combine.recipe import Recipe\n"
        "folder = Path(sys.argv[1])\n"
        "recipe = Recipe(method='linear', models=(folder / 'a', folder / 'b'), weights=(0.5, 0.5))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "merge(recipe, folder / 'out', threads=2)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    grown = int(
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
        ).stdout
    )
    assert grown * 1024 < 100 * 2**20
    plan = plan_merge(Recipe(method="linear", models=(tmp_path / "a", tmp_path / "b"), weights=(0.5, 0.5)))
    assert need(plan, 2).output_bytes == 50 * 4 * 2**20
    plan.close()


def test_files_are_those_of_the_library(tmp_path: Path) -> None:
    """What we write the library reads, and the reverse, piece by piece."""
    content = {"x": torch.randn(5, 3), "y": torch.randn(4).to(torch.bfloat16), "z": torch.tensor(7)}
    save_file(content, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert torch.equal(checkpoint.read("x", 1, 4), content["x"][1:4])
    assert torch.equal(checkpoint.read("y"), content["y"])
    assert int(checkpoint.read("z")) == 7
    (tmp_path / "out").mkdir()
    writer = CheckpointWriter(
        tmp_path / "out",
        {name: (one.dtype, one.shape) for name, one in content.items()},
        max_shard_bytes=10**9,
    )
    writer.write("x", content["x"][2:], 2)
    writer.write("x", content["x"][:2])
    writer.write("y", content["y"])
    writer.write("z", content["z"])
    writer.close()
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in content.items())
    checkpoint.close()


def test_what_is_too_large_for_the_result_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    """Finite options and finite models may still have a merge that is not, in float32 or in a narrower dtype."""
    for more in (
        {"weights": (1e30, 1e30), "options": {"scale": 1e30}},
        {"weights": (1e8, 1e8), "dtype": "float16"},
    ):
        with pytest.raises(UserError, match="the merged model.* holds NaN or infinity as float"):
            merge(recipe_of("task-arithmetic", models, **more), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_unrelated_models_are_merged_where_that_is_wanted(models: dict[str, Path], tmp_path: Path) -> None:
    _unrelated(models["b"])
    merge(recipe_of("linear", models, unrelated=True), tmp_path / "out")
    base = models["base"]
    _unrelated(base)
    with pytest.raises(UserError, match="has no common ancestor with"):
        plan_merge(recipe_of("task-arithmetic", {**models, "b": models["a"]}))


def test_the_order_of_experts_must_be_one(tmp_path: Path) -> None:
    seed, branches = write_branches(tmp_path, ("code", "law"))
    upcycle_btx(seed, branches, tmp_path / "one")
    upcycle_btx(seed, dict(reversed(branches.items())), tmp_path / "two")
    recipe = Recipe(method="linear", models=(tmp_path / "one", tmp_path / "two"), weights=(0.5, 0.5))
    with pytest.raises(UserError, match="mixture.experts is seed, law, code, and seed, code, law in"):
        plan_merge(recipe)


def test_what_only_trains_or_is_left_out_is_no_difference(models: dict[str, Path]) -> None:
    _edit("config.json", initializer_range=0.5, max_position_embeddings=64, transformers_version="9")(
        models["b"]
    )
    plan_merge(recipe_of("linear", models)).close()


def test_configurations_of_other_architectures(tmp_path: Path) -> None:
    """By their fields; what one file leaves out has the library's default."""
    pytest.importorskip("transformers")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_file({"w": torch.ones(2, 2)}, tmp_path / name / "model.safetensors")
    config = {"model_type": "llama", "num_attention_heads": 4, "hidden_size": 8}
    recipe = Recipe(method="linear", models=(tmp_path / "a", tmp_path / "b"), weights=(0.5, 0.5))
    for more, says in (
        ({"num_attention_heads": 2}, "num_attention_heads is 2, and 4 in"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps is 0.001, and 1e-06 in"),
        ({"rms_norm_eps": 1e-6, "attention_dropout": 0.1}, None),
    ):
        (tmp_path / "a" / "config.json").write_text(json.dumps(config))
        (tmp_path / "b" / "config.json").write_text(json.dumps({**config, **more}))
        if says is None:
            plan_merge(recipe).close()
        else:
            with pytest.raises(UserError, match=says):
                plan_merge(recipe)


def test_whose_tokenizer_and_template_the_result_has(models: dict[str, Path], tmp_path: Path) -> None:
    first = (models["a"] / "chat_template.jinja").read_text()
    (models["b"] / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.warns(
        KoineWarning, match="the chat template of .*b is another than that of .*a, which is kept"
    ):
        merge(recipe_of("linear", models), tmp_path / "silent")
    assert (tmp_path / "silent" / "chat_template.jinja").read_text() == first
    _edit("tokenizer.json", normalizer=None)(models["b"])
    _edit("config.json", eos_token_id=6)(models["b"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge(recipe_of("linear", models, tokenizer=str(models["b"])), tmp_path / "second")
        merge(recipe_of("linear", models, tokenizer="first"), tmp_path / "first")
    assert (tmp_path / "second" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert read_json(tmp_path / "second" / "tokenizer.json")["normalizer"] is None
    assert read_json(tmp_path / "second" / "config.json")["eos_token_id"] == 6
    assert read_json(tmp_path / "first" / "tokenizer.json") == read_json(models["a"] / "tokenizer.json")


@pytest.mark.parametrize("tail", ['{"model.norm.weight": {', '{"model.norm.weight": {}}', "\0\0\0\n"])
def test_a_cut_line_of_the_journal_is_dropped(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tail: str
) -> None:
    """An interrupted merge whose last line is cut, unterminated or of zeros goes on twice, and ends as a fresh one."""
    monkeypatch.setattr(merging, "SYNC_BYTES", 1)
    real = merging._merge_tensor
    journal = tmp_path / ".out.merge" / "journal.jsonl"

    def stop_after(count: int) -> None:
        left = iter(range(count))

        def some(*given: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return real(*given)

        monkeypatch.setattr(merging, "_merge_tensor", some)
        with pytest.raises(KeyboardInterrupt):
            merge(recipe_of("linear", models), tmp_path / "out", threads=1)
        with journal.open("a") as file:
            file.write(tail)

    stop_after(3)
    stop_after(3)
    lines = journal.read_text().splitlines()
    assert all(json.loads(line) for line in lines[:-1])
    assert len(lines) >= 7
    monkeypatch.setattr(merging, "_merge_tensor", real)
    merge(recipe_of("linear", models), tmp_path / "out")
    merge(recipe_of("linear", models), tmp_path / "fresh")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "fresh"))
    assert first == second


def test_rows_whose_models_cancel_out_are_their_mean(models: dict[str, Path], tmp_path: Path) -> None:
    """A token that only a and b know, with weights 1 and -1: neither weight says anything about it."""
    for name in ("a", "b"):
        _grow_vocabulary(models[name], ["neu"])
    recipe = Recipe(
        method="linear", models=(models["a"], models["b"], models["base"]), weights=(1.0, -1.0, 1.0),
        options={"normalize": False}, tokenizer="first",
    )  # fmt: skip
    merge(recipe, tmp_path / "out")
    got, a, b = (
        tensors(path)["model.embed_tokens.weight"][0] for path in (tmp_path / "out", models["a"], models["b"])
    )
    assert torch.allclose(got, (a + b) / 2, atol=1e-6)


@pytest.mark.parametrize("policy", ["first", "b"])
def test_tokens_beyond_the_rows_of_a_model(models: dict[str, Path], tmp_path: Path, policy: str) -> None:
    """A tokenizer may know more ids than its model has rows: such a token is not that model's."""
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
    merge(recipe_of("linear", models, tokenizer=tokenizer), tmp_path / "out")
    got, a, b = (
        tensors(path)["model.embed_tokens.weight"] for path in (tmp_path / "out", models["a"], models["b"])
    )
    assert torch.allclose(got[: len(b)], 0.25 * a[: len(b)] + 0.75 * b, atol=1e-6)
    if policy == "first":
        assert torch.equal(got[-1], torch.ones(32))


def test_out_inside_a_model_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    for folder in (models["a"], models["base"]):
        with pytest.raises(UserError, match="lies inside .*, which is read"):
            merge(recipe_of("ties", models), folder / "deeper" / "out")
    assert not (models["a"] / "deeper").exists()


def test_a_budget_of_bytes_is_kept() -> None:
    """What does not fit beside the others waits; what is larger than all waits until it is alone."""
    budget, held, most = ByteBudget(100), 0, 0
    lock = threading.Lock()

    def work(count: int) -> None:
        nonlocal held, most
        with budget.hold(count):
            with lock:
                held += count
                most = max(most, held if held > count else 0)
            time.sleep(0.002)
            with lock:
                held -= count

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [30, 60, 150, 40, 100, 10, 20] * 6))
    assert 0 < most <= 100
    assert held == 0


def test_more_threads_need_no_more_memory(tmp_path: Path) -> None:
    """TIES needs tensors whole: eight threads hold two at a time, and `need` says so."""
    layout = {f"layer.{number}": (torch.float32, (1024, 2048)) for number in range(8)}
    for index, name in enumerate(("base", "a", "b")):
        (tmp_path / name).mkdir()
        writer = CheckpointWriter(tmp_path / name, layout, max_shard_bytes=10**9)
        for number in range(8):
            generator = torch.Generator().manual_seed(100 * number + index)
            writer.write(f"layer.{number}", 1.0 + 0.1 * torch.randn(1024, 2048, generator=generator))
        writer.close()
    script = (
        "import resource, sys\nfrom pathlib import Path\nfrom koine.combine.merge import merge\n"
        "from koine.combine.recipe import Recipe\nfolder = Path(sys.argv[1])\n"
        "recipe = Recipe(method='ties', models=(folder / 'a', folder / 'b'), base=folder / 'base', weights=(0.5, 0.5))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "merge(recipe, folder / f'out-{sys.argv[2]}', threads=int(sys.argv[2]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    recipe = Recipe(
        method="ties", models=(tmp_path / "a", tmp_path / "b"), base=tmp_path / "base", weights=(0.5, 0.5)
    )
    plan = plan_merge(recipe)
    assert need(plan, 8) == need(plan, 2)
    assert need(plan, 1).peak_memory_bytes < need(plan, 2).peak_memory_bytes
    assert workers_of(plan, 8) == 2
    allowed = need(plan, 8).peak_memory_bytes - LIBRARIES
    plan.close()
    grown = 1024 * int(
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path), "8"], capture_output=True, text=True, check=True
        ).stdout
    )
    assert grown < allowed + 50 * 2**20
