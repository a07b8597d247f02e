"""A train split that is read while it is used, for data that is too large to download or to keep.

It is read in windows, and each window is shuffled and batched like an epoch of a small data set. The batches follow
from (rows, window size, seed): a resumed run finds its place by reading from the start. Every process reads the stream
by itself, unless `--dispatch_data` says otherwise.
"""

import hashlib
import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from ..arguments import TrainingArguments
from .batching import BatchOrder, token_lengths

logger = logging.getLogger(__name__)

KEPT = 8  # windows: two readers go over them, one a few batches ahead of the other
HINT = "Labels and columns are those of the first {} rows of the stream; more of them: --streaming_buffer_size."


class Windows:
    """The rows of a stream in windows, pass after pass.

    Args:
        rows: the stream.
        size: rows of a window; the last one of a pass may be smaller.
    """

    def __init__(self, rows: IterableDataset, size: int):
        self.rows, self.size = rows, size
        self.total: int | None = None  # rows of a pass, once its end was seen

    def __iter__(self) -> Iterator[Dataset]:
        """Without an end.

        Raises:
            ValueError: the stream has no rows.
        """
        while True:
            window, total = None, 0
            for columns in self.rows.iter(self.size):
                window = window_of(columns, self.rows.features)
                total += len(window)
                yield window
            if window is None:
                raise ValueError("Expected rows in the train split, got an empty stream.")
            self.total = total


def window_of(columns: dict[str, list[Any]], features: Any) -> Dataset:
    """Rows as a data set. In a column of numbers, a csv file may have later cells that are none: all become texts."""
    try:
        return Dataset.from_dict(dict(columns), features=features)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        mixed = {n: [None if v is None else str(v) for v in column] for n, column in columns.items() if _mixed(column)}
        if not mixed:
            raise
        return Dataset.from_dict({**columns, **mixed}, features=features)


def _mixed(column: list[Any]) -> bool:
    kinds = {type(value) for value in column}
    return str in kinds and len(kinds - {type(None)}) > 1


def open_windows(args: TrainingArguments, splits: IterableDatasetDict | DatasetDict) -> tuple[Windows, DatasetDict]:
    """The stream of the train split, and the splits to prepare a run with: its first window, and all of the others.

    Args:
        args: `streaming_buffer_size` and `max_train_samples`.
        splits: train is a stream; validation, and test if there is one, are read to their ends.

    Raises:
        ValueError: a train split that is no stream, or no validation split.
    """
    train = splits["train"]
    if not isinstance(train, IterableDataset):
        raise ValueError("Expected an IterableDataset as train with streaming, got a Dataset. Leave streaming out.")
    if "validation" not in splits:
        raise ValueError(
            "Expected a validation split with streaming, got none: no share can be cut from a stream whose length is "
            "unknown. Pass --validation_file or --validation_split_name."
        )
    if args.max_train_samples is not None:
        train = train.take(args.max_train_samples)
    windows = Windows(train, args.streaming_buffer_size)
    others = {name: whole(rows) for name, rows in splits.items() if name in ("validation", "test")}
    return windows, DatasetDict({"train": next(iter(windows)), **others})


def whole(rows: Dataset | IterableDataset) -> Dataset:
    """A split, read to its end if it is a stream."""
    if isinstance(rows, Dataset):
        return rows
    columns: dict[str, list[Any]] = {}
    for part in rows.iter(1000):
        for name, values in part.items():
            columns.setdefault(name, []).extend(values)
    return window_of(columns, rows.features if columns else None)


