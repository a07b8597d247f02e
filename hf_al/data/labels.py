"""Labels of every kind as ids or numbers; their names come from the train split, or from a trained model.

The encoded column `label` is a class id with a `ClassLabel` feature (single label), a list of such ids (multi-label) or
a float (regression), so that its feature alone tells the problem type and the names.
"""

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, time
from decimal import Decimal
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value
from datasets import List as ListFeature

from ..modeling.limits import MULTI, REGRESSION, SINGLE

NO_LABEL = (
    "Expected a label in every row, got none in row {} (from 0) of the {} split. Remove the row, or fill the label in."
)


def encode_labels(
    data: Mapping[str, Dataset], problem_type: str | None, names: list[str] | None = None
) -> dict[str, Dataset]:
    """The splits with their column `label` encoded.

    Args:
        data: split name -> rows with a column `label`.
        problem_type: guessed from the values of the first split if None.
        names: classes of a trained model; those of the split `train` if None.

    Raises:
        ValueError: missing labels, labels that are not among the names, fewer than two classes.
    """
    first = next(iter(data.values()))
    _refuse_object(first.features["label"])
    problem_type = problem_type or guess_problem_type(first)
    if problem_type == REGRESSION:
        return {split: _with_labels(rows, _numbers(rows, split), Value("float32")) for split, rows in data.items()}
    is_hot = problem_type == MULTI and _class_names(first) is None and _is_multi_hot(first["label"][:], names)
    lists = {split: _names(rows, split, problem_type, is_hot) for split, rows in data.items()}
    if names is None:
        names = _class_names(first) or sorted({name for row in lists["train"] for name in row}, key=_sort_key)
        seen = {name for row in lists["train"] for name in row}
        if len(seen) < (2 if problem_type == SINGLE else 1):
            raise ValueError(
                f"Expected at least two classes in train, got only {', '.join(seen) or 'none'}. Add rows of another "
                "class, or name the label column: --label_column_name."
            )
    ids = {name: i for i, name in enumerate(names)}
    feature = ClassLabel(names=names)
    encoded = {}
    for split, rows in lists.items():
        unknown = sorted({name for row in rows for name in row} - ids.keys())
        if unknown:
            raise ValueError(
                f"Expected the labels {', '.join(names[:20])} in the {split} split, got {unknown[:5]} too. "
                "Add such rows to train, or remove them."
            )
        values = [[ids[name] for name in row] for row in rows]
        if problem_type == SINGLE:
            encoded[split] = _with_labels(data[split], [row[0] for row in values], feature)
        else:
            encoded[split] = _with_labels(data[split], values, ListFeature(feature))
    return encoded


def guess_problem_type(rows: Dataset) -> str:
    """Lists are multi-label, numbers with a fraction are regression, everything else is single label."""
    feature = rows.features["label"]
    if is_list(feature):
        return MULTI
    if feature in (Value("string"), Value("large_string")):
        _refuse_almost_numbers(rows["label"][:])
    is_float = getattr(feature, "dtype", "").startswith(("float", "decimal"))
    has_fraction = is_float and any(not _missing(v) and v != int(v) for v in rows["label"][:])
    return REGRESSION if has_fraction else SINGLE


def known_problem_type(rows: Dataset, problem_type: str, names: list[str]) -> str | None:
    """The problem type of a trained model, if labels can be meant as its own although they look like others: whole
    numbers for regression, and for several labels text with no other names. None if they look like what they are.

    Args:
        rows: raw ones, with a column `label`.
        problem_type, names: of the model.
    """
    labels, feature = rows["label"][:], rows.features["label"]
    if is_list(feature) or isinstance(feature, ClassLabel):
        return None
    if problem_type == REGRESSION and all(is_number(label) and not isinstance(label, bool) for label in labels):
        return REGRESSION
    if problem_type == MULTI and {name for row in _names(rows, "train", MULTI) for name in row} <= {*names}:
        return MULTI
    return None


def _refuse_almost_numbers(labels: Any) -> None:
    """One cell that is not a number makes text of a whole column: a regression would become a classification."""
    numbers = {label for label in labels if _is_fraction(label)}
    others = [row for row, label in enumerate(labels) if not is_number(label)]
    if len(numbers) > 10 and 0 < len(others) <= 0.1 * len(labels):
        raise ValueError(
            f"Expected labels that are all numbers, or names, got numbers and {labels[others[0]]!r} in row {others[0]} "
            f"(from 0), {len(others)} such in all. Remove these rows, or, if each number is a class, pass "
            "--problem_type single_label_classification."
        )


def is_number(label: Any) -> bool:
    """Whether it is a finite number, or text that is one."""
    try:
        return math.isfinite(float(label))
    except (TypeError, ValueError):
        return False


def _is_fraction(label: Any) -> bool:
    return is_number(label) and float(label) != int(float(label))


def written_labels(read: Dataset, encoded: Dataset, split: str) -> list[str] | list[list[str]] | list[float]:
    """The labels of a split as they mean the same in every kind of file: names, lists of names, or numbers."""
    kind, names = problem_type_of(encoded), label_names(encoded)
    if kind == REGRESSION:
        return _numbers(read, split)  # the encoded ones are rounded to float32
    ids = encoded["label"][:]
    return [names[i] for i in ids] if kind == SINGLE else [[names[i] for i in row] for row in ids]


def problem_type_of(rows: Dataset) -> str:
    """The problem type of an encoded `label` column."""
    feature = rows.features["label"]
    if isinstance(feature, ClassLabel):
        return SINGLE
    return MULTI if is_list(feature) else REGRESSION


