"""Values of arguments and config fields, converted to the annotated type."""

import logging
import os
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml

logger = logging.getLogger(__name__)


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def capped(flag: str, wanted: int) -> int:
    """At most as many as there are cores; a warning says so."""
    cores = available_cores()
    if wanted > cores:
        logger.warning("--%s %d is more than this machine has: %d.", flag, wanted, cores)
    return min(wanted, cores)


def union_members(kind: Any) -> list[Any]:
    return (
        list(typing.get_args(kind))
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
        else [kind]
    )


def type_name(kind: Any) -> str:
    """As a user reads it: `float or list[float]`."""
    members = [member for member in union_members(kind) if member is not type(None)]
    if len(members) > 1:
        return " or ".join(map(type_name, members))
    kind = members[0]
    if typing.get_origin(kind):
        return str(kind)
    return getattr(kind, "__name__", str(kind))


def _parse_bool(text: str) -> bool:
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise ValueError(text)


def convert(value: Any, kind: Any) -> Any:
    """`value` as the annotated type; strings are read as numbers and booleans (`1e-4` in YAML is a string)."""
    members = union_members(kind)
    if value is None:
        if type(None) in members:
            return None
        raise TypeError(value)
    for member in (m for m in members if m is not type(None)):
        origin = typing.get_origin(member) or member
        try:
            if origin is bool:
                return value if isinstance(value, bool) else _parse_bool(value)
            if origin in (int, float):
                if isinstance(value, bool) or (origin is int and isinstance(value, float) and value != int(value)):
                    continue
                return origin(value)
            if origin is str and isinstance(value, (str, Path)):
                return str(value)
            if origin is list:
                read = value
                if isinstance(value, str) and member == list[str] and not value.startswith("["):  # 2019 is a name, too
                    read = names_in(value)
                elif isinstance(value, str):  # 1,2 or [1, 2]
                    read = yaml.safe_load(value if value.startswith("[") else f"[{value}]")
                items = read if isinstance(read, list) else [read]
                return [convert(item, typing.get_args(member)[0]) for item in items]
            if origin is dict:
                if isinstance(value, str):  # a=1,b=true or {"a": 1}
                    value = yaml.safe_load(value if value.startswith("{") else "{" + value.replace("=", ": ") + "}")
                return {k: _number(v) for k, v in dict(value).items()}
        except (TypeError, ValueError, AttributeError, OverflowError, yaml.YAMLError):
            continue
    raise TypeError(value)


def _number(value: Any) -> Any:
    """YAML reads 1e-4 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


YAML_FLOAT = re.compile(  # of YAML 1.2, as parsing.py reads it
    r"^([-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan)$"
)


def names_in(text: str | None) -> list[str]:
    """The names in a text that separates them by commas."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def numbers(value: Any) -> list[float]:
    """The numbers in an argument that is a number, a list of numbers, or None."""
    return value if isinstance(value, list) else [] if value is None else [value]
