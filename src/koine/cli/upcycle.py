"""`koine upcycle` and `koine extend`: make a mixture of experts, add an expert, remove one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from koine.cli.answers import print_answer
from koine.cli.arguments import MODEL, SOURCE, model_argument, named_paths
from koine.cli.commands import Command
from koine.cli.groups import HelpGroup
from koine.cli.outputs import OVERWRITE, OutputFolder
from koine.cli.recording import recorded_output
from koine.errors import UserError
from koine.model.moe.loss_weights import BAM, BTX, NEXUS, RouterLosses
from koine.terminal import note

if TYPE_CHECKING:
    from koine.model.config import ModelConfig
    from koine.plan.store.recording import Parents


class _RandomSeed(click.IntRange):
    """The type of `--seed`, which was the option of the seed model in version 0.1.0."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            if str(value).lstrip("+-").isdigit():
                raise
            raise UserError(
                f"--seed is '{value}', and the random seed is an integer",
                hint=f"a seed model is given as --seed-model {value}",
            ) from None


SEED_MODEL = click.option(
    "--seed-model",
    "seed_model",
    type=MODEL,
    required=True,
    help="The dense model that the experts branched from.",
)
EXPERTS = click.option(
    "--experts",
    type=SOURCE,
    multiple=True,
    required=True,
    metavar="[NAME=]MODEL...",
    help="Branches of the seed, separated by spaces.",
)
MORE = click.argument("more", type=SOURCE, nargs=-1, metavar="[EXPERT]...")


def OUT(command: Callable[..., Any]) -> Callable[..., Any]:  # noqa: N802 - an option like the others
    """Add `--out` and `--overwrite` to a command."""
    out = click.option("--out", type=OutputFolder(), required=True, help="Folder to write to.")
    return out(OVERWRITE(command))


TOP_K = click.option(
    "--top-k",
    type=click.IntRange(1),
    help="Feed-forward experts of each token.  [default: 1; 2 for Gemma and OLMo-2]",
)
NORMALISE = click.option(
    "--normalise-top-k",
    is_flag=True,
    help="Divide the gates of a token by their sum, as Mixtral does; needs a --top-k of 2 or more.",
)


def losses(method: RouterLosses) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the options of a method's router losses."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        balance = click.option(
            "--load-balancing",
            type=float,
            default=method.load_balancing,
            show_default=True,
            help="Factor of the load-balancing loss.",
        )
        z_loss = click.option(
            "--z-loss",
            type=float,
            default=method.z_loss,
            show_default=True,
            help="Factor of the router z-loss.",
        )
        return balance(z_loss(function))

    return add


