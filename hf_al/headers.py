"""What a file of rows tells before it is read: its kind, its columns, and what separates them. Nothing here imports
datasets: a mistake is answered at once.
"""

import csv
import gzip
import zlib
from functools import partial
from pathlib import Path
from typing import Any

from .messages import nearest
from .values import names_in

# Kind of file -> its loader in datasets
READERS = {"csv": "csv", "tsv": "csv", "txt": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}


def checked_file(path: str, delimiter: str | None = None) -> tuple[Path, str, dict[str, Any], list[str]]:
    """The file, its kind, how to read that, and the columns of a csv file: none if its header cannot be read, which is
    for its reader to say."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"Expected a file at {path}, found none. Check the path.")
    try:
        file.open("rb").close()
    except OSError as error:
        raise ValueError(f"Expected a readable file at {path}, got: {error.strerror}. Check its permissions.") from None
    if file.stat().st_size == 0:
        raise ValueError(f"Expected rows in {path}, got an empty file. Add rows of text and label.")
    suffixes = [s.lstrip(".").lower() for s in file.suffixes if s != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    if kind not in READERS:
        raise ValueError(
            f"Expected a .csv, .tsv, .json, .jsonl or .parquet file (also .gz), got {path}. Convert it, or fix its "
            "extension."
        )
    if READERS[kind] != "csv":
        return file, kind, {}, []
    names, delimiter = _header(file, kind, delimiter)
    check_once(names, f" in {path}")
    return file, kind, {"delimiter": delimiter, "keep_default_na": False, "index_col": False}, names


def _header(file: Path, kind: str, delimiter: str | None) -> tuple[list[str], str]:
    """The columns of a csv or tsv file, none if its header cannot be read, and what separates them."""
    line = _first_line(file)
    delimiter = delimiter or (guess_delimiter(line) if kind == "csv" else "\t")
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True), []), delimiter
    except csv.Error:
        return [], delimiter


def guess_delimiter(header: str) -> str:
    """What separates the cells of a csv file: the comma, or the semicolon or tab if its header has more of those."""
    return max(",;\t", key=header.count)  # the first one if they are equal


def _first_line(file: Path) -> str:
    """The header of a csv file, its first line that is not blank; empty if it cannot be read, which is for its reader
    to say."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            for read in iter(partial(stream.readline, 2**20), b""):
                lines = read.decode("utf-8-sig").split("\r")  # some lines end with that alone
                if filled := [line for line in lines if line.strip(" \n")]:
                    return filled[0]
    except (OSError, EOFError, UnicodeDecodeError, zlib.error):
        pass
    return ""


def check_once(columns: list[str], where: str = "") -> None:
    """Refuses columns of the same name."""
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise ValueError(
            f"Expected columns with names of their own{where}, got {twice!r} {columns.count(twice)} times. Rename one "
            "of them."
        )


def columns_of(path: str, delimiter: str | None) -> list[str]:
    """The columns of a csv file, as far as they are known before it is read."""
    columns = checked_file(path, delimiter)[3]
    return [name or f"Unnamed: {place}" for place, name in enumerate(columns)]  # as pandas names it


def check_columns(columns: list[str], names: list[str]) -> None:
    """Refuses names that are not among the columns, unless those are not known."""
    for name in names:
        if columns and name not in columns:
            raise ValueError(
                f"Expected column {name!r}, got the columns {columns}.{nearest(name, columns)} Check the column flags."
            )


def check_named(columns: list[str], text: str | None, label: str | None, numeric: list[str] | None = None) -> list[str]:
    """Refuses columns of text, label and numbers that do not exist or are named twice. Returns those of the text."""
    texts = names_in(text)
    names = [*texts, *([label] if label else [])]
    check_columns(columns, [*names, *(numeric or [])])
    if numeric and len({*names, *numeric}) < len(names) + len(numeric):
        raise ValueError(
            f"Expected --numeric_column_names apart from those of text and label, got {','.join(numeric)} beside "
            f"{','.join(names) or 'none'}. Name each column once."
        )
    if len(texts) > 2 or len(set(names)) < len(names):
        raise ValueError(
            f"Expected one or two text columns and another label column, got --text_column_names {','.join(texts)} and "
            f"--label_column_name {label}. Name each column once."
        )
    return texts


def check_labelled(
    columns: list[str], text: str | None, label: str | None, where: str, numeric: list[str] | None = None
) -> None:
    """As `check_named`, and refuses a file of one column: a text needs a label."""
    check_named(columns, text, label, numeric)
    if len(columns) == 1:
        raise ValueError(
            f"Expected columns of text and label in {where}, got only {columns[0]!r}. If these are several, pass what "
            "separates them: --csv_delimiter."
        )
