"""The table of recipes: the plans that ship with Koine."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

from koine.errors import UserError, did_you_mean
from koine.plan.formatting import table
from koine.plan.loading import load_plan_function


class Recipe(NamedTuple):
    """Module and name of a plan function, and one line about it."""

    module: str
    function: str
    summary: str


RECIPES: dict[str, Recipe] = {
    "adaptation": Recipe(
        "koine.recipes.adaptation", "adaptation", "Adapt your model to languages that it does not know."
    ),
    "branch_train_mix": Recipe(
        "koine.recipes.branch_train_mix",
        "branch_train_mix",
        "Train one expert per domain; make a mixture of experts.",
    ),
    "extend": Recipe(
        "koine.recipes.context_extension",
        "extend",
        "Give your model a longer context, in stages.",
    ),
    "merge_touch_up": Recipe(
        "koine.recipes.merge_touch_up",
        "merge_touch_up",
        "Merge models, then train the merged model a little.",
    ),
    "profile": Recipe("koine.recipes.profile", "profile", "Show how well your models serve each language."),
    "quickstart": Recipe(
        "koine.recipes.quickstart",
        "quickstart",
        "Train a small chat model and compare two tokenizers.",
    ),
}


def find_plan(text: str) -> Callable[..., None]:
    """Return the plan function of a recipe's name or of `path/to/file.py:function`.

    Raises `UserError` for an unknown recipe, and for a file without that function.
    """
    if ":" in text or text.endswith(".py"):
        return load_plan_function(text)
    if text not in RECIPES:
        raise UserError(f"unknown recipe '{text}'", hint=did_you_mean(text, RECIPES))
    recipe = RECIPES[text]
    function: Callable[..., None] = getattr(importlib.import_module(recipe.module), recipe.function)
    return function


def recipe_list() -> list[str]:
    """Return the lines of a table of all recipes."""
    rows = [("recipe", "what it does"), *((name, recipe.summary) for name, recipe in RECIPES.items())]
    return table(rows)