SEED = click.option(
    "--seed",
    type=_RandomSeed(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Random seed for the routers' weights.",
)


@click.group(cls=HelpGroup)
def upcycle() -> None:
    """Make a mixture of experts from a seed and its branches, dense models of equal shape.

    Experts have the names of their folders, or those given as NAME=MODEL.
    """


@upcycle.command()
@SEED_MODEL
@EXPERTS
@MORE
@OUT
@TOP_K
@NORMALISE
@losses(BTX)
@SEED
def btx(
    seed_model: Path, experts: tuple[str, ...], more: tuple[str, ...], out: Path, top_k: int | None,
    normalise_top_k: bool, load_balancing: float, z_loss: float, seed: int, overwrite: bool,
) -> None:  # fmt: skip
    """Make a feed-forward expert of each model, the seed too, and average the rest (branch-train-mix)."""
    from koine.combine import upcycle_btx
    from koine.files import atomic_directory

    named = _named((*experts, *more))
    parents: Parents = {"seed": seed_model, "experts": named.values()}
    with (
        recorded_output(out, parents),
        atomic_directory(out, overwrite=overwrite, reads=[seed_model, *named.values()]) as folder,
    ):
        config = upcycle_btx(
            seed_model, named, folder, top_k=top_k, normalise_top_k=normalise_top_k, random_seed=seed,
            load_balancing=load_balancing, z_loss=z_loss,
        )  # fmt: skip
    _report(config, out)


@upcycle.command()
@SEED_MODEL
@EXPERTS
@MORE
@OUT
@TOP_K
@NORMALISE
@click.option(
    "--attention", type=click.Choice(["kv-experts", "shared-kv"]), default="kv-experts", show_default=True,
    help="Keys and values: one set for each attention expert, or one average.",
)  # fmt: skip
@click.option(
    "--attention-top-k",
    type=click.IntRange(1),
    help="Attention experts of each token; other gates are 0.  [default: all]",
)
@losses(BAM)
@SEED
def bam(
    seed_model: Path, experts: tuple[str, ...], more: tuple[str, ...], out: Path, top_k: int | None,
    normalise_top_k: bool, attention: str, attention_top_k: int | None, load_balancing: float, z_loss: float, seed: int, overwrite: bool,
) -> None:  # fmt: skip
    """Make a feed-forward expert and an attention expert of each model, the seed too (BAM)."""
    from koine.combine import upcycle_bam
    from koine.files import atomic_directory

    named = _named((*experts, *more))
    parents: Parents = {"seed": seed_model, "experts": named.values()}
    with (
        recorded_output(out, parents),
        atomic_directory(out, overwrite=overwrite, reads=[seed_model, *named.values()]) as folder,
    ):
        config = upcycle_bam(
            seed_model, named, folder, attention=attention, attention_top_k=attention_top_k,
            top_k=top_k, normalise_top_k=normalise_top_k, random_seed=seed,
            load_balancing=load_balancing, z_loss=z_loss,
        )  # fmt: skip
    _report(config, out)


@upcycle.command()
@SEED_MODEL
@EXPERTS
@MORE
@OUT
@click.option(
    "--domain-text",
    "domains",
    type=SOURCE,
    multiple=True,
    metavar="NAME=DATA",
    help="Text of an expert's domain; one for each expert.  [required without --router linear]",
)
@click.option("--router", type=click.Choice(["domains", "linear"]), default="domains", show_default=True,
              help="Router by domain embeddings, or linear: the paper's baseline.")  # fmt: skip
@click.option(
    "--encoder", default="tfidf", show_default=True,
    help="Encoder of the domains: tfidf, svd, hidden (the seed's states), or a sentence-transformers folder.",
)  # fmt: skip
@click.option(
    "--domain-size",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Dimensions of tfidf and svd embeddings.",
)
@click.option(
    "--documents",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Documents read of each domain.",
)
@TOP_K
@NORMALISE
@losses(NEXUS)
@SEED
def nexus(
    seed_model: Path, experts: tuple[str, ...], more: tuple[str, ...], out: Path, domains: tuple[str, ...],
    router: str, encoder: str, domain_size: int, documents: int, top_k: int | None,
    normalise_top_k: bool, load_balancing: float, z_loss: float, seed: int, overwrite: bool,
) -> None:  # fmt: skip
    """Share the seed's feed-forward, and route to those of the branches by domain embeddings (Nexus)."""
    from koine.combine import fit_encoder, upcycle_nexus
    from koine.combine.moe.domain_embeddings import domain_embedding
    from koine.files import atomic_directory
    from koine.model.formats.mixture_files import DOMAIN_ENCODER

    named = _named((*experts, *more))
    embeddings: Any = None
    fitted: Any = None
    if router == "domains":
        import torch

        texts = _domain_texts(domains, list(named), documents)
        fitted = fit_encoder(encoder, texts, seed_model=seed_model, width=domain_size, random_seed=seed)
        embeddings = torch.stack([domain_embedding(fitted, texts[name]) for name in named])
    elif domains:
        raise UserError(
            "--domain-text is given and the router is linear", hint="leave it out, or --router domains"
        )
    parents: Parents = {"seed": seed_model, "experts": named.values(), "domain texts": _paths(domains)}
    with (
        recorded_output(out, parents),
        atomic_directory(out, overwrite=overwrite, reads=[seed_model, *named.values()]) as folder,
    ):
        config = upcycle_nexus(
            seed_model, named, folder, domains=embeddings, top_k=top_k, normalise_top_k=normalise_top_k,
            random_seed=seed, load_balancing=load_balancing, z_loss=z_loss,
        )  # fmt: skip
        if fitted is not None:
            (folder / DOMAIN_ENCODER).mkdir()
            fitted.save(folder / DOMAIN_ENCODER)
    _report(config, out)


@click.command(cls=Command)
@click.argument("mixture", type=MODEL)
@click.option(
    "--expert",
    type=SOURCE,
    metavar="[NAME=]MODEL",
    help="Branch to add; with --remove, the branch that the expert came from.  [required without --remove]",
)
@click.option(
    "--domain-text",
    "domain",
    type=click.Path(path_type=Path),
    help="Text of the new expert's domain.  [required for a Nexus router]",
)
@click.option("--remove", metavar="NAME", help="Expert to remove.  [required without --expert]")
@OUT
@click.option(
    "--share", type=float, help="Weight of the new model in the averages.  [default: 1 / (experts + 1)]"
)
@click.option("--reset-router", is_flag=True, help="Initialise the routers again, as linear ones need.")
@click.option(
    "--documents",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Documents read of the domain.",
)
@SEED
def extend(
    mixture: Path, expert: str | None, domain: Path | None, remove: str | None, out: Path,
    share: float | None, reset_router: bool, documents: int, seed: int, overwrite: bool,
) -> None:  # fmt: skip
    """Add a dense branch to MIXTURE as an expert, or remove an expert. The router is not trained."""
    from koine.combine import add_expert, remove_expert
    from koine.files import atomic_directory

    if expert is None and remove is None:
        raise UserError("nothing to do", hint="give --expert MODEL to add one, or --remove NAME")
    if remove is not None:
        for name, given in (
            ("--domain-text", domain),
            ("--share", share),
            ("--reset-router", reset_router or None),
        ):
            if given is not None:
                raise UserError(f"{name} is given with --remove", hint="leave it out")
        dense = None if expert is None else Path(_named((expert,)).popitem()[1])
        reads = [mixture] if dense is None else [mixture, dense]
        parents = {"mixture": mixture, "expert": dense}
        with (
            recorded_output(out, parents),
            atomic_directory(out, overwrite=overwrite, reads=reads) as folder,
        ):
            config = remove_expert(mixture, remove, folder, dense=dense)
    else:
        assert expert is not None
        [(name, path)] = _named((expert,)).items()
        texts = None if domain is None else _texts(domain, documents)
        parents = {"mixture": mixture, "expert": path, "domain text": domain}
        with (
            recorded_output(out, parents),
            atomic_directory(out, overwrite=overwrite, reads=[mixture, path]) as folder,
        ):
            config = add_expert(
                mixture, path, folder, name=name, texts=texts, share=share, reset_router=reset_router,
                random_seed=seed,
            )  # fmt: skip
    _report(config, out)


def _named(given: tuple[str, ...]) -> dict[str, Path]:
    """Return the models by name: the part before `=`, or the name of the folder."""
    paths = named_paths(
        given,
        what="experts",
        hint="name them: --experts code=A --experts law=B",
        name_of=_expert_name,
    )
    return {name: model_argument(path) for name, path in paths.items()}


def _expert_name(path: Path) -> str:
    """Return the name of a model's folder; of `BASE+ADAPTER` the adapter's, which tells branches apart."""
    if "+" in path.name and not path.exists():
        return Path(str(path).rpartition("+")[2]).resolve().name
    return path.resolve().name


def _paths(given: tuple[str, ...]) -> list[str]:
    """Return the paths of texts `NAME=DATA`."""
    return [one.partition("=")[2] for one in given]


def _domain_texts(given: tuple[str, ...], experts: list[str], documents: int) -> dict[str, list[str]]:
    from koine.errors import did_you_mean

    texts: dict[str, list[str]] = {}
    for one in given:
        name, equals, path = one.partition("=")
        if not equals:
            raise UserError(f"'{one}' is not NAME=DATA", where="--domain-text")
        if name not in experts:
            raise UserError(
                f"no expert is named '{name}'", where="--domain-text", hint=did_you_mean(name, experts)
            )
        texts.setdefault(name, []).extend(_texts(Path(path), documents))
    missing = [name for name in experts if name not in texts]
    if missing:
        raise UserError(
            f"no text of the domain of '{missing[0]}'",
            hint=f"add --domain-text {missing[0]}=DATA, or --router linear",
        )
    return texts


def _texts(path: Path, documents: int) -> list[str]:
    from itertools import islice

    from koine.data import read_records

    def text(record: dict[str, Any]) -> str:
        if "text" in record:
            return str(record["text"])
        return "\n".join(str(message["content"]) for message in record["messages"])

    return [text(record) for record in islice(read_records(path, split="all", carry=()), documents)]


def _report(config: ModelConfig, out: Path) -> None:
    """Print experts and parameters."""
    from koine.combine.moe.upcycle import single_gate_cancels
    from koine.model.counting import count_parameters
    from koine.model.formats.config_json import model_type

    assert config.mixture is not None
    parameters, experts = count_parameters(config), config.mixture.experts
    print_answer(
        {
            "experts": experts,
            "parameters": parameters.total,
            "active_parameters": parameters.active,
            "model_type": model_type(config),
            "written": out,
        },
        lambda: note(
            f"{len(experts)} experts ({', '.join(experts)}): {parameters.total:,} parameters, "
            f"{parameters.active:,} of them active for a token; written to {out} as {model_type(config)}"
        ),
    )
    if single_gate_cancels(config):
        note(
            "the norm after the feed-forward cancels the gate of a single expert, so the router learns from its "
            "losses only; --top-k 2 trains it"
        )
