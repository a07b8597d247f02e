"""What the training loop says to other processes, and what it means if there are none."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..modeling.objectives import Boundary
from .schema import Message

FILES, ROWS = 0, 1  # what travels beside boundaries: of checkpoints, and of data


class Alone:
    """One process: its stage receives the data, and what it sends is dropped.

    Attributes:
        number, stages: which stage this is, and how many there are.
        replica, replicas: which copy of the stage, and how many of each there are.
        process, main: the places of this process and of the main one in what `gather` returns.
        shares_folder: whether all processes find the files that the main process writes.
    """

    number, stages, replica, replicas, process, main = 0, 1, 0, 1, 0, 0
    is_first = is_last = is_main = shares_folder = True

    def who(self, process: int | None = None) -> str:
        """A process for people, by its place in what `gather` returns; this one if None."""
        stage, from_last = divmod(self.process if process is None else process, self.replicas)
        return f"stage {stage}" + f" of replica {self.replicas - 1 - from_last}" * (self.replicas > 1)

    def meet(self) -> None:
        """Connects the replicas of each stage; before anything is summed."""

    # --- boundaries

    def agree(
        self, kind: str, run: Callable[[int, int, Boundary | None], Boundary], wire: torch.dtype, longest: int
    ) -> None:
        """Fixes the schema of a kind of boundary, once. `run`: (rows, tokens, incoming boundary or None at the start)
        -> the boundary that this stage sends for such a throw-away batch; `longest`: tokens that a text can have."""

    def expect(self, messages: Iterable[Message]) -> None:
        """The messages that will be received next, in this order, so that receives can be posted ahead."""

    def receive(self, message: Message, first: Callable[[], Boundary]) -> Boundary:
        """The boundary from the stage before; the first stage starts with `first()`."""
        return first()

    def send(self, message: Message, boundary: Boundary) -> None:
        """Sends the boundary to the next stage, as it is now."""

    def sum(self, tensors: list[Tensor]) -> Callable[[], None]:
        """Starts to sum the tensors, element by element, over the replicas of this stage. What it returns waits, and
        puts the sums in their place."""
        return lambda: None

    def from_first_replica(self, tensors: list[Tensor]) -> None:
        """Gives the tensors the values that they have in the first replica of this stage."""

    def stopping(self, signal: int) -> int:
        """After a step: the signal that makes all stages stop here, 0 for none. `signal`: what this process got."""
        return signal

    # --- files and rows that other processes do not find by themselves

    def connect_all(self) -> None:
        """Before the first of them is sent: by all processes at the same point."""

    def first_of(self, stage: int) -> int:
        """The process of the first replica of a stage."""
        return (stage + 1) * self.replicas - 1

    def send_bytes(self, content: bytes, processes: Iterable[int], kind: int = FILES) -> None:
        """Starts to send something whose size the `processes` know."""
        raise NotImplementedError

    def wait_sent(self, kind: int = FILES) -> None:
        """Until all of a kind that was sent has arrived."""

    def receive_bytes(self, size: int, process: int, kind: int = FILES) -> bytes:
        """The next of a kind that `process` sends to this one."""
        raise NotImplementedError

    # --- words

    def together(self, work: Callable[[], Any], main_first: bool = False) -> Any:
        """`work()` in every process. If it fails in some, one of them reports why and all end."""
        return work()

    def gather(self, value: Any) -> list[Any]:
        """The json values of all processes, stage by stage, in every process."""
        return [value]

    def pass_on(self, rows: list[Any]) -> list[Any] | None:
        """The json rows of all stages of this replica, in order, at the last one; None elsewhere. Nobody waits for a
        later stage."""
        return rows

    def take(self) -> dict[str, Tensor]:
        """The small tensors given by the stage before; none for the first stage."""
        return {}

    def give(self, tensors: dict[str, Tensor]) -> None:
        """Small tensors for the next stage."""

    def tell(self, value: Callable[[], Any]) -> Any:
        """The json value of the main process, in every process. All wait for it."""
        return value()

    def failed(self, error: Exception) -> None:
        """Tells the others that this process ends with an error that it will show."""

    def statistics(self) -> dict[str, float]:
        """Bytes by direction, and seconds of waiting: in training by `receive`, `send`, `sum` and `rows`; in
        `evaluation`, and for files."""
        return {}


ALONE = Alone()  # it has no state
