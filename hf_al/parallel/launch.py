"""`hf-al train --stages S` on one machine: its processes, started by accelerate's launcher. Torch comes later."""

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
LOCAL_RANK = "LOCAL_RANK"  # set by whatever starts several processes; 0 is the first one of a machine
WORD = 3.0  # seconds in which the process that speaks says what went wrong
ACCELERATE = "ACCELERATE_MIXED_PRECISION"  # set by `accelerate launch`, also where it starts one process only


def is_launched() -> bool:
    """Whether a launcher started this process, and others beside it."""
    return LOCAL_RANK in os.environ


def is_for_others_to_start() -> bool:
    """Whether the processes of a run come from outside: `accelerate launch --cpu` starts one, however many were asked
    for, and must not be answered by a launch of our own."""
    return is_launched() or ACCELERATE in os.environ


def speaks() -> bool:
    """Whether this process says what all processes of its machine know."""
    return os.environ.get(LOCAL_RANK, "0") == "0"


def leave_the_word(status: int = 2) -> NoReturn:
    """Ends a process whose mistake another one says; not at once, because the first end makes a launcher end all."""
    time.sleep(WORD)
    raise SystemExit(status)


def said_once(work: Callable[[], Any]) -> Any:
    """`work()`, whose mistakes are those of every process: before they know of each other, one of a machine speaks.

    Raises:
        ValueError: what `work` raises, in the first process of this machine.
        SystemExit: status 2, in the others.
    """
    try:
        return work()
    except ValueError:
        if speaks():
            raise
        leave_the_word()


@contextmanager
def _undone() -> Iterator[None]:
    """Takes back what the launcher does to this process: signal handlers, and loggers that are silent while it runs,
    because what goes wrong is said by the process that knows."""
    disabled = logging.root.manager.disable
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(disabled)
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if handler is not None:  # None: one that is not Python's cannot be put back
                    signal.signal(number, handler)


def launch(arguments: str, stages: int, use_cpu: bool) -> None:
    """Runs `hf-al train` in `stages` processes on this machine, and waits for them.

    Args:
        arguments: the resolved arguments, as yaml.
        stages: how many processes.
        use_cpu: train on the CPU even where there are GPUs.

    Raises:
        ValueError: fewer GPUs than stages.
        KeyboardInterrupt, SystemExit: with the status of the process that failed, which has said why.
    """
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    gpus = 0 if use_cpu else torch.cuda.device_count()
    if 0 < gpus < stages:
        raise ValueError(
            f"Expected a GPU for each of {stages} stages, found {gpus}. Pass --stages {gpus}, or --use_cpu."
        )
    environment = {
        "torchelastic_signals_to_handle": ",".join(number.name for number in HANDLED),
        "torch_cpp_log_level": "ERROR",  # a process that is gone is said in one line, not in stacks of calls
    }
    if not gpus:
        environment["accelerate_use_cpu"] = "1"
    with (
        tempfile.TemporaryDirectory(prefix="hf_al_launch_") as folder,
        patch_environment(**environment),
        warnings.catch_warnings(),
        _undone(),
    ):
        warnings.simplefilter("ignore")  # that its usual port is taken: it finds another
        config = Path(folder) / "arguments.yaml"
        config.write_text(arguments, encoding="utf-8")
        flags = ["--multi_gpu", f"--num_processes={stages}", "--num_machines=1", "--mixed_precision=no",
                 f"--log_dir={folder}"]  # fmt: skip
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
