"""Processes that carry out the runs of a study or the trials of a sweep."""

from functools import partial

import pytest

from hf_al.study.workers import Workers, answer_tasks

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
