"""A sweep as its yaml describes it, checked before anything starts."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..study.plan import checked_arguments, checked_arms, common_arguments, read_keys
from ..study.runs import ALWAYS, checked_run, data_files

NEEDED = ("recipe", "arms", "search", "trials")
OPTIONAL = ("set", "common", "seed")
Space = dict[str, Any]  # of one argument: {"choices": [...]}, or {"low", "high", "log"}


@dataclass(frozen=True)
class Sweep:
    """What a yaml asks for.

    Args:
        path: the yaml.
        output_dir: folder for the trials and their database.
        arms: name -> all flags of hf-al train but those that are searched.
        search: argument -> its space.
        trials: of each arm.
        seed: of the runs, and of the search.
    """

    path: Path
    output_dir: Path
    arms: dict[str, dict[str, Any]]
    search: dict[str, Space]
    trials: int
    seed: int


def read_sweep(path: str, output_dir: Path, data_dir: str | None = None, trials: int | None = None) -> Sweep:
    """The sweep of a yaml.

    Args:
        path: the yaml.
        output_dir: folder for the trials.
        data_dir: a folder for each data set; None: what the recipe names.
        trials: in place of those of the yaml.

    Raises:
        ValueError: keys, arguments, spaces or files that do not exist or do not go together.
    """
    values = read_keys(path, NEEDED, OPTIONAL)
    for key, least in (("trials", 1), ("seed", 0)):
        if key in values and (type(values[key]) is not int or values[key] < least):
            raise ValueError(f"Expected a whole number from {least} as {key} in {path}, got {values[key]!r}.")
    common = common_arguments(path, values)
    arms = checked_arms(path, values["arms"])
    recipe = Path(path).parent / str(values["recipe"])
    if not recipe.is_file():
        raise ValueError(f"Expected the recipe {recipe}, found none. Fix recipe in {path}.")
    files = data_files(data_dir, str(values.get("set") or recipe.stem.split("_")[0]))
    seed = values.get("seed", 1)
    fixed = {"config": str(recipe), **ALWAYS, **files, "do_predict": False, "seed": seed, **common}
    sweep = Sweep(
        path=Path(path),
        output_dir=output_dir,
        arms={name: {**fixed, **given} for name, given in arms.items()},
        search=_spaces(path, values["search"]),
        trials=trials or values["trials"],
        seed=seed,
    )
    _check(sweep)
    return sweep


def _spaces(path: str, given: Any) -> dict[str, Space]:
    names = checked_arguments(path, "search", given)
    return {name: _space(f"{name} in {path}", space) for name, space in names.items()}


def _space(where: str, given: Any) -> Space:
    """A list of choices, or the ends of a range."""
    if isinstance(given, list):
        if len(set(map(str, given))) < max(2, len(given)):
            raise ValueError(f"Expected two or more different values to choose from as {where}, got {given}.")
        return {"choices": given}
    keys = {"low", "high", "log"}
    if not isinstance(given, dict) or not {"low", "high"} <= given.keys() <= keys:
        raise ValueError(
            f"Expected a list of choices, or {{low: 1e-4, high: 1e-2, log: true}}, as {where}, got {given!r}."
        )
    low, high, log = given["low"], given["high"], given.get("log", False)
    numbers = all(type(v) in (int, float) and math.isfinite(v) for v in (low, high))
    if not numbers or not low < high or not isinstance(log, bool) or (log and low <= 0):
        raise ValueError(
            f"Expected numbers with low below high as {where}, above 0 for log: true, got low {low!r}, high {high!r} "
            f"and log {log!r}."
        )
    return {"low": low, "high": high, "log": log}


def as_proposed(choice: Any) -> Any:
    """A choice as Optuna keeps it: lists and mappings as json."""
    return json.dumps(choice) if isinstance(choice, list | dict) else choice


def as_chosen(sweep: Sweep, proposed: dict[str, Any]) -> dict[str, Any]:
    """The values of arguments that Optuna proposed."""
    written = {
        name: {as_proposed(choice): choice for choice in space.get("choices", ()) if isinstance(choice, list | dict)}
        for name, space in sweep.search.items()
    }
    return {name: written[name].get(value, value) for name, value in proposed.items()}


def is_whole(space: Space) -> bool:
    """Whether a range has whole numbers only: both ends are."""
    return type(space["low"]) is type(space["high"]) is int


def _some(space: Space) -> list[float]:
    """Both ends of a range, and what is between them if that may be a fraction."""
    low, high = space["low"], space["high"]
    return [low, high] if is_whole(space) else [low, high, low + 0.37 * (high - low)]


def file_name(arm: str) -> str:
    """An arm's name as part of file names."""
    return re.sub(r"\W", "_", arm)


def _check(sweep: Sweep) -> None:
    """Every arm with every choice or end of every space, one at a time: what can be in no trial is found before the
    first."""
    names = [file_name(arm) for arm in sweep.arms]
    for arm in sweep.arms:
        if names.count(file_name(arm)) > 1:
            raise ValueError(
                f"Expected arms of {sweep.path} whose names differ in letters or digits, got {arm!r} and another one. "
                "Rename it."
            )
    for arm, flags in sweep.arms.items():
        both = sorted(flags.keys() & sweep.search.keys())
        if both:
            raise ValueError(
                f"Expected {both[0]} in search of {sweep.path} or in arms and common, got it in both: every arm has to "
                "search the same ranges. Leave one of them out."
            )
        for name, space in sweep.search.items():
            for value in space.get("choices") or _some(space):
                checked_run({**flags, name: value}, f"arm {arm!r} of {sweep.path}, with {name}={value!r}")
