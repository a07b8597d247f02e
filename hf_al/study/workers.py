"""Processes that each carry out one task at a time, and end with the context that holds them, however that ends."""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

GRACE = 20.0  # seconds for a process to write a checkpoint and end


class Workers:
    """
    Args:
        work: what each process does: takes tasks from its pipe, and answers them there; a function of a module.
        count: processes.

    Attributes:
        pipes: one to each process.

    SIGTERM ends this process like Ctrl-C does: the others write a checkpoint first. Both end it while it waits for an
    answer, so that no write is left half done; the second one ends it at once.
    """

    def __init__(self, work: Callable[[Connection], None], count: int):
        self.work, self.count = work, count
        self.pipes: list[Connection] = []
        self.processes: dict[Connection, BaseProcess] = {}
        self.is_waiting, self.asked_to_end = False, 0  # by which signal

    def __enter__(self) -> "Workers":
        self.before = {number: signal.signal(number, self._end) for number in (signal.SIGINT, signal.SIGTERM)}
        context = multiprocessing.get_context("spawn")
        try:
            for _ in range(self.count):
                here, there = context.Pipe()
                process = context.Process(target=self.work, args=(there,))
                process.start()
                there.close()  # or its end would not be seen
                self.processes[here] = process
                self.pipes.append(here)
        except BaseException:
            self.__exit__()
            raise
        return self

    def answers(self, busy: Mapping[Connection, Any]) -> Iterator[tuple[Connection, Any]]:
        """Waits until a busy process says something; then what each has said.

        Args:
            busy: pipe -> the task, named by its `str` in messages.

        Raises:
            ChildProcessError: a process died.
            Exception: one that it sent.
        """
        failed = []  # raised when what others have done is kept
        for pipe in self._wait(busy):
            assert isinstance(pipe, Connection)
            try:
                answer = pipe.recv()
            except EOFError:
                self.processes[pipe].join()
                raise ChildProcessError(
                    f"The process of {busy[pipe]} ended with status {self.processes[pipe].exitcode}, perhaps for lack "
                    "of memory. What is finished is kept: the same command goes on. Pass fewer --jobs if memory is "
                    "short."
                ) from None
            if isinstance(answer, Exception):
                failed.append(answer)
            else:
                yield pipe, answer
        if failed:
            raise failed[0]

    def _wait(self, busy: Iterable[Connection]) -> list[Any]:
        self.is_waiting = True
        try:
            if self.asked_to_end:
                self._end(self.asked_to_end)
            return wait(list(busy))
        finally:
            self.is_waiting = False

    def _end(self, number: int, frame: object = None) -> None:
        if self.is_waiting or self.asked_to_end:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.asked_to_end = number

    def __exit__(self, *error: object) -> None:
        for pipe in self.pipes:
            pipe.close()  # which ends a process that has nothing to do
        for process in self.processes.values():
            if any(error):
                process.terminate()
        for process in self.processes.values():
            process.join(GRACE)
            process.kill()
            process.join()
        for number, handler in self.before.items():
            signal.signal(number, handler)


def answer_tasks(pipe: Connection, carry_out: Callable[[Any], Any]) -> None:
    """What a process does: answers each task with what `carry_out` makes of it, or with what it raised."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, too, which ends this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # in training: after a checkpoint
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # nobody is interested any more
        while True:
            task = pipe.recv()
            answer: Any
            try:
                answer = carry_out(task)
            except (OSError, ValueError) as error:  # its message is for the user
                answer = (OSError if isinstance(error, OSError) else ValueError)(str(error))
            except Exception:
                answer = RuntimeError(traceback.format_exc())
            pipe.send(answer)


def _end_with_parent() -> None:
    """Ends this process with its parent. Otherwise its task would go on beside the one that takes its place, in the
    same folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
