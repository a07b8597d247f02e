"""Communication of stages: boundaries from stage to stage, and the few other words that processes exchange.

The last stage is rank 0, the main process: boundaries, and the rows of logs and metrics after them, travel forward and
end where trackers, checkpoints and the report are written. Only a verdict at an evaluation goes back (`tell`).

Boundaries go point to point. Everything else is json, or small tensors as safetensors, in the store that the process
group has anyway: writing there never waits, and its content outlives a process that dies.
"""

import itertools
import json
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from ..modeling.objectives import Boundary
from .launch import leave_the_word
from .schema import ALIGNMENT, Message, Schema

RUNS = itertools.count()  # of this process: each has words of its own
AHEAD = 2  # receives that are posted ahead, and sends in flight
ASK_EVERY = 0.2  # seconds after which the first stage checks again whether another one was told to stop
SILENCE = 3.0  # seconds for a process that failed to report why


class Alone:
    """One process: its stage receives the data, and what it sends is dropped."""

    number, stages, is_first, is_last = 0, 1, True, True

    # --- boundaries

    def agree(self, kind: str, run: Callable[[int, int, Boundary | None], Boundary], wire: torch.dtype) -> None:
        """Fixes the schema of a kind of boundary, once. `run`: (rows, tokens, incoming boundary or None at the start)
        -> the boundary that this stage sends for such a throw-away batch."""

    def expect(self, messages: Iterable[Message]) -> None:
        """The messages that will be received next, in this order, so that receives can be posted ahead."""

    def receive(self, message: Message, first: Callable[[], Boundary]) -> Boundary:
        """The boundary from the stage before; the first stage starts with `first()`."""
        return first()

    def send(self, message: Message, boundary: Boundary) -> None:
        """Sends the boundary to the next stage, as it is now."""

    def stopping(self, signal: int) -> int:
        """After a step: the signal that makes all stages stop here, 0 for none. `signal`: what this process got."""
        return signal

    # --- words

    def together(self, work: Callable[[], Any], main_first: bool = False) -> Any:
        """`work()` in every process. If it fails in some, one of them reports why and all end."""
        return work()

    def gather(self, value: Any) -> list[Any]:
        """The json values of all stages, in order, in every process."""
        return [value]

    def pass_on(self, rows: list[Any]) -> list[Any] | None:
        """The json rows of all stages, in order, at the last one; None elsewhere. Nobody waits for a later stage."""
        return rows

    def take(self) -> dict[str, Tensor]:
        """The small tensors given by the stage before; none for the first stage."""
        return {}

    def give(self, tensors: dict[str, Tensor]) -> None:
        """Small tensors for the next stage."""

    def tell(self, value: Callable[[], Any]) -> Any:
        """The last stage's json value, in every process. All wait for it."""
        return value()

    def failed(self, error: Exception) -> None:
        """Tells the others that this process ends with an error that it will show."""

    def statistics(self) -> dict[str, float]:
        """Bytes, by direction, and seconds of waiting."""
        return {}


ALONE = Alone()  # it has no state


