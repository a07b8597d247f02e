"""A world of processes for one run, started in a fraction of a second: forked from one that has imported everything."""

import os
import signal
import tempfile
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from program import forkserver


class Failed(AssertionError):
    """What went wrong in each process that failed."""


def run_world(
    stages: int, function: Any, *args: Any, timeout: float = 60.0, check: bool = True, hung: int | None = None
) -> list[Any]:
    """`function(stage, *args)` in `stages` processes with one process group; their results, in the order of stages.

    Args:
        stages: how many.
        function: of a module that can be imported. Its result must pickle.
        args: for the function.
        timeout: seconds for all together.
        hung: a stage that will never end, so nobody waits for it once the others have.
        check: raise if one failed; else a failed process's result is its traceback as a string.

    Raises:
        Failed: with the traceback of each child, or that it was killed or still busy after `timeout`.
    """
    context = forkserver()
    with tempfile.TemporaryDirectory() as folder:
        ends, children = [], []
        for stage in range(stages):
            here, there = context.Pipe(duplex=False)
            child = context.Process(target=_child, args=(stage, stages, folder, there, function, args))
            ends.append(here)
            children.append(child)
        try:
            for child in children:
                child.start()
            return _results(ends, children, timeout, check, hung)
        finally:
            for child in children:
                if child.pid is not None and child.is_alive():
                    with suppress(ProcessLookupError):  # it is just ending
                        os.kill(child.pid, signal.SIGKILL)
                    child.join(10)


def _results(ends: list[Connection], children: list, timeout: float, check: bool, hung: int | None) -> list[Any]:
    found: dict[int, tuple[bool, Any]] = {}
    deadline = time.monotonic() + timeout
    while len(found) < len(ends) - (hung is not None) and time.monotonic() < deadline:
        rest = [s for s in range(len(ends)) if s not in found]
        wait([w for s in rest for w in (ends[s], children[s].sentinel)], max(0.0, deadline - time.monotonic()))
        for s in rest:
            dead = not children[s].is_alive()  # checked first: what it sent before it died is then in the pipe
            with suppress(EOFError):  # killed
                if ends[s].poll():
                    found[s] = ends[s].recv()
            if dead and s not in found:
                found[s] = (False, f"ended with status {children[s].exitcode}")
    outcomes = [found.get(s, (False, "still busy")) for s in range(len(ends))]
    if check and not all(good for good, _ in outcomes):
        raise Failed("\n".join(f"--- stage {s}: {what}" for s, (good, what) in enumerate(outcomes) if not good))
    return [what for _, what in outcomes]


def _child(stage: int, stages: int, folder: str, pipe: Connection, function: Any, args: tuple) -> None:
    import torch
    import torch.distributed as dist

    rank = stages - 1 - stage
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(stages), LOCAL_WORLD_SIZE=str(stages),
        ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    try:
        if stages == 1:
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
                del os.environ[name]
        else:
            dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'meet'}", rank=rank, world_size=stages)
        pipe.send((True, function(stage, *args)))
        status = 0
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        status = 1
    pipe.close()
    os._exit(status)  # no clean-up that would wait for peers that are gone
