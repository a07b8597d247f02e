"""Carries out the runs of a study, one after the other or in several processes, each by `hf_al.train`."""

import logging
import math
import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ..data import sources
from ..data.labels import problem_type_of
from ..evaluation import ExitAnswers, answer_exits
from ..flags import set_up_output
from ..messages import duration
from ..metrics import SMALLER_IS_BETTER, right
from ..modeling.limits import REGRESSION, SINGLE
from ..parsing import resolve
from ..report import code_version, machine
from ..training.checkpoint import CannotResume
from ..training.health import Diverged
from ..training.loop import TrainResult, train
from ..training.progress import OnEvaluation
from ..training.setup import check_model
from .inside import look_inside
from .intervals import packed
from .plan import Study
from .results import Results, key_of
from .runs import Run, planned
from .summary import seconds_to_go
from .workers import Workers, answer_tasks

TRAIN_ROWS = 2000  # on so many of them, evenly spread, the training accuracy is measured

logger = logging.getLogger(__name__)


def check_values(runs: Iterable[Run]) -> None:
    """Refuses values that no model, optimizer or schedule takes, before any data is read.

    Raises:
        ValueError: with the arm.
    """
    checked = set()
    for run in runs:
        if run.key._replace(seed=0) not in checked:
            checked.add(run.key._replace(seed=0))
            try:
                check_model(resolve(run.flags))
            except ValueError as error:
                raise ValueError(f"{error} ({run.key.set} {run.key.architecture}, arm {run.key.arm!r})") from None


def check_data(runs: Iterable[Run], results: Results) -> None:
    """Refuses data that a study cannot use, before anything is trained on it.

    Raises:
        ValueError: with the data set.
    """
    for run in {run.key.set: run for run in runs}.values():
        data, fingerprints = sources.load_with_fingerprints(resolve(run.flags))
        if "test" not in data:
            raise ValueError(
                f"Expected a test split with labels in {run.key.set}, got none. Pass --data_dir with a test file."
            )
        kind = problem_type_of(data["train"])
        if kind == REGRESSION:
            raise ValueError(f"Expected classes as labels in {run.key.set}, got numbers: no answer is right or wrong.")
        if run.inside and kind != SINGLE:
            raise ValueError(
                f"Expected one class for each text in {run.key.set} to look inside blocks, got several. Leave inside "
                "out."
            )
        results.refuse_other_data(run.key.set, fingerprints)


def carry_out_study(study: Study, results: Results, jobs: int, keep_models: bool = False) -> None:
    """Carries out the runs that are needed and not done, and keeps each row as soon as it is there.

    Args:
        study: its yaml.
        results: the rows so far.
        jobs: processes at the same time; 1 = in this one.
        keep_models: keep models and checkpoints of finished runs; without it, only report.json.

    Raises:
        KeyboardInterrupt: with a note on how to go on.
        OSError: a disk that refuses, a process that died.
    """

    def done(row: dict[str, Any]) -> None:
        results.add(row)
        if not keep_models:
            clear(results.runs[key_of(row)].folder)
        keys = planned(study, results.rows)
        count = sum(key in results.rows for key in keys)
        said = f"failed: {row['error']}" if "error" in row else f"validation {row['validation']:.4f}"
        to_go = seconds_to_go(results.rows, keys)
        rest = f"; about {duration(to_go / jobs)} to go" if to_go else ""
        logger.info("%d of %d: %s: %s%s", count, len(keys), key_of(row), said, rest)

    def next_run(running: Collection[Run]) -> Run | None:
        keys = (key for key in planned(study, results.rows) if key not in results.rows)
        return next((results.runs[key] for key in keys if results.runs[key] not in running), None)

    try:
        with quiet():
            if jobs > 1 and next_run([]):
                with Workers(_work, jobs) as workers:
                    workers.carry_out(next_run, lambda run, row: done(row))
            while run := next_run([]):  # with several jobs, none is left
                done(carry_out(run))
    except (KeyboardInterrupt, SystemExit) as stop:
        stop.add_note(f"{len(results.rows)} finished runs are kept in {results.path}. The same command goes on.")
        raise


