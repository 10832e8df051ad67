"""Blocks of a mixture agree with the dense model that they are made of, and with the papers' counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from koine.errors import UserError
from koine.generate import generate
from koine.generate.cache.contexts import PrefillContext
from koine.generate.cache.paged_cache import PagedCache
from koine.generate.sampling import Sampling
from koine.model import Decoder, ModelConfig, hybrid_layers, load_model, save_model
from koine.model.config import LayerSpec, MixtureConfig
from koine.model.counting import cache_bytes, count_parameters, forward_flops
from koine.model.formats.directory import from_transformers, to_transformers
from koine.model.moe.routers import Routing

KINDS = [
    {"attention": "averaged"},
    {"attention": "averaged", "shared_expert": True, "domain_size": 5},
    {"attention": "kv-experts"},
    {"attention": "shared-kv", "top_k": 2},
    {"attention": "kv-experts", "attention_top_k": 2, "shared_expert": True},
]


def mixed(config: ModelConfig, **fields: Any) -> ModelConfig:
    fields.setdefault("experts", ("seed", "code", "law"))
    return replace(config, mixture=MixtureConfig(**fields))


def copies(dense: Decoder, config: ModelConfig) -> Decoder:
    """Return a mixture whose experts are all the dense model, with random routers."""
    model = Decoder(config).to(dense.embedding.weight.dtype)
    state = model.state_dict()
    stored, renamed = to_transformers(dense.state_dict(), dense.config), to_transformers(state, config)
    for name in renamed:
        if ".router." in name:
            continue
        plain = name.replace("shared_expert.", "")
        parts = plain.split(".experts.")
        source = parts[0] + "." + parts[1].split(".", 1)[1] if len(parts) == 2 else plain
        renamed[name] = stored[source]
    model.load_state_dict(from_transformers(renamed, config))
    return model.eval()


def with_feed_forward_times(dense: Decoder, factor: float) -> Decoder:
    twin = Decoder(dense.config).to(dense.embedding.weight.dtype)
    twin.load_state_dict(dense.state_dict())
    with torch.no_grad():
        for block in twin.blocks:
            block.out_proj.weight[:, dense.config.attention_size :] *= factor
    return twin.eval()


@pytest.mark.parametrize("attention", ["averaged", "kv-experts", "shared-kv"])
@pytest.mark.parametrize(("shared", "top_k"), [(False, 1), (False, 3), (True, 1)])
@torch.no_grad()
def test_identical_experts_are_the_dense_model(
    tiny: ModelConfig, attention: str, shared: bool, top_k: int
) -> None:
    """Soft attention gates sum to 1; a gate of 1/3 (routers of zeros) scales the feed-forward by a third."""
    dense = Decoder(replace(tiny, layers=(*tiny.layers, LayerSpec(qk_norm="heads")))).double().eval()
    config = mixed(dense.config, attention=attention, shared_expert=shared, top_k=top_k)
    model = copies(dense, config)
    for name, parameter in model.named_parameters():
        if name.endswith(".router.weight"):
            parameter.zero_()
    tokens = torch.randint(0, 99, (2, 23))
    expected = with_feed_forward_times(dense, top_k / 3 + shared)(tokens)
    assert (model(tokens) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("fields", KINDS)
@torch.no_grad()
def test_the_order_of_experts_does_not_matter(tiny: ModelConfig, fields: dict[str, Any]) -> None:
    config = mixed(tiny, **fields)
    model = Decoder(config).double().eval()
    stored = to_transformers(model.state_dict(), config)
    order = [2, 0, 1]
    permuted: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith(("router.weight", "router.domains")):
            permuted[name] = tensor[order]
        elif ".experts." in name:
            before, after = name.split(".experts.")
            number, rest = after.split(".", 1)
            permuted[f"{before}.experts.{order.index(int(number))}.{rest}"] = tensor
        else:
            permuted[name] = tensor
    other = Decoder(config).double().eval()
    other.load_state_dict(from_transformers(permuted, config))
    tokens = torch.randint(0, 99, (2, 23))
    assert (model(tokens) - other(tokens)).abs().max() < 1e-12


@pytest.mark.parametrize("fields", KINDS)
def test_a_saved_mixture_is_the_same_here_and_in_transformers(
    tiny: ModelConfig, fields: dict[str, Any], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    from koine.model import register_with_transformers

    register_with_transformers()
    model = Decoder(mixed(tiny, **fields)).eval()
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert again.config == model.config
    tokens = torch.randint(0, 99, (2, 23))
    with torch.no_grad():
        assert torch.equal(again(tokens), model(tokens))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert torch.equal(theirs(tokens).logits, model.logits(model(tokens)))


@pytest.mark.parametrize("fields", KINDS)
@torch.no_grad()
def test_the_kv_cache_changes_nothing(tiny: ModelConfig, fields: dict[str, Any]) -> None:
    model = Decoder(mixed(tiny, **fields)).eval()
    tokens = torch.randint(0, 99, (1, 40))
    cache = PagedCache.of_model(model, page=8)
    sequence = cache.add()
    parts = [
        model(tokens[:, begin:end], context=PrefillContext(cache, [sequence], [end - begin]))
        for begin, end in ((0, 11), (11, 12), (12, 40))
    ]
    assert (torch.cat(parts, dim=1) - model(tokens)).abs().max() < 1e-5
    assert cache.bytes_held() == cache_bytes(model.config, 40, element_bytes=4)
    [request] = generate(model, [tokens[0].tolist()], Sampling(max_new_tokens=6, temperature=0.0))
    text = tokens
    for token in request.tokens:
        assert int(model.logits(model(text))[0, -1].argmax()) == token
        text = torch.cat((text, torch.tensor([[token]])), dim=1)


@pytest.mark.parametrize("fields", KINDS)
def test_parameters_and_operations_are_counted(tiny: ModelConfig, fields: dict[str, Any]) -> None:
    config = mixed(tiny, **fields)
    model = Decoder(config)
    counts = count_parameters(config)
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    mixture = config.mixture
    assert mixture is not None
    assert counts.inactive == 4 * (3 - mixture.top_k) * 3 * 32 * 48
    if mixture.domain_size is None:
        matrices = sum(
            parameter.numel() for name, parameter in model.named_parameters() if parameter.dim() > 1
        )
        pairs = sum(7 * 8 // 2 + 13 * 7 if spec.window else 20 * 21 // 2 for spec in config.layers)
        assert (
            forward_flops(config, 20)
            == 2 * 20 * (matrices - counts.inactive) + 4 * config.attention_size * pairs
        )


def test_counts_of_the_paper() -> None:
    """The small model of arXiv 2408.08274.

    The paper counts one of BAM's two routers among the active parameters, and leaves the shared keys and
    values out.
    """
    dense = ModelConfig(
        vocab_size=256_000, hidden_size=1024, intermediate_size=2048, num_heads=8, num_kv_heads=8,
        head_dim=128,
        layers=(LayerSpec(),) * 6, tie_embeddings=False,
    )  # fmt: skip
    names = ("seed", "code", "law", "math")
    router = 6 * 4 * 1024
    assert count_parameters(dense).total == 587_209_728
    bam = count_parameters(mixed(dense, experts=names, attention="kv-experts"))
    assert (bam.total, bam.active) == (776_002_560, 662_731_776 + router)
    btx = count_parameters(mixed(dense, experts=names))
    assert btx.total == 700_480_512
    shared = count_parameters(mixed(dense, experts=names, attention="shared-kv"))
    assert shared.active == 624_983_040 + router


def test_checkpointed_blocks_give_the_same_gradients(tiny: ModelConfig) -> None:
    config = mixed(tiny, attention="kv-experts")
    gradients = []
    tokens = torch.randint(0, 99, (2, 23))
    model = Decoder(config).train()
    for checkpointed in (False, True):
        model.gradient_checkpointing = checkpointed
        model.zero_grad()
        routings: list[Routing] = []
        loss = model(tokens, routings=routings).square().mean()
        assert len(routings) == len(config.layers)
        for routing in routings:
            assert routing.attention_logits is not None
            loss = loss + routing.probabilities[..., 0].mean() + routing.attention_logits.square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


def test_windows_hold_for_attention_experts(tiny: ModelConfig) -> None:
    """A token before the window of the only layer changes nothing in later positions."""
    config = mixed(replace(tiny, layers=hybrid_layers(1, window=7)), attention="kv-experts")
    model = Decoder(config).eval()
    tokens = torch.randint(0, 99, (1, 20))
    other = tokens.clone()
    other[0, 0] = (other[0, 0] + 1) % 99
    with torch.no_grad():
        first, second = model(tokens)[0], model(other)[0]
    assert torch.equal(first[7:], second[7:])
    assert not torch.equal(first[6], second[6])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"experts": ()}, "the mixture has no experts"),
        ({"experts": ("a", "a")}, "two experts are named 'a'"),
        ({"top_k": 4}, "top_k is 4"),
        ({"attention": "shared"}, "attention is 'shared'; did you mean 'shared-kv'"),
        ({"attention_top_k": 1}, "attention_top_k is given and the attention is averaged"),
        ({"domain_size": 0}, "domain_size is 0"),
        ({"z_loss": -1.0}, "z_loss is -1.0"),
    ],
)
def test_invalid_mixtures_are_refused(tiny: ModelConfig, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says.replace("(", r"\(")):
        mixed(tiny, **fields)


@pytest.mark.parametrize(
    ("hidden", "intermediate", "layers", "experts", "feed_forward", "dense", "active", "total"),
    [
        (1024, 2800, 16, 6, "0.138", "0.47", "0.605", "1.3"),
        (2560, 10254, 20, 4, "1.575", "2.8", "4.3", "9.1"),
    ],
)
def test_counts_of_nexus(
    hidden: int, intermediate: int, layers: int, experts: int,
    feed_forward: str, dense: str, active: str, total: str,
) -> None:  # fmt: skip
    """The sizes in billions that arXiv 2408.15901 names, rounded as there.

    Each token has the shared expert and one routed expert. The paper names no widths. Ours give a
    feed-forward of the size that follows from its numbers, (1.3 - 0.605) / 5 and (9.1 - 4.3) / 3.
    """
    config = ModelConfig(
        vocab_size=256_000, hidden_size=hidden, intermediate_size=intermediate, num_heads=8, num_kv_heads=8,
        head_dim=hidden // 8,
        layers=(LayerSpec(),) * layers,
    )  # fmt: skip
    names = tuple(f"expert-{number}" for number in range(experts))
    linear = count_parameters(mixed(config, experts=names, shared_expert=True))

    def rounded(count: int, like: str) -> str:
        return f"{count / 1e9:.{len(like.partition('.')[2])}f}"

    feed_forward_size = 3 * hidden * intermediate * layers
    assert rounded(feed_forward_size, feed_forward) == feed_forward
    assert rounded(count_parameters(config).total, dense) == dense
    assert (rounded(linear.active, active), rounded(linear.total, total)) == (active, total)
    routers = layers * hidden * experts
    assert linear.active == count_parameters(config).total + feed_forward_size + routers
    assert linear.total == linear.active + (experts - 1) * feed_forward_size
    # A Nexus router has two projections in place of a row for each expert. They are so large that the named
    # sizes can only be those of the experts.
    nexus = count_parameters(mixed(config, experts=names, shared_expert=True, domain_size=64))
    assert nexus.total - linear.total == layers * (2 * hidden * 64 + hidden**2) - routers
