"""Files of labelled text: csv, tsv, json lines and parquet, also gzipped, as a Dataset or as a stream."""

import glob
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DownloadManager, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from ..atomic import disk_error
from ..headers import READERS, checked_file


def read_file(path: str, delimiter: str | None = None) -> Dataset:
    """One csv, tsv, json lines or parquet file (also .gz) as a memory-mapped Dataset.

    Cells of a csv file are kept as they are: 'NA' stays a text. `delimiter` separates them; guessed from the header if
    None.

    Raises:
        ValueError: a file that is missing, empty, of another kind, not UTF-8, or not in the format of its ending.
    """
    file, kind, options, names = checked_file(path, delimiter)
    try:
        with writing_cache():
            data = _loaded(file, kind, options, names)
        for column in data.data.columns:
            column.validate(full=True)  # json lines may hold bytes that are not UTF-8
    except (DatasetGenerationError, ValueError, UnicodeDecodeError) as error:
        cause = error.__cause__ or error
        if "no data" in str(cause):
            raise ValueError(f"Expected rows in {path}, got only a header. Add rows of text and label.") from None
        reason = " ".join(str(cause).split()).rstrip(".")
        advice = "Save it as UTF-8." if "utf" in str(cause).lower() else "Check its format and its ending."
        raise ValueError(
            f"Expected {path} to be a {kind} file, got {type(cause).__name__}: {reason}. {advice}"
        ) from error
    return data


def _where(file: Path, kind: str) -> dict[str, str]:
    """What `load_dataset` is told of a file."""
    if kind == "parquet" and file.suffix == ".gz":  # the other readers decompress by themselves
        file = Path(DownloadManager().extract(str(file)))
    return {"data_files": glob.escape(str(file)), "split": "train"}


def _loaded(file: Path, kind: str, options: dict[str, Any], names: list[str]) -> Dataset:
    """datasets takes the type of a column from the first 10,000 rows of a csv file, and refuses the file if a later
    cell does not fit: a fraction after whole numbers, an empty cell, a number beyond 64 bits. Then all cells are read
    as text, and a column becomes one of numbers if all of it can."""
    where = _where(file, kind)
    try:
        return load_dataset(READERS[kind], **where, **options)
    except DatasetGenerationError as error:
        does_not_fit = isinstance(error.__cause__, (pa.ArrowInvalid, OverflowError))
        if not does_not_fit or READERS[kind] != "csv" or not all(names):
            raise
    texts = Features(dict.fromkeys(names, Value("string")))
    data = load_dataset("csv", **where, **options, features=texts)
    cells = data.with_format("arrow")[:]
    for name in names:
        is_long = pc.any(pc.match_substring_regex(cells[name], r"^\s*[+-]?\d{16,}\s*$")).as_py()
        for number in ("int64",) if is_long else ("int64", "float64"):  # a float would not tell long numbers apart
            with suppress(pa.ArrowInvalid):
                data = data.cast_column(name, Value(number))
                break
    return data


def stream_file(path: str, delimiter: str | None = None) -> IterableDataset:
    """A file as `read_file` reads it, row by row while it is used. It is not looked through first: what is wrong with a
    row is found when the row is read.

    Raises:
        ValueError: a file that is missing, empty or of another kind.
    """
    file, kind, options, _ = checked_file(path, delimiter)
    with writing_cache():
        where = _where(file, kind)
    return load_dataset(READERS[kind], **where, streaming=True, **options)


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
