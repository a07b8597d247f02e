"""Columns of numbers beside the text, as one column `numeric_values`: for each row a list of floats, NaN if missing."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Value
from datasets import List as ListFeature

from ..messages import nearest

VALUES = "numeric_values"
LARGEST = 3e38  # of float32


def with_values(rows: Dataset, names: Sequence[str], split: str) -> Dataset:
    """The rows with their columns `names` in one, in this order; the same rows if there are no names.

    Raises:
        ValueError: a value that is no finite number, with its column and row. Empty cells and NaN are missing values.
    """
    if not names:
        return rows
    columns = [[_number(value, name, row, split) for row, value in enumerate(rows[name][:])] for name in names]
    values = np.array(columns, np.float64).T.tolist()
    return rows.remove_columns(list(names)).add_column(VALUES, values, feature=ListFeature(Value("float64")))


def check_numbers(columns: Sequence[str], names: Sequence[str]) -> None:
    """ValueError for rows without the columns of numbers that a model reads."""
    for name in (name for name in names if name not in columns):
        raise ValueError(
            f"Expected column {name!r}, whose numbers the model reads, got the columns {columns}."
            f"{nearest(name, columns)} Add it; cells of missing values may be empty."
        )


def _number(value: Any, name: str, row: int, split: str) -> float:
    try:
        return number(value)
    except ValueError as error:
        raise ValueError(
            f"{error} This is column {name!r} in row {row} (from 0) of the {split} split. Correct it, leave the cell "
            "empty if the value is missing, or take the column out of --numeric_column_names."
        ) from None


def number(value: Any) -> float:
    """A cell as a float; NaN if it is empty, 1 and 0 for true and false.

    Raises:
        ValueError: anything but a finite number that float32 can hold.
    """
    written = value.strip().lower() if isinstance(value, str) else value
    if written is None or written == "":
        return math.nan
    try:
        found = float({"true": 1, "false": 0}.get(written, written) if isinstance(written, str) else written)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"Expected a number or nothing, got {str(value)[:40]!r}.") from None
    if abs(found) > LARGEST:
        raise ValueError(f"Expected a finite number up to {LARGEST:.1g}, got {str(value)[:40]!r}.")
    return found


def standards(train: Dataset, names: Sequence[str]) -> dict[str, list[float]]:
    """The config values `numeric_means` and `numeric_stds` of the train split; a constant column has the deviation 1.

    Raises:
        ValueError: a column without any value.
    """
    values_NF = np.array(train[VALUES][:], np.float64)
    for name, values_N in zip(names, values_NF.T, strict=True):
        if np.isnan(values_N).all():
            raise ValueError(
                f"Expected numbers in the column {name!r} of train, got none. Take it out of --numeric_column_names."
            )
    differs = np.nanmax(values_NF, axis=0) > np.nanmin(values_NF, axis=0)  # rounding gives constants a deviation, too
    return {
        "numeric_means": np.nanmean(values_NF, axis=0).tolist(),
        "numeric_stds": np.where(differs, np.nanstd(values_NF, axis=0), 1.0).tolist(),
    }
