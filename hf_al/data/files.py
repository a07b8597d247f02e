"""Files of labelled text: csv, tsv, json lines and parquet, also gzipped, as a Dataset or as a stream."""

import glob
import gzip
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DownloadManager, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from ..atomic import disk_error
from ..headers import READERS, checked_file

UNREADABLE = (
    DatasetGenerationError, ValueError, UnicodeDecodeError, pd.errors.ParserWarning, gzip.BadGzipFile, zlib.error,
    EOFError,
)  # fmt: skip
TYPED = 10_000  # rows of a stream that tell which columns hold numbers


def read_file(path: str, delimiter: str | None = None) -> Dataset:
    """One csv, tsv, json lines or parquet file (also .gz) as a memory-mapped Dataset.

    Cells of a csv file are kept as they are: 'NA', 'true' and '01' stay texts. Only columns of nothing but numbers
    become numbers. `delimiter` separates cells; guessed from the header if None.

    Raises:
        ValueError: a file that is missing, empty, of another kind, not UTF-8, or not in the format of its ending.
    """
    file, kind, options = checked_file(path, delimiter)[:3]
    try:
        with writing_cache():
            data = _loaded(file, kind, options)
        for column in data.data.columns:
            column.validate(full=True)  # json lines may hold bytes that are not UTF-8
    except UNREADABLE as error:
        raise _unreadable(path, kind, error) from error
    return data


def _unreadable(path: str, kind: str, error: Exception) -> ValueError:
    cause = error.__cause__ or error
    if "no data" in str(cause):
        return ValueError(f"Expected rows in {path}, got only a header. Add rows of text and label.")
    reason = " ".join(str(cause).split()).rstrip(".")
    advice = "Save it as UTF-8." if "utf" in str(cause).lower() else "Check its format and its ending."
    if isinstance(cause, pd.errors.ParserWarning):
        reason = "rows with more cells than the header has"
    if isinstance(cause, pd.errors.ParserWarning) or ", saw " in reason:
        advice = "A text that contains what separates cells must be in quotes."
    return ValueError(f"Expected {path} to be a {kind} file, got {type(cause).__name__}: {reason}. {advice}")


def _where(file: Path, kind: str) -> dict[str, str]:
    """What `load_dataset` is told of a file."""
    if kind == "parquet" and file.suffix == ".gz":  # the other readers decompress by themselves
        file = Path(DownloadManager().extract(str(file)))
    return {"data_files": glob.escape(str(file)), "split": "train"}


def _loaded(file: Path, kind: str, options: dict[str, Any]) -> Dataset:
    where = _where(file, kind)
    if READERS[kind] != "csv":
        return load_dataset(READERS[kind], **where)
    names = list(_first_rows(file, options, 1))
    with _refusing_more_cells():
        data = load_dataset("csv", **where, **options, features=Features(dict.fromkeys(names, Value("string"))))
    for name in names:
        numbers = _as_numbers(data.data.column(name))
        if numbers is not None:
            feature = Value("int64" if numbers.type == pa.int64() else "float64")
            data = data.remove_columns(name).add_column(name, numbers.to_numpy(), feature=feature)
    return data.select_columns(names)


def _first_rows(file: Path, options: dict[str, Any], count: int) -> pd.DataFrame:
    """Of a csv file, as text."""
    with _refusing_more_cells():
        return pd.read_csv(file, dtype=object, nrows=count, **options)


@contextmanager
def _refusing_more_cells() -> Iterator[None]:
    """Makes errors of rows that have more cells than the header: pandas would warn, and drop the last ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        yield


def _as_numbers(cells: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """Cells of text as whole numbers or fractions, if all of them are. None if not: a leading zero is part of a name,
    and fractions would not tell long whole numbers apart.

    pandas would guess the type of each 10,000 rows by itself, so that a label could be two classes: `1` and `1.0`.
    """
    for number in (pa.int64(), pa.float64()):
        with suppress(pa.ArrowInvalid):
            for part in (cells[:1000], cells):  # a column of words is told by its first ones
                plain = pc.replace_substring_regex(pc.utf8_trim_whitespace(part), r"^\+", "")
                found = pc.cast(plain, number)
            is_name = pc.any(pc.match_substring_regex(plain, r"(?i)^-?0\d|n")).as_py()  # also nan and inf
            is_long = number == pa.float64() and pc.any(pc.match_substring_regex(plain, r"^-?\d{16,}$")).as_py()
            return None if is_name or is_long else found
    return None


def stream_file(path: str, delimiter: str | None = None) -> IterableDataset:
    """A file as `read_file` reads it, row by row while it is used. It is not looked through first: what is wrong with a
    row is found when the row is read.

    Raises:
        ValueError: a file that is missing, empty or of another kind.
    """
    file, kind, options = checked_file(path, delimiter)[:3]
    with writing_cache():
        where = _where(file, kind)
    if READERS[kind] != "csv":
        return load_dataset(READERS[kind], **where, streaming=True)
    try:
        first = _first_rows(file, options, TYPED)
    except UNREADABLE as error:
        raise _unreadable(path, kind, error) from error
    texts = Features(dict.fromkeys(first, Value("string")))
    data = load_dataset("csv", **where, **options, features=texts, streaming=True)
    types = {name: _as_numbers(pa.chunked_array([pa.array(first[name], pa.string())])) for name in first}
    readers: dict[str, Callable[[str], float]] = {
        name: int if found.type == pa.int64() else float for name, found in types.items() if found is not None
    }
    return data.map(partial(_read_numbers, readers), batched=True) if readers else data


def _read_numbers(readers: dict[str, Callable[[str], float]], rows: dict[str, list[str]]) -> dict[str, list[Any]]:
    """Cells as numbers, where they can be."""

    def read(reader: Callable[[str], float], cell: str) -> Any:
        try:
            return reader(cell)
        except ValueError:
            return cell

    return {name: [read(reader, cell) for cell in rows[name]] for name, reader in readers.items()}


@contextmanager
def writing_cache() -> Iterator[None]:
    """Turns a full disk into one message: `datasets` caches what it reads and computes as Arrow files.

    Raises:
        OSError: why the disk refused, and what to do.
    """
    try:
        yield
    except (DatasetGenerationError, OSError) as error:
        reason = disk_error(error.__cause__ or error)
        if reason is None:
            raise
        raise OSError(
            f"Could not write to the cache of datasets: {reason}. Make room there, or name another place: "
            "HF_HOME=FOLDER."
        ) from None
