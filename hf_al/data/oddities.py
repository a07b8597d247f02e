"""What is odd about data, and makes results mean less than they seem to."""

import itertools
from collections.abc import Iterator

import pyarrow as pa
from datasets import Dataset, DatasetDict

MOST_SHARED = 0.1  # of a split's texts; real data sets share short ones ("thank you") with train


def data_warnings(data: DatasetDict, label_names: list[str]) -> list[str]:
    """What is odd about tokenized splits: texts that are in train as well, labels that read like missing values."""
    messages = []
    known = set(_text_hashes(data["train"]))
    for name in (n for n in data if n != "train"):
        shared = sum(text in known for text in _text_hashes(data[name]))
        if shared > MOST_SHARED * len(data[name]):
            messages.append(
                f"{shared} of {len(data[name])} {name} texts are in train as well, word for word: their results say "
                "little about new text."
            )
    for label in label_names:
        if label.lower() in ("nan", "null"):
            messages.append(f"The label {label!r} reads like a missing value, and is learned like any other class.")
    return messages


def _text_hashes(data: Dataset) -> Iterator[int]:
    """A number for each row that depends on its tokens alone."""
    for start in range(0, len(data), 10_000):
        tokens = data.with_format("arrow")[start : start + 10_000]["input_ids"]
        for chunk in tokens.chunks if isinstance(tokens, pa.ChunkedArray) else [tokens]:
            offsets = chunk.offsets.to_numpy()
            values = chunk.values.to_numpy()
            yield from (hash(values[a:b].tobytes()) for a, b in itertools.pairwise(offsets))
