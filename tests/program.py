"""`hf-al` in a process of its own, started in a fraction of a second: forked from one that has imported everything.

For tests of what happens around a run; tests of the start itself use `conftest.run_program`.
"""

import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

PRELOAD = ["torch", "torch.distributed", "transformers", "accelerate", "datasets", "evaluate", "pytest", "hf_al.cli",
           "hf_al.training.loop", "hf_al.parsing", "hf_al.evaluation", "hf_al.saved.prediction"]  # fmt: skip
NAMES = ("stdin", "stdout", "stderr")


def forkserver() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


class Program:
    """`hf-al ARGV`; used like a subprocess.Popen with three pipes, or with all output going to the file `log`."""

    def __init__(self, *argv: str, log: Path | None = None):
        if log is None:
            (its_in, stdin), (stdout, its_out), (stderr, its_err) = os.pipe(), os.pipe(), os.pipe()
            self.pipes = [os.fdopen(stdin, "wb"), os.fdopen(stdout, "rb"), os.fdopen(stderr, "rb")]
            self.stdin, self.stdout, self.stderr = self.pipes
        else:
            self.pipes = []
            its_in, its_out = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            its_err = os.dup(its_out)
        ends = [Connection(end) for end in (its_in, its_out, its_err)]  # what multiprocessing hands over
        self.process = forkserver().Process(target=_run, args=(argv, ends))
        self.process.start()
        for end in ends:
            end.close()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float) -> int:
        self.process.join(timeout)
        assert self.poll() is not None, f"still busy after {timeout} s"
        return self.poll()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, text: str = "") -> tuple[str, str]:
        """Sends the text as the whole input; returns (standard output, standard error), which must be short."""
        self.stdin.write(text.encode())
        self.stdin.close()
        return self.stdout.read().decode(), self.stderr.read().decode()

    def end(self) -> None:
        if self.poll() is None:
            self.process.kill()
        self.process.join(10)
        for pipe in self.pipes:
            pipe.close()


def _run(argv: tuple[str, ...], ends: list[Connection]) -> None:
    from hf_al.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)  # also if a shell runs the tests in the background
    for number, end in enumerate(ends):
        os.dup2(end.fileno(), number)
        end.close()
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    main(list(argv))
