"""Processes that carry out the runs of a study or the trials of a sweep."""

import os
import signal
import threading
import time
from functools import partial
from multiprocessing.connection import Connection

import pytest

from hf_al.study.workers import Workers, answer_tasks

STAY = "__import__('signal').signal(15, 1), __import__('time').sleep(60)"  # whatever it is told
SLEEP, DIE = "__import__('time').sleep(60)", "__import__('os')._exit(3)"


@pytest.mark.medium
@pytest.mark.timeout(60)
def test_a_process_that_dies_takes_only_its_own_task_with_it():
    tasks = [SLEEP, DIE]
    with (
        pytest.raises(ChildProcessError, match="ended with status 3, perhaps for lack of memory"),
        Workers(partial(answer_tasks, carry_out=eval), 2) as workers,
    ):
        workers.carry_out(lambda running: tasks.pop(0) if tasks else None, lambda task, said: None)
    assert list(workers.running.values()) == [SLEEP]
    assert not any(process.is_alive() for process in workers.processes.values())


@pytest.mark.medium
@pytest.mark.timeout(60)
def test_a_process_that_dies_before_it_reads_its_task_is_one_message():
    with (
        pytest.raises(ChildProcessError, match="The process of a task ended with status 0"),
        Workers(Connection.close, 1) as workers,
    ):
        workers.carry_out(lambda running: None if running else "a task", lambda task, said: None)


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_second_signal_does_not_wait_for_the_others():
    handler, tasks = signal.getsignal(signal.SIGINT), [STAY]

    def press_twice() -> None:
        while not workers.is_waiting:
            time.sleep(0.1)
        for seconds in (4, 1):  # so that the task has begun, and the first signal is noticed
            time.sleep(seconds)
            os.kill(os.getpid(), signal.SIGINT)

    workers = Workers(partial(answer_tasks, carry_out=eval), 1)
    begin = time.monotonic()
    threading.Thread(target=press_twice).start()
    with pytest.raises(KeyboardInterrupt), workers:
        workers.carry_out(lambda running: tasks.pop() if tasks else None, lambda task, said: None)
    assert time.monotonic() - begin < 15  # of GRACE, 20
    assert not any(process.is_alive() for process in workers.processes.values())
    assert signal.getsignal(signal.SIGINT) is handler
