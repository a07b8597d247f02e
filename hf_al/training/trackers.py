"""The trackers of accelerate, by `report_to`: which to start, where they write, and what they are given.

Unless configured otherwise they write on this machine: tensorboard, wandb and mlflow under output_dir/logs, trackio
where it keeps all its projects (`TRACKIO_DIR`), because its dashboard compares the runs of one such folder.
codecarbon is named with them, as in transformers.
"""

import contextlib
import importlib.util
import logging
import os
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from ..early import check_installed

logger = logging.getLogger(__name__)

ENERGY = "codecarbon"  # not a tracker of accelerate: energy.py


def chosen(names: list[str]) -> list[str]:
    """The trackers that `report_to` names; `all` are those that are installed, `none` is nobody.

    Raises:
        ValueError: a tracker that is not installed (with what to install).
    """
    installed = [str(name) for name in get_available_trackers()] + [ENERGY] * bool(importlib.util.find_spec(ENERGY))
    if "all" in names:
        return installed
    check_installed(names, lambda name: name in installed)
    return [name for name in names if name != "none"]


def start(accelerator: Accelerator, output_dir: Path, config: dict[str, Any], first_step: int) -> None:
    """Starts the accelerator's trackers with the run's arguments.

    Args:
        accelerator: made with `log_with=chosen(...)`.
        output_dir: its name becomes the name of the run.
        config: the arguments; trackers get them flat, see `flat`.
        first_step: the next step. After a resume, tensorboard hides what the interrupted run logged from there on.

    Raises:
        OSError: a tracker that cannot start, for example because its server does not answer.
    """
    names = [str(tracker) for tracker in accelerator.log_with]
    logs = output_dir / "logs"
    run_name = output_dir.resolve().name
    options: dict[str, dict[str, Any]] = {"trackio": {"name": run_name}, "mlflow": {"run_name": run_name}}
    if first_step > 1:
        options["tensorboard"] = {"purge_step": first_step}
    try:
        if "wandb" in names:
            logs.mkdir(exist_ok=True)
            options["wandb"] = {"name": run_name, "dir": str(logs), **_wandb_mode()}
        if "mlflow" in names:
            logs.mkdir(exist_ok=True)
            _choose_mlflow_store(output_dir)
        with contextlib.redirect_stdout(sys.stderr):  # trackio prints, but standard output is for results
            accelerator.init_trackers("hf_al", config=flat(config), init_kwargs=options)
    except Exception as error:  # each tracker raises exceptions of its own
        for tracker in accelerator.trackers:
            with contextlib.suppress(Exception):  # for those that had not started
                tracker.finish()
        accelerator.trackers.clear()
        hint = " WANDB_MODE=offline logs without a connection." if "wandb" in names else ""
        raise OSError(f"Could not start the trackers {', '.join(names)}: {error}{hint}") from error


def finish(accelerator: Accelerator, output_dir: Path) -> None:
    """Ends the trackers' runs, also after a failed training run: otherwise the next one could not start."""
    for tracker in accelerator.trackers:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                tracker.finish()
                _forget(tracker.name, output_dir)
        except Exception as error:  # a server that is gone must not make a finished run fail
            logger.warning("The tracker %s did not finish: %s", tracker.name, error)
    accelerator.trackers.clear()  # and not `end_training`, which also ends the process group: another run may follow


def _forget(name: str, output_dir: Path) -> None:
    """Clears what a tracker's package keeps about the run in this process."""
    if name == "trackio":
        import trackio

        trackio.finish()  # else it finishes the run again at exit, and prints
    elif name == "mlflow":
        import mlflow

        if mlflow.get_tracking_uri() == _mlflow_store(output_dir):
            mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # the next run has its own store


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """`config` as the flat mapping that trackers take: `model.num_blocks`, lists as text, None left out."""
    nested = {f"model.{name}": value for name, value in config.get("model", {}).items()}
    values = {name: value for name, value in config.items() if name != "model"} | nested
    return {
        name: value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in values.items()
        if value is not None and value != ""
    }


def _wandb_mode() -> dict[str, str]:
    """Offline if nobody is logged in: a run must never wait for somebody to type a key."""
    if os.environ.get("WANDB_MODE", "online") != "online":
        return {}
    import wandb

    if wandb.login(prompt=False):
        return {}
    logger.info("No wandb key: logging offline. To upload later: wandb login, then wandb sync FOLDER.")
    return {"mode": "offline"}


def _mlflow_store(output_dir: Path) -> str:
    """A sqlite file, as mlflow advises; plain files if only mlflow-skinny is installed, which has no database."""
    logs = (output_dir / "logs").resolve()
    if importlib.util.find_spec("sqlalchemy"):
        return f"sqlite:///{logs / 'mlflow.db'}"
    return (logs / "mlruns").as_uri()


def _choose_mlflow_store(output_dir: Path) -> None:
    """MLFLOW_TRACKING_URI, or what the caller of `train` has set; else the run's own store."""
    import mlflow

    if not mlflow.is_tracking_uri_set():
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow requires this before it writes files
        mlflow.set_tracking_uri(_mlflow_store(output_dir))
