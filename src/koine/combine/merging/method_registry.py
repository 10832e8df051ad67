"""The table of merge methods: each is one annotated function, entered by a decorator.

    @merge_method(source="Author et al., Title, 2024 (arXiv 0000.00000)", elementwise=True)
    def nearswap(
        tensors: Sequence[Tensor],
        *,
        t: Annotated[float, Option("How near the second model must be.", above=0)],
    ) -> Tensor:
        \"\"\"What `koine merge nearswap --help` says.\"\"\"

A method takes `tensors` (one per model, of equal shape) and those of these parameters that it needs:
`weights` (one per model), `base` (the common ancestor's tensor), `generator` (a seeded `torch.Generator`).
Its other keyword-only parameters are its options: numbers and switches of the command line and of
`koine.combine.merge`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, TypeVar, get_type_hints

from koine.errors import UserError, did_you_mean
from koine.fields import check_boolean, check_number, short_repr

if TYPE_CHECKING:
    # The command line reads options from this table: its help must not wait for torch.
    from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., "Tensor"])

MAX_VALUE = 1e30
"""Largest weight or factor: results of larger ones overflow float32."""

SUPPLIED = frozenset({"tensors", "weights", "base", "generator"})
"""Parameters that the merge itself supplies; all others are options."""


@dataclass(frozen=True)
class Option:
    """An option of a merge method: its help text and its bounds.

    Attributes:
        help: One sentence for `koine merge METHOD --help`.
        low, high: The least and the greatest value.
        above: The value must be greater than this.
    """

    help: str = ""
    low: float = -MAX_VALUE
    high: float = MAX_VALUE
    above: float | None = None


@dataclass(frozen=True)
class MergeMethod:
    """A merge method and what a merge must know of it.

    Attributes:
        name: As in `koine merge NAME`.
        function: From the models' tensors to the merged tensor.
        elementwise: Whether an entry of the result depends on the same entry of the inputs alone. The tensor
            is then merged a block of rows at a time.
        models: The least and the greatest number of models; None: no limit.
        source: The publication, for help texts and model cards.
    """

    name: str
    function: Callable[..., Tensor]
    elementwise: bool
    models: tuple[int, int | None]
    source: str

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """Return the options' parameters by name, in the order of the signature."""
        signature = inspect.signature(self.function).parameters
        return {name: parameter for name, parameter in signature.items() if name not in SUPPLIED}

    @cached_property
    def options(self) -> Mapping[str, Option]:
        """Return help and bounds of each option, by name."""
        # Where torch is imported for type checkers only, its types are left open.
        types: dict[str, object] = {"Tensor": object, "Generator": object}
        types["torch"] = SimpleNamespace(**types)
        known = self.function.__globals__
        absent = {name: one for name, one in types.items() if name not in known}
        hints = get_type_hints(self.function, localns=absent, include_extras=True)
        found = {}
        for name in self.parameters:
            metadata = getattr(hints.get(name), "__metadata__", ())
            found[name] = next((one for one in metadata if isinstance(one, Option)), Option())
        return found

    def takes(self, name: str) -> bool:
        """Return whether the function has a parameter `name`."""
        return name in inspect.signature(self.function).parameters

    def is_switch(self, name: str) -> bool:
        """Return whether an option is true or false, and no number."""
        return isinstance(self.parameters[name].default, bool)

    def check_options(self, given: Mapping[str, float | bool]) -> None:
        """Raise `UserError` for an unknown option, a missing one, or a value out of its bounds."""
        for name in given:
            if name not in self.options:
                raise UserError(f"{self.name} has no option '{name}'", hint=did_you_mean(name, self.options))
        for name, option in self.options.items():
            if name not in given:
                if self.parameters[name].default is inspect.Parameter.empty:
                    raise UserError(f"{self.name} needs --{name}", hint=f"for example --{name} 0.5")
            elif self.is_switch(name):
                check_boolean(name, given[name])
            else:
                check_number(name, given[name], low=option.low, high=option.high, above=option.above)

    def parse_options(self, texts: Sequence[str]) -> dict[str, float | bool]:
        """Return the options in texts such as `density=0.5` or `normalize=false`; raise `UserError`."""
        found: dict[str, float | bool] = {}
        for text in texts:
            name, _, value = text.partition("=")
            if name not in self.options:
                raise UserError(f"{self.name} has no option '{name}'", hint=did_you_mean(name, self.options))
            words = {"true": True, "1": True, "false": False, "0": False} if self.is_switch(name) else {}
            try:
                found[name] = words[value.lower()] if words else float(value)
            except (KeyError, ValueError):
                must = "true or false" if words else "a number"
                raise UserError(f"{name} is {short_repr(value)}", hint=f"it must be {must}") from None
        return found


METHODS: dict[str, MergeMethod] = {}
"""The merge methods by name; `merge_method` adds to it."""


def merge_method(
    *, source: str, elementwise: bool, models: tuple[int, int | None] = (1, None), name: str | None = None
) -> Callable[[Function], Function]:
    """Enter a function into the table of merge methods; the function itself stays as it is.

    Args:
        source: The publication, for help texts and model cards.
        elementwise: Whether an entry of the result depends on the same entry of the inputs alone.
        models: The least and the greatest number of models; None: no limit.
        name: The method's name; by default the function's, with `-` for `_`.
    """

    def enter(function: Function) -> Function:
        key = name or function.__name__.replace("_", "-")
        METHODS[key] = MergeMethod(key, function, elementwise, models, source)
        return function

    return enter
