"""The trials of a sweep: asked of Optuna, trained in other processes, kept in a database.

Only this process talks to the database. A trial says how it does after each evaluation, and ends there if its best
value so far is worse than the median of what completed trials had after as many.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from ..arguments import named
from ..config_fields import config_values
from ..data import sources
from ..data.labels import problem_type_of
from ..metrics import SMALLER_IS_BETTER, chosen_metric
from ..parsing import resolve
from ..study.execution import clear, quiet, train_on
from ..study.workers import Workers, answer_tasks
from ..training.setup import check_model
from .plan import Space, Sweep, as_chosen, as_proposed, file_name, is_whole

DATABASE = "sweep.db"
UNPRUNED = 5  # trials of an arm that are complete before any is ended early
MOST_STARTS = 5  # of a trial that ends its process

logger = logging.getLogger(__name__)


class Pruned(Exception):
    """This trial is worse than the median of the completed ones."""


@dataclass(frozen=True)
class Trial:
    """A setting of an arm that is under way.

    Args:
        arm: which one.
        asked: Optuna's trial.
        flags: those of hf-al train.
    """

    arm: str
    asked: optuna.Trial
    flags: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.arm}, trial {self.asked.number}"


# --- the database


def open_studies(sweep: Sweep) -> dict[str, optuna.Study]:
    """Optuna's study of each arm, with the trials so far. Those that were interrupted will be the next ones.

    Raises:
        ValueError: a database of another sweep, or one that cannot be read.
    """
    sweep.output_dir.mkdir(parents=True, exist_ok=True)
    path = (sweep.output_dir / DATABASE).resolve()
    direction, fingerprints = _looked_at(sweep)
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
        studies = {
            arm: optuna.create_study(storage=storage, study_name=arm, direction=direction, load_if_exists=True)
            for arm in sweep.arms
        }
        trials = {arm: study.get_trials(deepcopy=False) for arm, study in studies.items()}
    except Exception as error:  # of every kind: sqlite's, sqlalchemy's, alembic's
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"Expected the database of a sweep in {path}, got something else: {reason}. Pass another --output_dir."
        ) from error
    for arm, study in studies.items():
        _refuse_another(sweep, arm, study, fingerprints[arm])
        # one that went on with the same seed would propose what it has proposed before
        study.sampler = optuna.samplers.TPESampler(seed=sweep.seed + len(trials[arm]))
        study.pruner = optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED)
        for trial in trials[arm]:
            if trial.state == TrialState.RUNNING:
                _begin_again(study, trial)
    _refuse_fewer(sweep, studies)
    return studies


def _refuse_fewer(sweep: Sweep, studies: dict[str, optuna.Study]) -> None:
    """Arms that have had more trials than the others will get would be judged by the best of more."""
    most, arm = max((len(finished(study)), arm) for arm, study in studies.items())
    if most > sweep.trials:
        raise ValueError(
            f"Expected at least {most} trials, which the arm {arm!r} has had, got {sweep.trials}. Pass --trials {most}."
        )


def _begin_again(study: optuna.Study, trial: FrozenTrial) -> None:
    """A trial that was interrupted: the next one has its settings and its folder, unless it ends its process each
    time."""
    starts = trial.user_attrs.get("starts", 1)
    if starts >= MOST_STARTS:
        again = optuna.Trial(study, trial._trial_id)
        again.set_user_attr("error", f"interrupted {starts} times, perhaps for lack of memory")
    study.tell(trial.number, state=TrialState.FAIL)  # before it is asked for again: two would share the folder
    if starts < MOST_STARTS:
        kept = {"folder": trial.user_attrs.get("folder", str(trial.number)), "starts": starts + 1}
        study.enqueue_trial(trial.params, user_attrs=kept)


def _looked_at(sweep: Sweep) -> tuple[Any, dict[str, Any]]:
    """The direction of the metric, and the fingerprints of the data of each arm.

    Raises:
        ValueError: data that cannot be used, or arms that are chosen by different metrics.
    """
    metrics, fingerprints = {}, {}
    for arm, flags in sweep.arms.items():
        args = resolve({**flags, "output_dir": str(sweep.output_dir)})
        data, fingerprints[arm] = sources.load_with_fingerprints(args)
        metrics[arm] = chosen_metric(args.metric_for_best_model, problem_type_of(data["train"]))
    if len(set(metrics.values())) > 1:
        raise ValueError(f"Expected one metric for all arms of {sweep.path}, got {metrics}. Set it in common.")
    return "minimize" if set(metrics.values()) <= set(SMALLER_IS_BETTER) else "maximize", fingerprints


def _refuse_another(sweep: Sweep, arm: str, study: optuna.Study, fingerprints: dict[str, Any]) -> None:
    """Remembers what the trials of an arm have in common; ValueError if they had anything else. Arguments that came
    into hf_al since then do not count."""
    args = resolve({**sweep.arms[arm], "output_dir": "."})
    search = {f"search {name}": space for name, space in sweep.search.items()}
    model = config_values(args.model_type, args.model)
    skipped = {"model", *named("path", "file", "any"), *named("only", "showing", "output", "machine")}
    values = {name: value for name, value in {**args.to_dict(), **model}.items() if name not in skipped}
    now = json.loads(json.dumps({**values, "data": fingerprints, **search}))
    then = study.user_attrs.get("sweep", now)
    differ = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    differ = [name for name in differ if (name in then and name in now) or name.startswith("search ")]
    if differ:
        raise ValueError(
            f"Expected the sweep whose trials are in {sweep.output_dir}, got another {differ[0]} for the arm {arm!r}: "
            f"{now.get(differ[0])!r}, it was {then.get(differ[0])!r}. Pass another --output_dir."
        )
    study.set_user_attr("sweep", now)


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that count: all but those that were interrupted."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL))
    return [trial for trial in trials if trial.state != TrialState.FAIL or "error" in trial.user_attrs]


# --- in this process


def carry_out_sweep(sweep: Sweep, studies: dict[str, optuna.Study], jobs: int, keep_models: bool = False) -> None:
    """Carries out the trials that are missing, arms by turn. Those that were interrupted go on where they stopped.

    Args:
        sweep: its yaml.
        studies: of each arm.
        jobs: trials at the same time, each in a process of its own.
        keep_models: keep models and checkpoints of finished trials; without it, only report.json.

    Raises:
        KeyboardInterrupt: with a note on how to go on.
        OSError: a disk that refuses, a process that died.
    """

    def heard(trial: Trial, said: tuple[str, Any]) -> bool | None:
        what, value = said
        if what == "evaluations":
            for number, metric in value:
                trial.asked.report(metric, number)
            return trial.asked.should_prune()
        _finish(studies[trial.arm], trial, what, value)
        if not keep_models:
            clear(Path(trial.flags["output_dir"]))
        _say(sweep, studies, trial)
        return None

    missing = sum(max(0, sweep.trials - len(finished(study))) for study in studies.values())
    workers = Workers(_work, min(jobs, missing))
    try:
        with quiet(__name__), workers:
            workers.carry_out(partial(_next_trial, sweep, studies), heard, lambda trial: trial.flags)
    except optuna.exceptions.StorageInternalError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise OSError(
            f"Expected {sweep.output_dir / DATABASE} to take the results of trials, got: {reason}. Once it does, the "
            "same command goes on."
        ) from error
    except BaseException as stop:
        for trial in workers.running.values():  # this start does not count: it did not end its process
            trial.asked.set_user_attr("starts", trial.asked.user_attrs.get("starts", 1) - 1)
        if isinstance(stop, (KeyboardInterrupt, SystemExit)):
            done = sum(len(finished(study)) for study in studies.values())
            stop.add_note(f"{done} finished trials are kept in {sweep.output_dir}. The same command goes on.")
        raise


def _next_trial(sweep: Sweep, studies: dict[str, optuna.Study], running: Iterable[Trial]) -> Trial | None:
    """The next trial, of the arm that has the fewest so far; None if all have theirs."""
    under_way = [trial.arm for trial in running]
    counts = {arm: len(finished(study)) + under_way.count(arm) for arm, study in studies.items()}
    arm = min(counts, key=lambda name: counts[name])
    if counts[arm] >= sweep.trials:
        return None
    asked = studies[arm].ask()
    chosen = as_chosen(sweep, {name: _suggested(asked, name, space) for name, space in sweep.search.items()})
    name = asked.user_attrs.get("folder", str(asked.number))
    folder = sweep.output_dir / "trials" / file_name(arm) / name
    if "folder" not in asked.user_attrs:  # a new one: what lies there is of trials whose database was removed
        shutil.rmtree(folder, ignore_errors=True)
    asked.set_user_attr("folder", name)
    return Trial(arm, asked, {**sweep.arms[arm], **chosen, "output_dir": str(folder)})


def _suggested(asked: optuna.Trial, name: str, space: Space) -> Any:
    if "choices" in space:
        return asked.suggest_categorical(name, list(map(as_proposed, space["choices"])))
    suggest: Any = asked.suggest_int if is_whole(space) else asked.suggest_float
    return suggest(name, space["low"], space["high"], log=space["log"])


def _finish(study: optuna.Study, trial: Trial, what: str, value: Any) -> None:
    asked = trial.asked
    if what == "done":
        for number, metric in value["evaluations"]:
            asked.report(metric, number)
        for name in ("seconds", "steps", "best_step"):
            asked.set_user_attr(name, value[name])
        study.tell(asked, value["validation"])
    elif what == "failed":
        asked.set_user_attr("error", value)
        study.tell(asked, state=TrialState.FAIL)
    else:
        study.tell(asked, state=TrialState.PRUNED)


def _say(sweep: Sweep, studies: dict[str, optuna.Study], trial: Trial) -> None:
    study = studies[trial.arm]
    done = sum(len(finished(study)) for study in studies.values())
    found = study.get_trials(deepcopy=False)[trial.asked.number]
    said = f"validation {found.value:.4f}" if found.state == TrialState.COMPLETE else found.state.name.lower()
    said += f": {found.user_attrs['error']}" if "error" in found.user_attrs else ""
    logger.info("%d of %d: %s: %s", done, sweep.trials * len(studies), trial, said)


# --- in the others


def _work(pipe: Connection) -> None:
    """Answers the flags of each trial with how it goes, and then with what it came to."""

    def report(values: list[tuple[int, float]]) -> None:
        try:
            pipe.send(("evaluations", values))
            ended = pipe.recv()
        except (EOFError, OSError):  # the sweep is being stopped: so is this run, after its next step
            return
        if ended:
            raise Pruned

    def tried(flags: dict[str, Any]) -> tuple[str, Any]:
        try:
            check_model(resolve(flags))
            return "done", carry_out(flags, report)
        except Pruned:
            return "pruned", None
        except (ValueError, FloatingPointError) as error:  # it diverged, or its values do not go together
            sources.load_text_datasets(resolve(flags))  # data that is gone would fail all trials
            return "failed", str(error)

    with quiet(__name__), quiet():  # also what is said of a trial that starts anew
        answer_tasks(pipe, tried)


def carry_out(flags: dict[str, Any], report: Callable[[list[tuple[int, float]]], None]) -> dict[str, Any]:
    """Trains, and calls `report` with the number and the value of each new evaluation; the first time, of a trial that
    goes on, also with those from before."""
    clock, known = time.perf_counter(), 0

    def new(metric: str, history: list[dict[str, Any]]) -> list[tuple[int, float]]:
        values = [row["validation"][-1][metric] for row in history if "validation" in row]
        return list(enumerate(values, 1))[known:]

    def after_evaluation(metric: str, history: list[dict[str, Any]]) -> None:
        nonlocal known
        values = new(metric, history)
        report(values)
        known += len(values)

    found = train_on(flags, after_evaluation).report
    seconds = max(time.perf_counter() - clock, found["speed"]["train_seconds"])  # with those before a stop
    return {
        "evaluations": new(found["metric"], found["history"]),  # of a trial that had them all before it was stopped
        "validation": found["validation"][-1][found["metric"]],
        "steps": found["steps"],
        "best_step": found["best_step"],
        "seconds": round(seconds, 1),
    }
