"""The training runs of a study, with all their arguments, and which of them are needed."""

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ..arguments import TrainingArguments, named
from ..config_fields import config_values
from ..early import check_training
from ..metrics import SMALLER_IS_BETTER
from ..parsing import resolve
from .plan import DECIDED, Study

# One thread, so that runs beside each other compute what each computes alone
ALWAYS = {"threads": 1, "plots": False, "disable_tqdm": True, "save_total_limit": 1}


class Key(NamedTuple):
    """Which run of a study. `setting` names the values of tuned arguments, as in `Study.tune`."""

    set: str
    architecture: str
    arm: str
    seed: int
    setting: str = ""

    def __str__(self) -> str:
        setting = f", {self.setting}" if self.setting else ""
        return f"{self.set} {self.architecture}, {self.arm}{setting}, seed {self.seed}"


Rows = Mapping[Key, dict[str, Any]]  # of finished runs, see results.py


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        key: which one.
        flags: those of hf-al train.
        model_type: its architecture.
        arguments: all that may change its result, by name; config values are `model.NAME`.
        folder: where it trains.
        inside: whether to measure what the blocks of the model hold.
    """

    key: Key
    flags: dict[str, Any]
    model_type: str
    arguments: dict[str, Any]
    folder: Path
    inside: bool = False


def all_runs(study: Study, output_dir: Path, data_dir: str | None = None) -> dict[Key, Run]:
    """Every run that a study may need, all of them checked.

    Args:
        study: its yaml.
        output_dir: folder for what the runs leave.
        data_dir: a folder for each data set; None: what the recipes name.

    Raises:
        ValueError: recipes, values or files that do not exist or cannot work.
    """
    runs: dict[Key, Run] = {}
    for name in study.sets:
        files = data_files(data_dir, name)
        for architecture in study.architectures:
            recipe = study.recipes / f"{name}_{architecture}.yaml"
            if not recipe.is_file():
                raise ValueError(
                    f"Expected the recipe {recipe}, found none. Fix recipes, sets or architectures in {study.path}."
                )
            tried = study.tune[architecture].items()
            for (arm, given), (setting, values) in itertools.product(study.arms.items(), tried):
                flags = {"config": str(recipe), **ALWAYS, **files, **study.common, **given, **values}
                args = checked_run({**flags, "seed": max(study.seeds)}, f"arm {arm!r} of {study.path} with {recipe}")
                for seed in study.seeds:
                    key = Key(name, architecture, arm, seed, setting)
                    runs[key] = _run(key, flags, args, output_dir, study.inside)
    return runs


def checked_run(flags: dict[str, Any], what: str) -> TrainingArguments:
    """The arguments of a run of one process, which has no output folder yet.

    Raises:
        ValueError: values that do not exist or cannot work; `what` says whose.
    """
    try:
        args = resolve({**flags, "print_config": True})
        check_training(args, is_main=False)
        if args.processes > 1:
            raise ValueError(f"Expected runs of one process, got {args.processes}. Leave stages out.")
        if args.streaming:
            raise ValueError(
                "Expected no streaming in a study or a sweep, got it: their data is read whole, and runs of a study "
                "are also judged on rows of train. Leave it out."
            )
    except ValueError as error:
        raise ValueError(f"{error} ({what})") from None
    return args


def data_files(data_dir: str | None, name: str) -> dict[str, str]:
    """The files of a data set by the name of their argument; none if the recipe's own data is to be loaded.

    Args:
        data_dir: has a folder for each set, such as `trec6` or `dbpedia14_subset` for dbpedia, with train, test and
            optionally validation as csv or csv.gz.
        name: of the set.

    Raises:
        ValueError: no such folder, several of them, or one without train and test.
    """
    if data_dir is None or name == "tweets":
        return {}
    of_set = re.compile(rf"{re.escape(name)}([\d_-].*)?")
    folders = sorted(path for path in Path(data_dir).glob("*") if path.is_dir() and of_set.fullmatch(path.name))
    if len(folders) != 1:
        found = f"{len(folders)}: {', '.join(path.name for path in folders)}" if folders else "none"
        raise ValueError(f"Expected one folder for {name} in {data_dir}, found {found}. Check --data_dir.")
    files = {split: sorted(folders[0].glob(f"{split}.csv*")) for split in ("train", "validation", "test")}
    if not (files["train"] and files["test"]):
        raise ValueError(
            f"Expected train.csv and test.csv in {folders[0]}, also .gz, found not both. Check --data_dir."
        )
    return {f"{split}_file": str(found[0]) for split, found in files.items() if found}


def _run(key: Key, flags: dict[str, Any], args: TrainingArguments, output_dir: Path, inside: bool) -> Run:
    arguments = _flat(args.to_dict(), config_values(args.model_type, args.model))
    digest = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()[:8]
    folder = output_dir / "runs" / re.sub(r"[^\w.-]+", "-", "_".join(map(str, (*key, digest))))
    flags = {**flags, "seed": key.seed, "output_dir": str(folder)}
    return Run(key, flags, args.model_type, arguments, folder, inside)


def defaults(model_type: str) -> dict[str, Any]:
    """The arguments of a run for which nobody sets any, by name."""
    values = {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(TrainingArguments)
    }
    return _flat(values, config_values(model_type, {}))


def _flat(values: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """The values that may change a result, as json knows them. Where the data is may not: its fingerprint says what it
    is."""
    skipped = {*DECIDED, *named("section", "data"), *named("only", "output", "machine")}
    skipped |= {"import_module"}
    skipped -= {"validation_fraction", "validation_seed"}
    kept = {name: value for name, value in values.items() if name not in skipped}
    found: dict[str, Any] = json.loads(json.dumps({**kept, **{f"model.{name}": v for name, v in model.items()}}))
    return found


# --- which of them are needed


def planned(study: Study, rows: Rows) -> list[Key]:
    """The runs that are needed, as far as the finished ones tell, set by set. All arms are run with the first seed, in
    every setting; the other seeds are for the best setting and, of a study with `screen`, for the best arms and the
    baselines."""
    first, done = study.first_seed, settled(study, rows)
    screened = study.screen is not None
    chosen = {kind: _finalists(study, done, kind) if screened else set(study.arms) for kind in study.architectures}
    keys = []
    for name in study.sets:
        for seed in sorted(study.seeds, key=lambda seed: seed != first):
            for architecture, arm in itertools.product(study.architectures, study.arms):
                if seed == first:
                    settings = list(study.tune[architecture])
                else:
                    best = best_setting(study, rows, name, architecture, arm)
                    settings = [best] if best is not None and arm in chosen[architecture] else []
                keys += [Key(name, architecture, arm, seed, setting) for setting in settings]
    return keys


def best_setting(study: Study, rows: Rows, name: str, architecture: str, arm: str) -> str | None:
    """The best setting of an arm on a set, by what validation says of the first seed; None until all of them are done,
    and if all failed. Nothing of test is looked at."""
    settings = list(study.tune[architecture])
    if len(settings) == 1:
        return settings[0]
    found = {setting: rows.get(Key(name, architecture, arm, study.first_seed, setting)) for setting in settings}
    done = {setting: row for setting, row in found.items() if row is not None}
    if len(done) < len(settings) or all("error" in row for row in done.values()):
        return None
    return max(done, key=lambda setting: _score(done[setting]))


def settled(study: Study, rows: Rows) -> dict[Key, dict[str, Any]]:
    """The rows of the best settings, by keys without a setting."""
    best = {
        (name, architecture, arm): best_setting(study, rows, name, architecture, arm)
        for name, architecture, arm in itertools.product(study.sets, study.architectures, study.arms)
    }
    return {key._replace(setting=""): row for key, row in rows.items() if best.get(key[:3]) == key.setting}


def _score(row: dict[str, Any]) -> float:
    """What validation says of a run, more is better."""
    if "error" in row:
        return -math.inf
    return float(-row["validation"] if row["metric"] in SMALLER_IS_BETTER else row["validation"])


def _finalists(study: Study, done: Rows, architecture: str) -> set[str]:
    """The arms that get all seeds."""
    best = ranked(study, done, architecture, list(study.baselines))[: study.best_of]
    references = [reference(study, done, architecture, arm) for arm in study.baselines]
    return {arm for arm in [*best, *references] if arm is not None}


def reference(study: Study, done: Rows, architecture: str, arm: str) -> str | None:
    """The baseline that an arm is compared with; None for a baseline, and while it is not known.

    Args:
        done: settled rows.
    """
    candidates = study.baselines.get(arm, [])
    if len(candidates) > 1:
        candidates = ranked(study, done, architecture, candidates)
    return candidates[0] if candidates else None


def ranked(study: Study, done: Rows, architecture: str, arms: list[str]) -> list[str]:
    """The arms by what validation says of the screening seed, as the mean over all sets, best first; none until all of
    these runs are done. Arms with a run that failed are left out. Nothing of test is looked at.

    Args:
        done: settled rows.
    """
    assert study.screen is not None
    scores = {}
    for arm in arms:
        keys = [Key(name, architecture, arm, study.screen) for name in study.sets]
        if any(key not in done for key in keys):
            return []
        scores[arm] = fmean(_score(done[key]) for key in keys)
    return sorted((arm for arm in arms if scores[arm] > -math.inf), key=lambda arm: scores[arm], reverse=True)