@dataclass
class StreamOrder:
    """Which rows of a stream make up which batch, and the rows: for training, what `BatchOrder` and the tokenized split
    are together. Rows are numbered from the start, pass after pass.

    Args:
        windows: the raw rows.
        encode: a window of raw rows -> `input_ids` and `label`.
        features: of what `encode` returns.
        batch_size: rows per global batch.
        seed: of the run.
    """

    windows: Windows
    encode: Callable[[Dataset], Dataset]
    features: Any
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        self.lengths = StreamLengths(self)
        self._begin()

    def _begin(self) -> None:
        """Reads from the start."""
        self._reader = iter(self.windows)
        self.first_rows, self.first_steps = [0], [0]  # of each window that was read, and of the next one
        self.digests: list[str] = []  # of all rows up to the end of each window
        self._raw: dict[int, Dataset] = {}
        self._encoded: dict[int, tuple[Dataset, np.ndarray]] = {}

    def steps(self, first: int, last: int) -> Iterator[tuple[int, np.ndarray]]:
        """(step, rows) of the optimizer steps `first` .. `last` - 1; reads on where needed."""
        step = first
        while step < last:
            number = self._number_of_step(step)
            for rows in self._batches(number)[step - self.first_steps[number] :][: last - step]:
                yield step, self.first_rows[number] + rows
                step += 1

    def __getitem__(self, rows: np.ndarray) -> dict[str, list]:
        """The columns of some rows, all of one window."""
        number = self._number(rows)
        return self._window(number)[0][rows - self.first_rows[number]]

    def _number(self, rows: np.ndarray) -> int:
        return bisect_right(self.first_rows, int(rows[0])) - 1

    def _number_of_step(self, step: int) -> int:
        """The window that a step is in; reads on where needed."""
        while self.first_steps[-1] <= step:
            self._read()
        return bisect_right(self.first_steps, step) - 1

    def _batches(self, number: int) -> list[np.ndarray]:
        return BatchOrder(self._window(number)[1], self.batch_size, self.seed).epoch(number)

    def _read(self) -> None:
        number, rows = len(self.first_rows) - 1, next(self._reader)
        before = self.digests[-1] if self.digests else ""
        self.digests.append(hashlib.sha256(f"{before} {rows.to_dict()}".encode(errors="replace")).hexdigest()[:16])
        self.first_rows.append(self.first_rows[-1] + len(rows))
        self.first_steps.append(self.first_steps[-1] - (-len(rows) // self.batch_size))
        self._raw[number] = rows
        for kept in (self._raw, self._encoded):
            kept.pop(number - KEPT, None)

    def _window(self, number: int) -> tuple[Dataset, np.ndarray]:
        """A window, tokenized, and the tokens of each row."""
        if number not in self._encoded:
            try:
                window = self.encode(self._raw[number])
            except ValueError as error:
                first, last = self.first_rows[number], self.first_rows[number + 1] - 1
                error.add_note(f"In rows {first} to {last} of the stream. {HINT.format(self.first_rows[1])}")
                raise
            self._encoded[number] = window, token_lengths(window)
        return self._encoded[number]

    def examples(self, steps: int) -> int:
        """How many examples so many steps train on."""
        number = self._number_of_step(max(0, steps - 1))
        return self.first_rows[number] + sum(map(len, self._batches(number)[: steps - self.first_steps[number]]))

    def rows(self, steps: int) -> int:
        """How many different rows these are."""
        return min(self.examples(steps), self.windows.total or self.first_rows[-1])

    def read_up_to(self, steps: int) -> list[str]:
        """What the rows are known by that so many steps need, to compare with a stream that is read again."""
        number = self._number_of_step(max(0, steps - 1))
        if number not in self._raw:  # given up, on the way to a later checkpoint that turned out to be damaged
            self._begin()
            number = self._number_of_step(max(0, steps - 1))
        return self.digests[: number + 1]

    def size(self) -> str:
        return f"a stream, in windows of {self.windows.size} rows"

    def place(self, step: int) -> str:
        """Where a run is after `step` steps."""
        return f"step {step}"


@dataclass(frozen=True)
class StreamLengths:
    """The tokens of rows by their numbers."""

    order: StreamOrder

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        number = self.order._number(rows)
        return self.order._window(number)[1][rows - self.order.first_rows[number]]