def label_names(rows: Dataset) -> list[str]:
    """The class names of an encoded `label` column; a placeholder for regression."""
    return _class_names(rows) or ["value"]


def _class_names(rows: Dataset) -> list[str] | None:
    feature = rows.features["label"]
    feature = feature.feature if is_list(feature) else feature
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def is_list(feature: Any) -> bool:
    return isinstance(feature, list) or hasattr(feature, "feature")


def _names(rows: Dataset, split: str, problem_type: str, is_hot: bool = False) -> list[list[str]]:
    """The class names of each row: one for single label, any number for multi-label (comma-separated in csv; or, with
    `is_hot`, a 0 or a 1 for each class)."""
    class_names = _class_names(rows)

    def name(value: Any) -> str:
        _refuse_object(value)
        if isinstance(value, list | bytes):
            raise ValueError(
                f"Expected labels that are text, numbers, or lists of these, got {value!r}. Name another "
                "--label_column_name, or write the labels as text."
            )
        if isinstance(value, datetime) and value == datetime.combine(value.date(), time()):
            value = value.date()  # which json lines read as a moment, and other files do not
        if class_names is not None and isinstance(value, int):
            return class_names[value]
        if isinstance(value, (float, Decimal)) and value == int(value):
            value = int(value)  # 1.0 in one file and 1 in another are one class
        return str(value).strip()

    labels = rows["label"][:]
    if is_hot:
        wrong = next((number for number, row in enumerate(labels) if not _is_multi_hot([row])), None)
        if wrong is not None:
            raise ValueError(
                f"Expected a list with a 0 or a 1 for each class in every row, as in the first ones, got "
                f"{labels[wrong]!r} in row {wrong} (from 0) of the {split} split. Write all labels alike."
            )
        return [[str(i) for i, is_on in enumerate(row) if is_on] for row in labels]
    result = []
    for number, value in enumerate(labels):
        if problem_type == MULTI and value is not None:
            values = value if isinstance(value, list) else str(value).split(",")
            if isinstance(value, list) and any(isinstance(v, float) and not _missing(v) and v != int(v) for v in value):
                raise ValueError(
                    f"Expected lists of names, of ids, or of a 0 or a 1 for each class, got {value} in row {number} "
                    f"(from 0) of the {split} split. Write the labels in one of these ways."
                )
            result.append([name(v) for v in values if not _missing(v)])
        elif _missing(value) or (class_names is not None and isinstance(value, int) and value < 0):
            raise ValueError(NO_LABEL.format(number, split))
        else:
            result.append([name(value)])
    return result


def _is_multi_hot(labels: Sequence[Any], names: list[str] | None = None) -> bool:
    """Whether each row has a 0 or a 1 for each class, as transformers' own models take them. (Read as ids, each row
    would name the same classes.) Of a trained model the names are known: lists that are shorter are ids."""
    widths = {len(row) if isinstance(row, list) else 0 for row in labels}
    if len(widths) != 1 or min(widths) < 2 or not all(value in (0, 1) for row in labels for value in row):
        return False
    return names is None or (all(map(str.isdecimal, names)) and max(map(int, names)) < min(widths))


def _refuse_object(value: Any) -> None:
    if isinstance(value, dict):
        raise ValueError(
            f"Expected labels that are text, numbers or lists, got objects with {', '.join(map(str, value))}. "
            "Name another --label_column_name, or take the label out of the object."
        )


def _numbers(rows: Dataset, split: str) -> list[float]:
    result = []
    for number, value in enumerate(rows["label"][:]):
        try:
            result.append(float(value) if isinstance(value, float) or not _missing(value) else math.nan)
        except (TypeError, ValueError):
            raise ValueError(
                f"Expected numbers as labels for regression, got {value!r} in row {number} (from 0) of {split}. "
                "Name another --label_column_name, or another --problem_type."
            ) from None
        if math.isinf(result[-1]):
            raise ValueError(
                f"Expected finite numbers as labels, got {value!r} in row {number} (from 0) of {split}. Remove "
                "the row, or correct it."
            )
        if math.isnan(result[-1]):
            raise ValueError(NO_LABEL.format(number, split))
    return result


def _missing(value: Any) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    return value is None or (isinstance(value, str) and not value.strip())


def _sort_key(name: str) -> tuple[int, float, str]:
    """Sorts numbers by value, then words."""
    return (0, float(name), name) if is_number(name) else (1, 0.0, name)


def _with_labels(rows: Dataset, values: list, feature: Any) -> Dataset:
    return rows.remove_columns("label").add_column("label", values, feature=feature)


def noisy_labels(rows: Dataset, share: float, seed: int) -> Dataset:
    """The rows with some labels replaced, each by that of another class, all of them equally likely.

    Args:
        rows: encoded, single label.
        share: of the rows; those of a smaller share are among those of a larger one with the same seed.
        seed: which rows, and which classes.

    Raises:
        ValueError: labels of another kind.
    """
    kind, classes = problem_type_of(rows), len(label_names(rows))
    if kind != SINGLE:
        raise ValueError(f"Expected one class for each row with label_noise, got labels of {kind}. Leave it out.")
    rng, labels = np.random.default_rng(seed), np.array(rows["label"][:])
    others = (labels + rng.integers(1, classes, len(labels))) % classes
    chosen = rng.permutation(len(labels))[: round(share * len(labels))]
    labels[chosen] = others[chosen]
    return _with_labels(rows, labels.tolist(), rows.features["label"])
