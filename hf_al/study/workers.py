"""Processes that each carry out one task at a time, and end with the context that holds them, however that ends."""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

Task = TypeVar("Task")
GRACE = 20.0  # seconds for a process to write a checkpoint and end


class Workers:
    """
    Args:
        work: what each process does: takes tasks from its pipe, and answers them there; a function of a module.
        count: processes.

    Attributes:
        running: the tasks that are under way, by the pipe to their process; without one whose process died.

    SIGTERM ends this process like Ctrl-C does: the others write a checkpoint first. Both end it while it waits for an
    answer, so that no write is left half done; the second one ends it at once.
    """

    def __init__(self, work: Callable[[Connection], None], count: int):
        self.work, self.count = work, count
        self.processes: dict[Connection, BaseProcess] = {}  # by the pipe to each
        self.running: dict[Connection, Any] = {}
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
        except BaseException:
            self.__exit__()
            raise
        return self

    def carry_out(
        self,
        next_task: Callable[[Collection[Task]], Task | None],
        heard: Callable[[Task, Any], Any],
        sent: Callable[[Task], Any] = lambda task: task,
    ) -> None:
        """Gives the processes tasks until there are none.

        Args:
            next_task: gives the task to begin, by those that are running; None if there is none now. Named by its `str`
                in messages.
            heard: called with a task and what its process says. What it returns is the reply; None if that was its
                last word.
            sent: what a process gets of a task.

        Raises:
            ChildProcessError: a process died.
            Exception: one that it sent.
        """
        self._give(next_task, sent)
        while self.running:
            for pipe, said in self._answers():
                task = self.running.pop(pipe)
                if (reply := heard(task, said)) is not None:
                    self.running[pipe] = task
                    pipe.send(reply)
            self._give(next_task, sent)

    def _give(self, next_task: Callable[[Collection[Task]], Task | None], sent: Callable[[Task], Any]) -> None:
        for pipe in self.processes:
            task = None if pipe in self.running else next_task(self.running.values())
            if task is not None:
                self.running[pipe] = task
                pipe.send(sent(task))

    def _answers(self) -> Iterator[tuple[Connection, Any]]:
        """Waits until a busy process says something; then what each has said."""
        failed = []  # raised when what others have done is kept
        for pipe in self._wait():
            assert isinstance(pipe, Connection)
            try:
                answer = pipe.recv()
            except (EOFError, ConnectionResetError):  # the latter if it has not read its task
                process, task = self.processes[pipe], self.running.pop(pipe)
                process.join()
                answer = ChildProcessError(
                    f"The process of {task} ended with status {process.exitcode}, perhaps for lack of "
                    "memory. What is finished is kept: the same command goes on. Pass fewer --jobs if memory is short."
                )
            if isinstance(answer, Exception):
                failed.append(answer)
            else:
                yield pipe, answer
        if failed:
            raise failed[0]

    def _wait(self) -> list[Any]:
        self.is_waiting = True
        try:
            if self.asked_to_end:
                self._end(self.asked_to_end)
            return wait(list(self.running))
        finally:
            self.is_waiting = False

    def _end(self, number: int, frame: object = None) -> None:
        is_time, self.asked_to_end = self.is_waiting or self.asked_to_end, number
        if is_time:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def __exit__(self, *error: object) -> None:
        for pipe in self.processes:
            pipe.close()  # which ends a process that has nothing to do
        for process in self.processes.values():
            if any(error):
                process.terminate()
        try:
            for process in self.processes.values():
                process.join(GRACE)
        finally:  # also by a second signal
            for process in self.processes.values():
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
