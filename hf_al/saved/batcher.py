"""Texts of many requests, answered together by one thread.

The queue belongs to the event loop, and only the model runs in the thread: nothing needs a lock.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from .rows import Texts

logger = logging.getLogger(__name__)

Answer = dict[str, Any]


class Options(NamedTuple):
    """What texts must have in common to be answered together."""

    exit: int | str
    all_scores: bool
    is_pair: bool


class Overloaded(Exception):
    """Too many texts wait."""


class ModelError(Exception):
    """The model failed. The message is for whoever sent the texts: it names the kind of error only, whose text may name
    files of this machine."""

    def __init__(self, error: BaseException):
        super().__init__(f"The model failed: {type(error).__name__}. See the server's log.")


@dataclass(eq=False)
class Waiting:
    """A text that waits for its answer."""

    text: Texts
    options: Options
    since: float  # in the clock of the event loop
    answer: asyncio.Future[Answer]


class Batcher:
    """One queue of texts, and one thread that answers them in batches.

    Args:
        answer: gives the answers to texts that have these options in common; called in the thread.
        max_batch_size: texts that are answered together.
        max_wait: seconds that a text waits for others while the thread has nothing to do.
        max_waiting: texts that may wait.
    """

    def __init__(
        self,
        answer: Callable[[list[Texts], Options], list[Answer]],
        max_batch_size: int,
        max_wait: float,
        max_waiting: int,
    ):
        self.answer, self.max_batch_size, self.max_wait = answer, max_batch_size, max_wait
        self.max_waiting = max_waiting
        self.queue: list[Waiting] = []
        self.has_new = asyncio.Event()

    async def ask(self, texts: list[Texts], exit: int | str, all_scores: bool) -> list[Answer]:
        """The answers to the texts of a request, in order; if it is cancelled, texts that still wait are dropped.

        Raises:
            Overloaded: at once, if they do not fit into the queue.
            ModelError: the model failed.
        """
        if len(self.queue) + len(texts) > self.max_waiting:
            raise Overloaded
        loop = asyncio.get_running_loop()
        asked = [
            Waiting(text, Options(exit, all_scores, len(text) == 2), loop.time(), loop.create_future())
            for text in texts
        ]
        self.queue += asked
        self.has_new.set()
        try:
            return await asyncio.gather(*(waiting.answer for waiting in asked))
        finally:  # after an error, or when the client is gone, nobody waits for the rest
            for waiting in asked:
                waiting.answer.cancel()
            self.queue = [waiting for waiting in self.queue if not waiting.answer.done()]

    async def run(self) -> None:
        """Answers texts until it is cancelled."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "model") as thread:
            while True:
                batch = await self._next_batch()
                texts = [waiting.text for waiting in batch]
                try:
                    answers = await loop.run_in_executor(thread, self.answer, texts, batch[0].options)
                    assert len(answers) == len(batch)
                except asyncio.CancelledError:
                    raise
                except BaseException as error:  # a panic inside tokenizers is no Exception, and the thread has to go on
                    logger.exception("The model failed on a batch of %d.", len(batch))
                    for waiting in batch:
                        if not waiting.answer.done():
                            waiting.answer.set_exception(ModelError(error))
                else:
                    for waiting, answer in zip(batch, answers, strict=True):
                        if not waiting.answer.done():
                            waiting.answer.set_result(answer)

    async def _next_batch(self) -> list[Waiting]:
        """The text that came first, with those that can be answered together with it. It waits for more of them only
        if it came less than `max_wait` ago."""
        loop = asyncio.get_running_loop()
        while True:
            self.has_new.clear()
            left = None
            if self.queue:
                left = self.queue[0].since + self.max_wait - loop.time()
                if left <= 0 or len(self.queue) >= self.max_batch_size:
                    return self._take()
            with suppress(TimeoutError):
                await asyncio.wait_for(self.has_new.wait(), left)

    def _take(self) -> list[Waiting]:
        batch: list[Waiting] = []
        rest: list[Waiting] = []
        for waiting in self.queue:
            fits = len(batch) < self.max_batch_size and waiting.options == self.queue[0].options
            (batch if fits else rest).append(waiting)
        self.queue = rest
        return batch