@contextmanager
def quiet(but: str = "hf_al.study") -> Iterator[None]:
    """Inside, runs say nothing but errors; what they would say is in their reports. `but`: the logger that goes on."""
    set_up_output(disable_tqdm=True)
    package = logging.getLogger("hf_al")
    before = package.level
    package.setLevel(logging.ERROR)
    logging.getLogger(but).setLevel(logging.INFO)
    try:
        yield
    finally:
        package.setLevel(before)


def clear(folder: Path) -> None:
    """Removes what a run left, but for its report."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name != "report.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


# --- one run


def carry_out(run: Run) -> dict[str, Any]:
    """Trains, and measures what was trained.

    Returns:
        A row: the key and `seconds`; what `measured` found, or `error` if training diverged; `machine` and `hf_al`.

    Raises:
        ValueError, OSError: anything else that keeps the run from ending: data, memory, the disk.
    """
    clock = time.perf_counter()
    found: dict[str, Any]
    try:
        found = _found(run)
    except (Diverged, FloatingPointError) as error:
        found = {"error": str(error)}
    seconds = max(time.perf_counter() - clock, found.get("train seconds", 0.0))  # it may have begun in another process
    row = {**run.key._asdict(), **found, "seconds": round(seconds, 1)}
    return {**row, "machine": machine(), "hf_al": code_version()}


def _found(run: Run) -> dict[str, Any]:
    result = train_on(run.flags)
    args = resolve(run.flags)
    data = sources.load_text_datasets(args)

    def answers(rows: Any) -> ExitAnswers:
        return answer_exits(result.model, result.tokenizer, rows, batch_size=args.per_device_eval_batch_size)

    step = math.ceil(len(data["train"]) / TRAIN_ROWS)
    some, rows = data["train"].select(range(0, len(data["train"]), step)), data["test"]
    seen, test = answers(some), answers(rows)
    kind = result.model.config.resolved_problem_type
    found = measured(result.report, *(right(part.logits[max(part.logits)], part.labels, kind) for part in (seen, test)))
    if run.inside:
        found["inside"] = look_inside(result.model, result.tokenizer, some, rows, test)
    return found


def train_on(flags: dict[str, Any], on_evaluation: OnEvaluation | None = None) -> TrainResult:
    """Goes on from the last checkpoint of a run that was interrupted.

    Args:
        flags: those of hf-al train.
        on_evaluation: as in `train`.
    """
    folder = Path(flags["output_dir"])
    if (folder / "checkpoints").is_dir():
        try:
            return train(resolve({**flags, "resume_from_checkpoint": "last"}), on_evaluation=on_evaluation)
        except CannotResume as error:
            logger.warning("%s starts anew: %s", folder, error)
    return train(resolve({**flags, "overwrite_output_dir": True}), on_evaluation=on_evaluation)


def measured(report: dict[str, Any], train: Any, test: Any) -> dict[str, Any]:
    """What a row says of a finished run.

    Args:
        report: report.json.
        train, test: for some training rows and for all test rows whether the last exit is right.
    """
    metric = report["metric"]
    sign = -1 if metric in SMALLER_IS_BETTER else 1
    last = [row["validation"][-1][metric] for row in report["history"] if "validation" in row][-1]
    validation = report["validation"][-1][metric]
    return {
        "metric": metric,
        "validation": validation,
        "validation by exit": [row[metric] for row in report["validation"]],
        "validation drop": sign * (validation - last),
        "train": float(train.mean()),
        "test": float(test.mean()),
        "test by exit": [row["accuracy"] for row in report["test"]],
        "tests": len(test),
        "right": packed(test),
        "steps": report["steps"],
        "best step": report["best_step"],
        "train seconds": round(report["speed"]["train_seconds"], 1),
        "data": {"rows": report["data"]["rows"], "fingerprint": report["data"]["fingerprint"]},
    }


def _work(pipe: Connection) -> None:
    """Answers each run with its row, or with why there is none."""
    with quiet():
        answer_tasks(pipe, carry_out)
