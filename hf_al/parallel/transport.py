"""Communication of processes: boundaries from stage to stage, gradients between replicas, and a few other words.

The last stage of the first replica is rank 0, the main process: boundaries, and the rows of logs and metrics after
them, travel forward and end where trackers, checkpoints and the report are written. Only a verdict at an evaluation
goes back (`tell`), and what a checkpoint holds, before and after the steps.

Boundaries go point to point, within a replica; so do files and rows of data that other processes do not find. Gradients
are summed over the replicas of a stage. Everything else is json, or small tensors as safetensors, in the store that the
process group has anyway: writing there never waits, and its content outlives a process that dies.
"""

import itertools
import json
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from ..modeling.objectives import Boundary
from .alone import ALONE, FILES, ROWS, Alone
from .launch import end_unreported
from .placement import rank_of
from .schema import ALIGNMENT, Message, Ring, Schema

RUNS = itertools.count()  # of this process: each has words of its own
AHEAD = 2  # receives that are posted ahead, and sends in flight
ASK_EVERY = 0.2  # seconds after which the first stage checks again whether another one was told to stop
PIECE = 2**26  # bytes of a file that are sent at once: each piece has the whole timeout
KINDS = {FILES: "evaluation", ROWS: "rows"}  # what a wait for them counts as
SILENCE = 3.0  # seconds for a process that failed to report why


