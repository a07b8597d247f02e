"""Lets a test act before and after a call, without replacing what is called."""

import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest


def named(function: Callable, args: tuple, kwargs: dict) -> SimpleNamespace:
    """The arguments of a call by name, `self` among them, in whatever order they are passed."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return SimpleNamespace(**bound.arguments)


def hook(patch: pytest.MonkeyPatch, owner: Any, name: str, before: Any = None, after: Any = None) -> None:
    """Calls `before(call)` before `owner.name` and `after(call)` after it; `call.result` is what it returned."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def hooked(*args, **kwargs):
        call = named(function, args, kwargs)
        if before is not None:
            before(call)
        call.result = function(*args, **kwargs)
        if after is not None:
            after(call)
        return call.result

    patch.setattr(owner, name, hooked)
