"""`hf-al train --stages S` on one machine: starts the processes with accelerate's launcher. Imports torch late."""

import logging
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # by torch's elastic launcher
LOCAL_RANK = "LOCAL_RANK"  # set by every launcher of several processes; 0 is the first process of a machine
REPORT_GRACE = 3.0  # seconds for the process that reports to say what went wrong
SHUTDOWN_GRACE = 300  # seconds for all to end after a signal, before they are killed
ACCELERATE = "ACCELERATE_MIXED_PRECISION"  # set by `accelerate launch`, even if it starts only one process


def is_launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return LOCAL_RANK in os.environ


def is_for_others_to_start() -> bool:
    """Whether an outside launcher is to start the processes. `accelerate launch --cpu` starts only one, however many
    were requested; hf_al must not launch its own then."""
    return is_launched() or ACCELERATE in os.environ


def is_main() -> bool:
    """Whether this is the process that writes the results; the only one, if no launcher started it."""
    return os.environ.get("RANK", "0") == "0"


def reports_here() -> bool:
    """Whether this process reports what all processes of its machine know."""
    return os.environ.get(LOCAL_RANK, "0") == "0"


def end_unreported(status: int = 2) -> NoReturn:
    """Ends a process whose error another one reports; waits first, because a launcher ends all once one ends."""
    time.sleep(REPORT_GRACE)
    raise SystemExit(status)


def failing_once(work: Callable[[], Any]) -> Any:
    """`work()`, which fails in every process or in none: before they are connected, one per machine reports the error.

    Raises:
        ValueError: what `work` raises, in the first process of this machine.
        SystemExit: status 2, in the others.
    """
    try:
        return work()
    except ValueError:
        if reports_here():
            raise
        end_unreported()


@contextmanager
def _undone() -> Iterator[None]:
    """Undoes the launcher's changes to this process: signal handlers, and loggers. Loggers are silent while it runs,
    because the process that failed reports its error."""
    disabled = logging.root.manager.disable
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(disabled)
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if handler is not None:  # None: a handler that is not Python's cannot be restored
                    signal.signal(number, handler)


def processes_here() -> int:
    """How many processes of this run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def check_gpus(processes: int, gpus: int) -> None:
    """ValueError if several processes of this machine would have to share a GPU."""
    if gpus < processes:
        raise ValueError(
            f"Expected a GPU for each of {processes} processes on this machine, found {gpus}. Pass fewer --stages or "
            "--replicas, or --use_cpu."
        )


def launch(arguments: str, processes: int, use_cpu: bool) -> None:
    """Runs `hf-al train` in `processes` processes on this machine, and waits for them.

    Args:
        arguments: the resolved arguments, as yaml.
        processes: how many.
        use_cpu: train on the CPU even if there are GPUs.

    Raises:
        ValueError: fewer GPUs than processes.
        KeyboardInterrupt, SystemExit: with the status of the process that failed, which has reported why.
    """
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    gpus = 0 if use_cpu else torch.cuda.device_count()
    if gpus:
        check_gpus(processes, gpus)
    environment = {
        "torchelastic_signals_to_handle": ",".join(number.name for number in HANDLED),
        "torch_cpp_log_level": "ERROR",  # a lost process is reported in one line, without stack traces
        # after a signal, an evaluation and a checkpoint may be under way
        "torch_elastic_shutdown_timeout": os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_GRACE)),
    }
    if not gpus:
        environment["accelerate_use_cpu"] = "1"
    with (
        tempfile.TemporaryDirectory(prefix="hf_al_launch_") as folder,
        patch_environment(**environment),
        warnings.catch_warnings(),
        _undone(),
    ):
        warnings.simplefilter("ignore")  # about its usual port being taken: it finds another
        config = Path(folder) / "arguments.yaml"
        config.write_text(arguments, encoding="utf-8")
        flags = ["--multi_gpu", f"--num_processes={processes}", "--num_machines=1", "--mixed_precision=no",
                 "--gpu_ids=all", f"--log_dir={folder}"]  # fmt: skip
        program = ["--dynamo_backend=no", "--module", "hf_al_program", "train", "--config", str(config)]
        try:
            launch_command(launch_command_parser().parse_args([*flags, *program]))
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
        except SignalException as stop:
            if stop.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            sys.exit(128 + stop.sigval)
