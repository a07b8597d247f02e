"""Carries out the runs of a study, one after the other or in several processes, each by `hf_al.train`."""

import logging
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ..data import sources
from ..evaluation import ExitAnswers, answer_exits
from ..flags import set_up_output
from ..messages import duration
from ..metrics import SMALLER_IS_BETTER
from ..parsing import resolve
from ..report import machine
from ..training.loop import TrainResult, train
from ..training.setup import check_model
from .intervals import packed
from .plan import Study
from .results import Results, key_of
from .runs import Run, planned
from .summary import seconds_to_go

TRAIN_ROWS = 2000  # on so many of them, evenly spread, the training accuracy is measured
GRACE = 20.0  # seconds for a process to write a checkpoint and end

logger = logging.getLogger(__name__)


def check(runs: Iterable[Run]) -> None:
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
            _clear(results.runs[key_of(row)].folder)
        keys = planned(study, results.rows)
        count = sum(key in results.rows for key in keys)
        said = f"failed: {row['error']}" if "error" in row else f"validation {row['validation']:.4f}"
        to_go = seconds_to_go(results.rows, keys)
        rest = f"; about {duration(to_go / jobs)} to go" if to_go else ""
        logger.info("%d of %d: %s: %s%s", count, len(keys), key_of(row), said, rest)

    try:
        with quiet():
            while missing := [results.runs[key] for key in planned(study, results.rows) if key not in results.rows]:
                if jobs == 1:
                    for run in missing:
                        done(carry_out(run))
                else:
                    in_processes(missing, jobs, done)
    except KeyboardInterrupt as stop:
        stop.add_note(f"{len(results.rows)} finished runs are kept in {results.path}. The same command goes on.")
        raise


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, runs say nothing but errors; what they would say is in their reports."""
    set_up_output(disable_tqdm=True)
    package = logging.getLogger("hf_al")
    before = package.level
    package.setLevel(logging.ERROR)
    logging.getLogger("hf_al.study").setLevel(logging.INFO)
    try:
        yield
    finally:
        package.setLevel(before)


def _clear(folder: Path) -> None:
    """Removes what a run left, but for its report."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name != "report.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


# --- one run


def carry_out(run: Run) -> dict[str, Any]:
    """Trains, and measures what was trained.

    Returns:
        A row: the key and `seconds`; what `measured` found, or `error` if training failed; `machine` and `hf_al`.
    """
    clock = time.perf_counter()
    found: dict[str, Any]
    try:
        found = _found(run)
    except (ValueError, FloatingPointError) as error:  # it diverged, or its values do not go together with its data
        found = {"error": str(error)}
    seconds = max(time.perf_counter() - clock, found.get("train seconds", 0.0))  # it may have begun in another process
    row = {**run.key._asdict(), **found, "seconds": round(seconds, 1)}
    return {**row, "machine": machine(), "hf_al": version("hf_al")}


def _found(run: Run) -> dict[str, Any]:
    result = _train(run)
    args = resolve(run.flags)
    data = sources.load_text_datasets(args)
    if "test" not in data:
        raise ValueError("Expected a test split with labels in a study, got none. Pass --data_dir with a test file.")

    def answers(rows: Any) -> ExitAnswers:
        return answer_exits(result.model, result.tokenizer, rows, batch_size=args.per_device_eval_batch_size)

    step = math.ceil(len(data["train"]) / TRAIN_ROWS)
    seen, test = answers(data["train"].select(range(0, len(data["train"]), step))), answers(data["test"])
    return measured(result.report, right(seen, result.model.config), right(test, result.model.config))


def _train(run: Run) -> TrainResult:
    """Goes on from the last checkpoint of a run that was interrupted."""
    if (run.folder / "checkpoints").is_dir():
        try:
            return train(resolve({**run.flags, "resume_from_checkpoint": "last"}))
        except ValueError as error:  # checkpoints that are damaged, or of other data
            logger.warning("%s starts anew: %s", run.key, error)
    return train(resolve({**run.flags, "overwrite_output_dir": True}))


def right(answers: ExitAnswers, config: Any) -> Any:
    """Which rows (N,) the last exit answers right; of several labels, all of them.

    Raises:
        ValueError: labels that are numbers.
    """
    logits_NC = answers.logits[max(answers.logits)]
    if config.resolved_problem_type == "regression":
        raise ValueError("Expected classes as labels in a study, got numbers: no answer is right or wrong.")
    if config.resolved_problem_type == "single_label_classification":
        return logits_NC.argmax(1) == answers.labels
    return ((logits_NC > 0) == (answers.labels > 0.5)).all(1)


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


# --- several at a time


def in_processes(runs: Iterable[Run], jobs: int, done: Callable[[dict[str, Any]], None]) -> None:
    """Carries out the runs in processes of their own, which end with this call, however it ends.

    Args:
        runs: in the order in which they are begun.
        jobs: how many at the same time.
        done: called with each row as soon as it is there.

    Raises:
        OSError: what a run raised, or a process that died.
    """
    context = multiprocessing.get_context("spawn")
    waiting = deque(runs)
    processes: dict[Connection, BaseProcess] = {}
    running: dict[Connection, Run] = {}

    def give(pipe: Connection) -> None:
        if waiting:
            running[pipe] = waiting.popleft()
            pipe.send(running[pipe])

    try:
        for _ in range(min(jobs, len(waiting))):
            here, there = context.Pipe()
            processes[here] = context.Process(target=_work, args=(there,))
            processes[here].start()
            there.close()  # or its end would not be seen
            give(here)
        while running:
            for pipe in wait(list(running)):
                assert isinstance(pipe, Connection)
                run = running.pop(pipe)
                try:
                    answer = pipe.recv()
                except EOFError:
                    processes[pipe].join()
                    raise ChildProcessError(
                        f"The process of {run.key} ended with status {processes[pipe].exitcode}, perhaps for lack of "
                        "memory. Finished runs are kept: the same command goes on. Pass fewer --jobs if memory is "
                        "short."
                    ) from None
                if isinstance(answer, Exception):
                    raise answer
                done(answer)
                give(pipe)
        for pipe in processes:
            pipe.close()  # which ends its process
        for process in processes.values():
            process.join(GRACE)
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.join(GRACE)
            process.kill()
            process.join()


def _work(pipe: Connection) -> None:
    """Answers each run with its row, or with why there is none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, too, which ends this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # in training: after a checkpoint
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with quiet(), suppress(EOFError):
        while True:
            run = pipe.recv()
            try:
                pipe.send(carry_out(run))
            except OSError as error:
                pipe.send(OSError(str(error)))
            except Exception:
                pipe.send(RuntimeError(traceback.format_exc()))


def _end_with_parent() -> None:
    """Or a run would go on beside the one that takes its place, in the same folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
