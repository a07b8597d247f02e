"""A study as its yaml describes it, checked before anything starts."""

import dataclasses
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arguments import TrainingArguments, named
from ..config_fields import known_fields
from ..messages import nearest
from ..own import import_own
from ..parsing import load_yaml

NEEDED = ("name", "question", "sets", "architectures", "seeds", "baseline", "arms")
OPTIONAL = ("recipes", "tune", "screen", "best_of", "common", "inside")
# Decided by the study, not by its arms
DECIDED = {
    *named("only", "showing"), *named("path", "file"), "dataset_name", "model_type", "model", "seed", "trace",
    "do_predict", "threads", "save_total_limit",
}  # fmt: skip


# The same for all arms, or they would not be judged alike
FOR_ALL = {
    "max_eval_samples", "max_predict_samples", "metric_for_best_model",
    *named("section", "data"),
} - DECIDED  # fmt: skip


@dataclass(frozen=True)
class Study:
    """What a yaml asks for.

    Args:
        path: the yaml.
        name: part of file names.
        question: one sentence.
        recipes: folder of the recipes, `SET_ARCHITECTURE.yaml`.
        sets, architectures: which of them.
        seeds: of each arm; with `screen` of the best arms only.
        tune: architecture -> the settings that every arm tries with the first seed, on each set, by name: of those, the
            other seeds get the best by validation. One without arguments, named "", if nothing is to be tuned.
        screen: the seed that all arms are run with first; None if all arms get all seeds.
        best_of: how many arms then get the other seeds, by validation, for each architecture.
        arms: name -> its arguments.
        baselines: arm -> those that it may be compared with; of several, the best by validation. The baselines
            themselves are not in it.
        common: arguments of all arms.
        inside: whether to measure what the blocks of each model hold.
    """

    path: Path
    name: str
    question: str
    recipes: Path
    sets: list[str]
    architectures: list[str]
    seeds: list[int]
    tune: dict[str, dict[str, dict[str, Any]]]
    screen: int | None
    best_of: int
    arms: dict[str, dict[str, Any]]
    baselines: dict[str, list[str]]
    common: dict[str, Any]
    inside: bool

    @property
    def first_seed(self) -> int:
        """The one that settings and arms are chosen with."""
        return self.seeds[0] if self.screen is None else self.screen


def read_study(path: str) -> Study:
    """The study of a yaml.

    Raises:
        ValueError: keys, arguments or names that do not exist or do not go together.
    """
    values = read_keys(path, NEEDED, OPTIONAL)
    for key in ("name", "question"):
        if not isinstance(values[key], str):
            raise ValueError(f"Expected text as {key} in {path}, got {values[key]!r}.")
    if not re.fullmatch(r"[\w-]+", values["name"]):
        raise ValueError(
            f"Expected a name of letters, digits, - and _ in {path}, got {values['name']!r}: it is part of file names."
        )
    common = common_arguments(path, values)
    arms, seeds = checked_arms(path, values["arms"]), _distinct(path, "seeds", values["seeds"], int)
    architectures = _distinct(path, "architectures", values["architectures"], str)
    study = Study(
        path=Path(path),
        name=values["name"],
        question=values["question"],
        recipes=Path(path).parent / str(values.get("recipes") or ".."),
        sets=_distinct(path, "sets", values["sets"], str),
        architectures=architectures,
        seeds=seeds,
        tune=_settings(path, values.get("tune") or {}, architectures, [common, *arms.values()]),
        screen=values.get("screen"),
        best_of=values.get("best_of") or 0,
        arms=arms,
        baselines=_baselines(path, values["baseline"], arms),
        common=common,
        inside=values.get("inside", False),
    )
    if not isinstance(study.inside, bool):
        raise ValueError(f"Expected true or false as inside in {path}, got {study.inside!r}.")
    _check_screen(study)
    return study


def read_keys(path: str, needed: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Any]:
    """The values of a yaml. ValueError for a key that it cannot have, or lacks."""
    values = load_yaml(path, "the path")
    for key in values:
        if key not in (*needed, *optional):
            raise ValueError(f"Unknown key {key!r} in {path}.{nearest(str(key), (*needed, *optional))}")
    missing = [key for key in needed if values.get(key) in (None, "", [], {})]
    if missing:
        raise ValueError(f"Expected {', '.join(needed)} in {path}, got no {missing[0]}. Add it.")
    return values


def common_arguments(path: str, values: dict[str, Any]) -> dict[str, Any]:
    """The arguments of all runs, under `common`. Imports the modules that they name, which may have values of their
    own."""
    common = values.get("common") or {}
    if isinstance(common, dict):  # otherwise refused below
        import_own(common.get("import_module"))
    return checked_arguments(path, "common", common)


def _distinct(path: str, key: str, values: Any, kind: type) -> Any:
    """A list of values of one kind, each once."""
    what = "names" if kind is str else "whole numbers from 0"
    good = isinstance(values, list) and all(type(value) is kind for value in values)
    if not good or (kind is int and min(values) < 0):
        raise ValueError(f"Expected a list of {what} as {key} in {path}, got {values!r}.")
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise ValueError(f"Expected each of {key} once in {path}, got {twice!r} {values.count(twice)} times.")
    return values


