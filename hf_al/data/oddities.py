"""What is odd about data, and makes results mean less than they seem to."""

import itertools
from collections.abc import Iterator

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

MOST_SHARED = 0.1  # of a split's texts; real data sets share short ones ("thank you") with train
MOST_UNKNOWN = 0.4  # of a split's tokens; a few hundred short texts have up to 0.3


def data_warnings(
    data: DatasetDict, label_names: list[str], tokenizer: PreTrainedTokenizerBase | None = None, is_trained: bool = True
) -> list[str]:
    """What is odd about tokenized splits: texts that are in train as well, labels that read like missing values, and
    unknown words. `is_trained`: the tokenizer is one of this run, so that its settings are the cure."""
    messages = _unknown_warnings(data, tokenizer, is_trained) if tokenizer else []
    unknown = tokenizer.unk_token_id if tokenizer else None
    known = set(_text_hashes(data["train"], unknown)) - {None}
    for name in (n for n in data if n != "train"):
        shared = sum(text in known for text in _text_hashes(data[name], unknown))
        if shared > MOST_SHARED * len(data[name]):
            messages.append(
                f"{shared} of {len(data[name])} {name} texts are in train as well, word for word: their results say "
                "little about new text."
            )
    for label in label_names:
        if label.lower() in ("nan", "null", "none"):
            messages.append(f"The label {label!r} reads like a missing value, and is learned like any other class.")
    return messages


def _unknown_warnings(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, is_trained: bool) -> list[str]:
    unknown, specials = tokenizer.unk_token_id, tokenizer.all_special_ids
    messages = []
    for name in data if unknown is not None else ():
        missed = total = 0
        for offsets, values in _token_chunks(data[name]):
            tokens = values[offsets[0] : offsets[-1]]
            count = int(np.count_nonzero(tokens == unknown))
            missed, total = missed + count, total + count + int(np.count_nonzero(~np.isin(tokens, specials)))
        if missed > MOST_UNKNOWN * total:
            advice = "Another tokenizer is needed, or a model with another one."
            if is_trained:
                advice = "Pass --tokenizer_type bpe, which knows all characters and needs no spaces between words."
            messages.append(
                f"{missed / total:.0%} of the words of {name} are unknown, so that different texts look the same to "
                f"the model. {advice}"
            )
    return messages


def _text_hashes(data: Dataset, unknown: int | None) -> Iterator[int | None]:
    """A number for each row that depends on its tokens alone; None if half of its words or more are `unknown`, so that
    nobody knows which text it was."""
    for offsets, values in _token_chunks(data):
        before = np.concatenate([[0], np.cumsum(values == unknown)])
        for a, b in itertools.pairwise(offsets):
            count, words = before[b] - before[a], b - a - 2  # there is a special token on either side
            yield None if count and 2 * count >= words else hash(values[a:b].tobytes())


def _token_chunks(data: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The tokens of many rows in one array, with the places where a row begins and ends."""
    for rows in data.with_format("arrow").iter(10_000):
        for chunk in rows["input_ids"].chunks:
            yield chunk.offsets.to_numpy(), chunk.values.to_numpy()
