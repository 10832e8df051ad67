"""Rewards of users: functions of their own modules."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from koine.align.rewards.reward import Conversation, Record, Reward, RewardFailure
from koine.errors import UserError, did_you_mean, first_line


def load_function(text: str, settings: Mapping[str, Any]) -> Reward:
    """Return the reward of `module:function`; an error that the function raises is a failure of the completion.

    Args:
        text: module and function. The module is looked for as by `python -m`, the current folder first.
        settings: keyword arguments of the function.

    Raises:
        UserError: the module cannot be imported, has no such function, or the function takes other arguments.
    """
    module_name, _, name = text.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module raises when it is imported
        raise UserError(
            f"the module '{module_name}' of the reward '{text}' cannot be imported "
            f"({type(error).__name__}: {first_line(error)})",
            hint="start in the folder of the module, or set PYTHONPATH",
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise UserError(
            f"the module '{module_name}' has no function '{name}'", hint=did_you_mean(name, known)
        )
    try:
        inspect.signature(function).bind([], "", {}, **settings)
    except TypeError as error:
        raise UserError(
            f"the reward '{text}' cannot be called: {error}",
            hint="it must be a function (conversation, completion, record) -> float, with the settings as keywords",
        ) from error
    return functools.partial(_call, function, dict(settings))


def _call(
    function: Callable[..., float],
    settings: dict[str, Any],
    conversation: Conversation,
    completion: str,
    record: Record,
) -> float:
    try:
        return function(conversation, completion, record, **settings)
    except (RewardFailure, UserError):
        raise
    except Exception as error:  # a user's function may raise anything: the failure is counted, with its text
        raise RewardFailure(f"{type(error).__name__}: {first_line(error)}") from error