class Neighbours(Alone):
    """One of several processes. Stage s has rank stages - 1 - s.

    Args:
        number: which stage this process is.
        stages: how many there are.
        device: of the boundaries.
        timeout: seconds that a peer may be silent.
    """

    def __init__(self, number: int, stages: int, device: torch.device, timeout: float):
        self.number, self.stages, self.device, self.timeout = number, stages, device, timeout
        self.is_first, self.is_last = number == 0, number == stages - 1
        self.store = dist.PrefixStore(f"hf_al/{next(RUNS)}", dist.distributed_c10d._get_default_store())
        self.incoming: dict[str, Schema] = {}
        self.outgoing: dict[str, Schema] = {}
        self.coming: Iterator[Message] = iter(())
        self.posted: deque[tuple[Message, Tensor, dist.Work]] = deque()
        self.inbox, self.outbox = _Ring(AHEAD + 1, device), _Ring(AHEAD, device)
        self.in_flight: deque[dist.Work] = deque()
        self.signal = 0
        self.store_is_gone = self.has_failed = False
        self.next_question = 0.0
        self.at = "the start"
        self.words = {"together": 0, "gather": 0, "rows": 0, "tensors": 0, "tell": 0}  # how many of each so far
        self.count = dict.fromkeys(("sent_later_bytes", "received_bytes", "told_bytes"), 0)
        self.waited = {"receive": 0.0, "send": 0.0}

    # --- boundaries

    def agree(self, kind: str, run: Callable[[int, int, Boundary | None], Boundary], wire: torch.dtype) -> None:
        incoming: Schema | None = None
        if not self.is_first:
            incoming = Schema.from_json(json.loads(self._get(f"schema/{kind}/{self.number - 1}", self.number - 1)))
            self.incoming[kind] = incoming
        if self.is_last:
            return

        def throw_away(rows: int, tokens: int) -> Boundary:
            return run(rows, tokens, None if incoming is None else incoming.zeros(rows, tokens, self.device))

        self.outgoing[kind] = Schema.of(throw_away, wire)
        said = json.dumps(self.outgoing[kind].as_json()).encode()
        self._set(f"schema/{kind}/{self.number}", said, "sent_later_bytes")

    def expect(self, messages: Iterable[Message]) -> None:
        if self.is_first:
            return
        assert not self.posted, "boundaries that were expected before have not come yet"
        self.coming = iter(messages)
        while len(self.posted) < AHEAD and self._post():
            pass

    def _post(self) -> bool:
        message = next(self.coming, None)
        if message is None:
            return False
        buffer = self.inbox.next(self.incoming[message.kind].size(message.rows, message.tokens))
        self.posted.append((message, buffer, self._start(dist.irecv, buffer, self.number - 1)))
        return True

    def receive(self, message: Message, first: Callable[[], Boundary]) -> Boundary:
        self.at = f"step {message.step + 1}" if message.kind == "train" else "an evaluation"
        if self.is_first:
            return first()
        self._post()  # into the buffer of the previous batch, which is done
        expected, buffer, work = self.posted.popleft()
        assert expected == message, f"expected {expected}, the loop is at {message}"
        self._wait(work, "receive", self.number - 1)
        header = buffer[:ALIGNMENT].view(torch.int64).tolist()
        self.signal = header[6]
        if header != message.header(self.signal):
            raise RuntimeError(f"Stage {self.number} expected {message}, stage {self.number - 1} sent {header}.")
        self.count["received_bytes"] += len(buffer)
        return self.incoming[message.kind].read(buffer, message.rows, message.tokens)

    def send(self, message: Message, boundary: Boundary) -> None:
        if self.is_last:
            return
        schema = self.outgoing[message.kind]
        if len(self.in_flight) == AHEAD:
            self._wait(self.in_flight.popleft(), "send", self.number + 1)
        buffer = self.outbox.next(schema.size(message.rows, message.tokens))
        buffer[:ALIGNMENT].view(torch.int64).copy_(torch.tensor(message.header(self.signal)))
        schema.write(boundary, buffer, message.rows, message.tokens)
        self.count["sent_later_bytes"] += len(buffer)
        self.in_flight.append(self._start(dist.isend, buffer, self.number + 1))

    def stopping(self, signal: int) -> int:
        now = self.signal  # in the headers of the step that just ended
        if self.is_first:
            self.signal = now or signal or self._asked()  # in the headers of the next one
        elif signal:
            self._ask("set", "stop", str(signal))
        return now

    def _asked(self) -> int:
        if time.monotonic() < self.next_question:
            return 0
        self.next_question = time.monotonic() + ASK_EVERY
        return int(self._ask("get", "stop")) if self._ask("check", ["stop"]) else 0

    # --- words

    def together(self, work: Callable[[], Any], main_first: bool = False) -> Any:
        name = self._name("together")
        main = self.stages - 1
        result, error = None, None
        spared = main_first and not self.is_last and json.loads(self._get(f"{name}/{main}", main))
        try:
            result = None if spared else work()
        except (ValueError, OSError) as raised:
            error = raised
        self._ask("set", f"{name}/{self.number}", json.dumps(error is not None))
        failures = [s for s in range(self.stages) if json.loads(self._get(f"{name}/{s}", s))]
        if failures and failures[-1] != self.number:
            leave_the_word()  # to the main process, or the last stage that failed
        if error is not None:
            raise error
        return result

    def gather(self, value: Any) -> list[Any]:
        name = self._name("gather")
        self._ask("set", f"{name}/{self.number}", json.dumps(value))
        return [json.loads(self._get(f"{name}/{s}", s)) for s in range(self.stages)]

    def pass_on(self, rows: list[Any]) -> list[Any] | None:
        name = self._name("rows")
        if not self.is_first:
            rows = json.loads(self._get(f"{name}/{self.number - 1}", self.number - 1)) + rows
        if self.is_last:
            return rows
        self._set(f"{name}/{self.number}", json.dumps(rows).encode(), "sent_later_bytes")
        return None

    def take(self) -> dict[str, Tensor]:
        if self.is_first:
            return {}
        found = load(self._get(f"tensors/{self.words['tensors']}/{self.number - 1}", self.number - 1))
        return {name: tensor.to(self.device) for name, tensor in found.items()}

    def give(self, tensors: dict[str, Tensor]) -> None:
        name = self._name("tensors")
        if not self.is_last:
            plain = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
            self._set(f"{name}/{self.number}", save(plain), "sent_later_bytes")

    def tell(self, value: Callable[[], Any]) -> Any:
        name = self._name("tell")
        if self.is_last:
            said = value()
            self._set(name, json.dumps(said).encode(), "told_bytes")
            return said
        return json.loads(self._get(name, self.stages - 1))

    def failed(self, error: Exception) -> None:
        if isinstance(error, ConnectionError) or self.has_failed:
            return
        self.has_failed = True
        status = 2 if isinstance(error, (ValueError, OSError)) else 1
        with suppress(RuntimeError):  # the store may be gone, too
            first = self.store.add("failures", 1) == 1
            if not first:  # a consequence of the other's
                leave_the_word(status)
            self.store.set("failure", str(status))

    def statistics(self) -> dict[str, float]:
        return {**self.count, **{f"waited_{what}": seconds for what, seconds in self.waited.items()}}

    # --- below

    def _rank(self, stage: int) -> int:
        return self.stages - 1 - stage

    def _name(self, kind: str) -> str:
        """The key of the next word of its kind, equal in all processes: they exchange the same words in one order."""
        number = self.words[kind]
        self.words[kind] += 1
        return f"{kind}/{number}"

    def _set(self, key: str, value: bytes, counter: str) -> None:
        self.count[counter] += len(value)
        self._ask("set", key, value)

    def _ask(self, what: str, *args: Any) -> Any:
        """A call of the store, which the launcher or the main process holds."""
        try:
            return getattr(self.store, what)(*args)
        except RuntimeError as error:
            raise self._lost(self.stages - 1, error) from None

    def _get(self, key: str, peer: int) -> bytes:
        """The value under a key, as soon as `peer` has set it."""
        deadline, pause = time.monotonic() + self.timeout, 0.0005
        try:
            while not self.store.check([key]):  # not `wait`, which prints on a timeout
                self._end_with_failed()
                if time.monotonic() > deadline:
                    raise self._lost(peer)
                time.sleep(pause)
                pause = min(0.05, 1.2 * pause)
            return bytes(self.store.get(key))
        except RuntimeError as error:
            raise self._lost(peer, error) from None

    def _start(self, transfer: Callable[[Tensor, int], Any], buffer: Tensor, peer: int) -> Any:
        try:
            return transfer(buffer, self._rank(peer))
        except RuntimeError as error:  # the connection was already closed
            raise self._lost(peer, error) from None

    def _wait(self, work: dist.Work, what: str, peer: int) -> None:
        start = time.perf_counter()
        try:
            work.wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            silent = time.perf_counter() - start > 0.9 * self.timeout
            raise self._lost(peer, None if silent else error) from None
        self.waited[what] += time.perf_counter() - start

    def _end_with_failed(self) -> None:
        if self.store_is_gone:
            return
        try:
            if self.store.check(["failure"]):
                leave_the_word(int(self.store.get("failure")))
        except RuntimeError:  # each further query would print a stack trace
            self.store_is_gone = True

    def _lost(self, peer: int, error: Exception | None = None) -> ConnectionError:
        """Ends silently if another process has reported, or soon reports, what went wrong; else returns the error. None
        for `error`: the peer has not said anything for too long."""
        end = time.monotonic() + SILENCE
        while time.monotonic() < end:
            self._end_with_failed()
            time.sleep(0.1)
        with suppress(RuntimeError):
            if not self.store_is_gone and self.store.add("lost", 1) > 1:
                leave_the_word()  # another process lost a peer first; this is a consequence
        reason = f"no word for {self.timeout:g} seconds"
        if error is not None:
            reason = re.sub(r"^\[.*?\] ", "", str(error).splitlines()[0]).split(". This is ")[0].rstrip(".?")
        return ConnectionError(
            f"Stage {self.number} lost stage {peer} at {self.at}: {reason}. "
            "--resume_from_checkpoint last continues from the last checkpoint."
        )


class _Ring:
    """Buffers that are used in turn, and grow to the largest boundary."""

    def __init__(self, count: int, device: torch.device):
        self.buffers = [torch.empty(0, dtype=torch.uint8, device=device)] * count
        self.turn = 0

    def next(self, size: int) -> Tensor:
        self.turn = (self.turn + 1) % len(self.buffers)
        if len(self.buffers[self.turn]) < size:
            self.buffers[self.turn] = torch.empty(size, dtype=torch.uint8, device=self.buffers[0].device)
        return self.buffers[self.turn][:size]


def connect(stages: int, device: torch.device, timeout: float) -> Alone:
    """The transport of this process; accelerate has already started its process group."""
    return ALONE if stages == 1 else Neighbours(stages - 1 - dist.get_rank(), stages, device, timeout)