class Neighbours(Alone):
    """One of several processes.

    Args:
        stages, replicas: how many there are; the rank says which ones this process is.
        device: of the boundaries.
        timeout: seconds that a peer may be silent.
    """

    def __init__(self, stages: int, replicas: int, device: torch.device, timeout: float):
        place, self.replica = divmod(dist.get_rank(), replicas)
        self.number, self.main = stages - 1 - place, stages * replicas - 1
        self.stages, self.replicas, self.device, self.timeout = stages, replicas, device, timeout
        self.is_first, self.is_last = self.number == 0, self.number == stages - 1
        self.process = self.main - dist.get_rank()  # whatever other processes think of stages and replicas
        self.is_main = self.process == self.main
        self.before, self.after = self.process - replicas, self.process + replicas  # its neighbours in its replica
        self.group: dist.ProcessGroup | None = None  # of the replicas of this stage
        self.everybody: dist.ProcessGroup | None = None  # for files and rows
        self.under_way: dict[int, list[tuple[Tensor, dist.Work, int]]] = {FILES: [], ROWS: []}  # and to which process
        self.store = dist.PrefixStore(f"hf_al/{next(RUNS)}", dist.distributed_c10d._get_default_store())
        self.incoming: dict[str, Schema] = {}
        self.outgoing: dict[str, Schema] = {}
        self.coming: Iterator[Message] = iter(())
        self.posted: deque[tuple[Message, Tensor, dist.Work]] = deque()
        self.inbox, self.outbox = Ring(AHEAD + 1, device), Ring(AHEAD, device)
        self.in_flight: deque[dist.Work] = deque()
        self.signal = self.wanted = 0  # that all stop at the end of this step; that was asked of them
        self.agreed: int | Tensor = 0  # among the replicas of the first stage, for the next step
        self.store_is_gone = self.has_failed = False
        self.next_question = 0.0
        self.at = "the start"
        self.words = {"together": 0, "gather": 0, "rows": 0, "tensors": 0, "tell": 0}  # how many of each so far
        self.count = dict.fromkeys(
            ("sent_later_bytes", "received_bytes", "told_bytes", "summed_bytes", "boundary_bytes"), 0
        )
        self.waited = dict.fromkeys(("receive", "send", "sum", "rows", "evaluation"), 0.0)

    def meet(self) -> None:
        if self.replicas == 1:
            return
        ranks = [[rank_of(s, self.stages, r, self.replicas) for r in range(self.replicas)] for s in range(self.stages)]
        timeout = timedelta(seconds=self.timeout)
        self.group, _ = self._begin(lambda: dist.new_subgroups_by_enumeration(ranks, timeout=timeout), self._others())

    def _others(self) -> str:
        return f"another replica of stage {self.number}"

    # --- boundaries

    def agree(
        self, kind: str, run: Callable[[int, int, Boundary | None], Boundary], wire: torch.dtype, longest: int
    ) -> None:
        incoming: Schema | None = None
        if not self.is_first:
            said = self._get(f"schema/{kind}/{self.before}", self.before)
            incoming = Schema.from_json(json.loads(said))
            self.incoming[kind] = incoming
        if self.is_last:
            return

        def throw_away(rows: int, tokens: int) -> Boundary:
            return run(rows, tokens, None if incoming is None else incoming.zeros(rows, tokens, self.device))

        self.outgoing[kind] = Schema.of(throw_away, wire, longest)
        said = json.dumps(self.outgoing[kind].as_json()).encode()
        self._set(f"schema/{kind}/{self.process}", said, "sent_later_bytes")

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
        self.posted.append(
            (message, buffer, self._begin(lambda: dist.irecv(buffer, self.main - self.before), self.who(self.before)))
        )
        return True

    def receive(self, message: Message, first: Callable[[], Boundary]) -> Boundary:
        self.at = f"step {message.step + 1}" if message.kind == "train" else "an evaluation"
        if self.is_first:
            if message.kind == "train" and message.micro_batch == 0:
                self.signal = self.signal or int(self.agreed)
            return first()
        if not self.posted:
            self._post()
        expected, buffer, work = self.posted.popleft()
        assert expected == message, f"expected {expected}, the loop is at {message}"
        self._wait(work, "receive" if message.kind == "train" else "evaluation", self.who(self.before))
        header = buffer[:ALIGNMENT].view(torch.int64).tolist()
        self.signal = header[6]
        if header != message.header(self.signal):
            raise RuntimeError(f"{self.who().capitalize()} expected {message}, {self.who(self.before)} sent {header}.")
        self.count["received_bytes"] += len(buffer)
        if not self.signal:  # else no more may come: the first stage may not even know what it would be
            self._post()  # into the buffer of the previous batch, which is done
        return self.incoming[message.kind].read(buffer, message.rows, message.tokens)

    def send(self, message: Message, boundary: Boundary) -> None:
        if self.is_last:
            return
        schema = self.outgoing[message.kind]
        if len(self.in_flight) == AHEAD:
            what = "send" if message.kind == "train" else "evaluation"
            self._wait(self.in_flight.popleft(), what, self.who(self.after))
        buffer = self.outbox.next(schema.size(message.rows, message.tokens))
        buffer[:ALIGNMENT].view(torch.int64).copy_(torch.tensor(message.header(self.signal)))
        schema.write(boundary, buffer, message.rows, message.tokens)
        self.count["sent_later_bytes"] += len(buffer)
        self.count["boundary_bytes"] += len(buffer) if message.kind == "train" else 0
        self.in_flight.append(self._begin(lambda: dist.isend(buffer, self.main - self.after), self.who(self.after)))

    def stopping(self, signal: int) -> int:
        now = self.signal  # in the headers of the step that just ended
        if self.is_first and self.replica == 0:
            self.wanted = self.wanted or signal or self._asked()
            if self.replicas == 1:
                self.agreed = self.wanted
        elif signal:
            self._ask("set", "stop", str(signal))
        return now

    def sum(self, tensors: list[Tensor]) -> Callable[[], None]:
        if self.replicas == 1:
            return lambda: None
        # The replicas of the first stage must all stop at the same step: the first one says so in the last entry.
        wanted = torch.full((1,), float(self.wanted if self.replica == 0 else 0), device=self.device)
        flat = torch.cat([*(t.flatten().float() for t in tensors), wanted])
        work = self._begin(lambda: dist.all_reduce(flat, group=self.group, async_op=True), self._others())

        def arrived() -> None:
            self._wait(work, "sum", self._others())
            self.count["summed_bytes"] += flat.nbytes
            if self.is_first:
                self.agreed = flat[-1].clone()
            for t, total in zip(tensors, flat[:-1].split([t.numel() for t in tensors]), strict=True):
                t.copy_(total.view_as(t))

        return arrived

    def from_first_replica(self, tensors: list[Tensor]) -> None:
        if self.replicas == 1:
            return
        for tensor in tensors:
            send = partial(dist.broadcast, tensor, group=self.group, group_src=0, async_op=True)
            self._wait(self._begin(send, self._others()), "evaluation", self._others())

    def _asked(self) -> int:
        if time.monotonic() < self.next_question:
            return 0
        self.next_question = time.monotonic() + ASK_EVERY
        return int(self._ask("get", "stop")) if self._ask("check", ["stop"]) else 0

    # --- files and rows

    def connect_all(self) -> None:
        timeout = timedelta(seconds=self.timeout)
        if self.everybody is None:
            self.everybody = self._begin(lambda: dist.new_group(backend="gloo", timeout=timeout), "another process")

    def send_bytes(self, content: bytes, processes: Iterable[int], kind: int = FILES) -> None:
        pieces = torch.frombuffer(bytearray(content), dtype=torch.uint8).split(PIECE)
        for process in processes:
            self.count["sent_later_bytes" if process > self.process else "told_bytes"] += len(content)
            for piece in pieces:
                send = partial(dist.isend, piece, self.main - process, group=self.everybody, tag=kind)
                self.under_way[kind].append((piece, self._begin(send, self.who(process)), process))

    def wait_sent(self, kind: int = FILES) -> None:
        while self.under_way[kind]:
            _, work, process = self.under_way[kind].pop(0)
            self._wait(work, KINDS[kind], self.who(process))

    def receive_bytes(self, size: int, process: int, kind: int = FILES) -> bytes:
        buffer = torch.empty(size, dtype=torch.uint8)
        for piece in buffer.split(PIECE):
            receive = partial(dist.irecv, piece, self.main - process, group=self.everybody, tag=kind)
            self._wait(self._begin(receive, self.who(process)), KINDS[kind], self.who(process))
        self.count["received_bytes"] += size
        return buffer.numpy().tobytes()

    # --- words

    def together(self, work: Callable[[], Any], main_first: bool = False) -> Any:
        name = self._name("together")
        result, error = None, None
        spared = main_first and not self.is_main and json.loads(self._get(f"{name}/{self.main}", self.main))
        try:
            result = None if spared else work()
        except ConnectionError:  # without another process there is no together
            raise
        except (ValueError, OSError) as raised:
            error = raised
        self._ask("set", f"{name}/{self.process}", json.dumps(error is not None))
        failures = [p for p in range(self.main + 1) if json.loads(self._get(f"{name}/{p}", p))]
        if failures and self.process != (self.main if self.main in failures else failures[-1]):
            end_unreported()  # to the main process, or the last one that failed
        if error is not None:
            raise error
        return result

    def gather(self, value: Any) -> list[Any]:
        name = self._name("gather")
        self._ask("set", f"{name}/{self.process}", json.dumps(value))
        return [json.loads(self._get(f"{name}/{p}", p)) for p in range(self.main + 1)]

    def pass_on(self, rows: list[Any]) -> list[Any] | None:
        name = self._name("rows")
        if not self.is_first:
            rows = json.loads(self._get(f"{name}/{self.before}", self.before)) + rows
        if self.is_last:
            return rows
        self._set(f"{name}/{self.process}", json.dumps(rows).encode(), "sent_later_bytes")
        return None

    def take(self) -> dict[str, Tensor]:
        if self.is_first:
            return {}
        found = load(self._get(f"tensors/{self.words['tensors']}/{self.before}", self.before))
        return {name: tensor.to(self.device) for name, tensor in found.items()}

    def give(self, tensors: dict[str, Tensor]) -> None:
        name = self._name("tensors")
        if not self.is_last:
            plain = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
            self._set(f"{name}/{self.process}", save(plain), "sent_later_bytes")

    def tell(self, value: Callable[[], Any]) -> Any:
        name = self._name("tell")
        if self.is_main:
            said = value()
            self._set(name, json.dumps(said).encode(), "told_bytes")
            return said
        return json.loads(self._get(name, self.main))

    def failed(self, error: Exception) -> None:
        if self.has_failed:
            return
        self.has_failed = True
        status = 2 if isinstance(error, (ValueError, OSError)) else 1
        with suppress(RuntimeError):  # the store may be gone, too
            first = self.store.add("failures", 1) == 1
            if not first:  # a consequence of the other's
                end_unreported(status)
            self.store.set("failure", str(status))

    def statistics(self) -> dict[str, float]:
        return {**self.count, **{f"waited_{what}": seconds for what, seconds in self.waited.items()}}

    # --- below

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
            raise self._lost(self.who(self.main), error) from None

    def _get(self, key: str, process: int) -> bytes:
        """The value under a key, as soon as `process` has set it."""
        deadline, pause = time.monotonic() + self.timeout, 0.0005
        try:
            while not self.store.check([key]):  # not `wait`, which prints on a timeout
                self._end_with_failed()
                if time.monotonic() > deadline:
                    raise self._lost(self.who(process))
                time.sleep(pause)
                pause = min(0.05, 1.2 * pause)
            return bytes(self.store.get(key))
        except RuntimeError as error:
            raise self._lost(self.who(process), error) from None

    def _begin(self, transfer: Callable[[], Any], peer: str) -> Any:
        try:
            return transfer()
        except RuntimeError as error:  # the connection was already closed
            raise self._lost(peer, error) from None

    def _wait(self, work: dist.Work, what: str, peer: str) -> None:
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
                end_unreported(int(self.store.get("failure")))
        except RuntimeError:  # each further query would print a stack trace
            self.store_is_gone = True

    def _lost(self, peer: str, error: Exception | None = None) -> ConnectionError:
        """Ends silently if another process has reported, or soon reports, what went wrong; else returns the error. None
        for `error`: the peer has not said anything for too long."""
        end = time.monotonic() + SILENCE
        while time.monotonic() < end:
            self._end_with_failed()
            time.sleep(0.1)
        with suppress(RuntimeError):
            if not self.store_is_gone and self.store.add("lost", 1) > 1:
                end_unreported()  # another process lost a peer first; this is a consequence
        reason = f"no word for {self.timeout:g} seconds"
        if error is not None:
            reason = re.sub(r"^\[.*?\] ", "", str(error).splitlines()[0]).split(". This is ")[0].rstrip(".?")
        return ConnectionError(
            f"{self.who().capitalize()} lost {peer} at {self.at}: {reason}. "
            "--resume_from_checkpoint last continues from the last checkpoint."
        )


def connect(stages: int, replicas: int, device: torch.device, timeout: float) -> Alone:
    """The transport of this process; accelerate has already started its process group."""
    return ALONE if stages * replicas == 1 else Neighbours(stages, replicas, device, timeout)