def checked_arms(path: str, values: Any) -> dict[str, dict[str, Any]]:
    """The arguments of each arm, by name. ValueError for two arms with the same ones, or what `checked_arguments`
    refuses."""
    if not isinstance(values, dict):
        raise ValueError(f"Expected a mapping of names to arguments as arms in {path}, got {values!r}.")
    arms: dict[str, dict[str, Any]] = {}
    for name, given in values.items():
        arguments = checked_arguments(path, f"arm {str(name)!r}", {} if given is None else given)
        same = next((other for other in arms if arms[other] == arguments), None)
        if same is not None:
            raise ValueError(
                f"Expected arms that differ in {path}, got {same!r} and {str(name)!r} with the same arguments. Leave "
                "one of them out."
            )
        arms[str(name)] = arguments
    return arms


def checked_arguments(path: str, where: str, values: Any) -> dict[str, Any]:
    """Arguments of hf-al train and config values, by name. ValueError for what is neither, or not for an arm to say."""
    if not isinstance(values, dict):
        raise ValueError(f"Expected a mapping of arguments as {where} in {path}, got {values!r}.")
    known = [f.name for f in dataclasses.fields(TrainingArguments)]
    known += [name for fields in known_fields().values() for name in fields]
    for name in values:
        if name in DECIDED:
            raise ValueError(
                f"Expected no {name} in {where} of {path}, got one: it is decided for all runs. Leave it out."
            )
        if name in FOR_ALL and where != "common":
            raise ValueError(
                f"Expected no {name} in {where} of {path}, got one: arms have to be judged alike. Put it in common."
            )
        if name not in known:
            raise ValueError(f"Unknown argument {name!r} in {where} of {path}.{nearest(str(name), known)}")
    return values


def _settings(
    path: str, given: Any, architectures: list[str], others: list[dict[str, Any]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """For each architecture all combinations of the values that `tune` lists, by name; `others` are the arguments that
    must not name them too."""
    if not isinstance(given, dict):
        raise ValueError(f"Expected a mapping of architectures to arguments as tune in {path}, got {given!r}.")
    settings: dict[str, dict[str, dict[str, Any]]] = {name: {"": {}} for name in architectures}
    for architecture, values in given.items():
        if architecture not in architectures:
            close = nearest(str(architecture), architectures)
            raise ValueError(f"Expected architectures in tune of {path}, got {architecture!r}.{close}")
        for name, choices in checked_arguments(path, f"tune of {architecture}", values).items():
            if not isinstance(choices, list) or len({str(choice) for choice in choices}) < max(2, len(choices)):
                raise ValueError(
                    f"Expected a list of different values for {name} in tune of {path}, got {choices!r}. An argument "
                    "with one value goes into common."
                )
            if any(name in arguments for arguments in others):
                raise ValueError(
                    f"Expected {name} in tune of {path} or in arms and common, got it in both. Leave one of them out."
                )
        combined = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
        settings[architecture] = {", ".join(f"{n}={v}" for n, v in setting.items()): setting for setting in combined}
    return settings


def _baselines(path: str, given: Any, arms: Mapping[str, Any]) -> dict[str, list[str]]:
    """For each arm those that it may be compared with: one for all, the best of a list, or one of its own."""
    pairs = {str(arm): str(other) for arm, other in given.items()} if isinstance(given, dict) else {}
    candidates = list(pairs.values()) if pairs else list(map(str, given if isinstance(given, list) else [given]))
    for name in [*candidates, *pairs]:
        if name not in arms:
            raise ValueError(f"Expected an arm as baseline in {path}, got {name!r}.{nearest(name, arms)}")
    others = [arm for arm in arms if arm not in candidates]
    if not others:
        raise ValueError(f"Expected arms beside the baseline in {path}, got none. Add some.")
    if not pairs:
        return dict.fromkeys(others, candidates)
    wrong = next((arm for arm in arms if (arm in pairs) == (arm in candidates)), None)
    if wrong is not None:
        raise ValueError(
            f"Expected each arm in {path} to have a baseline or to be one, got "
            f"{'both' if wrong in pairs else 'neither'} for {wrong!r}."
        )
    return {arm: [pairs[arm]] for arm in others}


def _check_screen(study: Study) -> None:
    screen, path = study.screen, study.path
    if (screen is None) != (study.best_of == 0):
        raise ValueError(f"Expected screen and best_of together in {path}, got one of them. Add the other.")
    if screen is None:
        if any(len(candidates) > 1 for candidates in study.baselines.values()):
            raise ValueError(
                f"Expected screen with several baselines in {path}, got none: the best of them is chosen by it. Add "
                "screen and best_of, or name one baseline."
            )
        return
    if type(screen) is not int or screen not in study.seeds or len(study.seeds) < 2:
        raise ValueError(f"Expected screen to be one of several seeds in {path}, got {screen!r} and {study.seeds}.")
    most = len(study.baselines) - 1
    if most < 1:
        raise ValueError(
            f"Expected at least two arms beside the baselines with screen in {path}, got {len(study.baselines)}. Leave "
            "screen and best_of out."
        )
    if type(study.best_of) is not int or not 1 <= study.best_of <= most:
        raise ValueError(
            f"Expected best_of from 1 to {most} in {path}, fewer than the arms beside the baselines, got "
            f"{study.best_of!r}. To give all arms all seeds, leave screen and best_of out."
        )
