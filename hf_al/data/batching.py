"""The batch order: deterministic, length-bucketed, resumable; and the collator.

The order depends on (seed, epoch) and nothing else, so that every stage can compute it alone and a resumed run
finds its place by counting.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from torch import Tensor

from .numeric import VALUES

Item = TypeVar("Item")
BUCKET_BATCHES = 50  # batches that are sorted by length together: little padding, still well mixed


@dataclass(frozen=True)
class BatchOrder:
    """Which rows make up which batch.

    Args:
        lengths: tokens of each row.
        batch_size: rows per global batch (micro-batch x accumulation x replicas).
        seed: of the run.
    """

    lengths: np.ndarray
    batch_size: int
    seed: int

    def __len__(self) -> int:
        """Batches, and so optimizer steps, per epoch; the last batch of an epoch may be smaller."""
        return -(-len(self.lengths) // self.batch_size)

    def epoch(self, number: int) -> list[np.ndarray]:
        """The batches of an epoch, as row numbers. Every row appears once."""
        rng = np.random.default_rng([self.seed, number])
        rows = rng.permutation(len(self.lengths))
        batches = []
        for start in range(0, len(rows), self.batch_size * BUCKET_BATCHES):
            bucket = rows[start : start + self.batch_size * BUCKET_BATCHES]
            bucket = bucket[np.argsort(self.lengths[bucket], kind="stable")]
            batches += [bucket[i : i + self.batch_size] for i in range(0, len(bucket), self.batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def examples(self, steps: int) -> float:
        """How many examples so many steps train on."""
        return steps / len(self) * len(self.lengths)

    def size(self) -> str:
        return f"{len(self.lengths)} rows, {len(self)} steps per epoch"

    def place(self, step: int) -> str:
        """Where a run is after `step` steps."""
        return f"epoch {step / len(self):.2f} step {step}"

    def steps(self, first: int, last: int) -> Iterator[tuple[int, np.ndarray]]:
        """(step, rows) of the optimizer steps `first` .. `last` - 1, counted from 0 over all epochs."""
        epoch, batches = -1, []
        for step in range(first, last):
            if step // len(self) != epoch:
                epoch = step // len(self)
                batches = self.epoch(epoch)
            yield step, batches[step % len(self)]


class MicroBatch(NamedTuple):
    """Rows that are computed together, and their share of the global batch."""

    rows: np.ndarray
    weight: float


def micro_batches(rows: np.ndarray, parts: int, replica: int = 0, replicas: int = 1) -> list[MicroBatch]:
    """What one replica computes of a global batch, which is cut into `parts` parts for each replica. Sizes differ by at
    most one row. If there are fewer rows than parts, there are fewer parts; a replica without any gets a row of another
    one, with weight 0, because every replica takes every step."""
    cut = [part for part in np.array_split(rows, parts * replicas) if len(part)]
    mine = [MicroBatch(part, len(part) / len(rows)) for part in cut[replica::replicas]]
    return mine or [MicroBatch(rows[:1], 0.0)]


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items, each handed out only when the next one has been made."""
    made: list[Item] = []
    for item in items:
        made.append(item)
        if len(made) == 2:
            yield made.pop(0)
    yield from made


def evaluation_batches(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """All rows in batches of similar length, shortest first; depends on the lengths alone."""
    rows = np.argsort(lengths, kind="stable")
    return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]


def spread(count: int, most: int) -> np.ndarray:
    """At most so many of `count` rows, evenly spread: files may be sorted by class."""
    return np.linspace(0, count - 1, min(count, most)).astype(int)


def token_lengths(data: Dataset) -> np.ndarray:
    """Tokens of each row, read from the Arrow columns without making Python lists."""
    import pyarrow.compute as pc

    column = data.with_format("arrow")[:]["input_ids"]
    return pc.list_value_length(column).to_numpy().astype(np.int64)


@dataclass(frozen=True)
class Collator:
    """Rows of a tokenized split -> `input_ids`, `attention_mask` (N, T) and `labels`, padded to the longest row; and
    `numeric_values` (N, F) in float64 if the split has any."""

    pad_token_id: int
    num_labels: int

    def __call__(self, data: Any, rows: np.ndarray) -> dict[str, Tensor]:
        batch = data[rows]
        texts = batch["input_ids"]
        longest = max(1, max(len(t) for t in texts))
        input_ids = np.full((len(texts), longest), self.pad_token_id, dtype=np.int64)
        mask = np.zeros((len(texts), longest), dtype=np.int64)
        for i, text in enumerate(texts):
            input_ids[i, : len(text)] = text
            mask[i, : len(text)] = 1
        labels = self.labels(data.features["label"], batch["label"])
        values = {VALUES: torch.tensor(batch[VALUES], dtype=torch.float64)} if VALUES in batch else {}
        texts = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask)}
        return {**texts, "labels": labels, **values}

    def labels(self, feature: Any, labels: Any) -> Tensor:
        """The label column as a tensor: ids (N,), multi-hot rows (N, C) or values (N,)."""
        if isinstance(feature, ClassLabel):
            return torch.tensor(list(labels))
        if not hasattr(feature, "feature"):
            return torch.tensor(list(labels), dtype=torch.float32)
        hot_NC = torch.zeros(len(labels), self.num_labels)
        for i, ids in enumerate(labels):
            hot_NC[i, ids] = 1.0
        return hot_NC

    def all_labels(self, data: Dataset) -> np.ndarray:
        """The labels of a split, as the metrics need them."""
        return self.labels(data.features["label"], data["label"][:]).numpy()
