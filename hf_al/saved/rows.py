"""Text to classify, row by row from a stream of any length: lines, csv, tsv or json lines.

An unusable row gives an `Unusable` in its place. Memory is bounded: a row longer than `LONGEST_ROW` is unusable.
"""

import csv
import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, TextIO, TypeVar

from ..data.columns import LABEL_NAMES, guess_text
from ..data.numeric import check_numbers, number
from ..headers import check_once, guess_delimiter
from ..values import names_in

logger = logging.getLogger(__name__)

# How files are opened. Lines may end as on any system; bytes that are not UTF-8 become lone surrogates, which `usable`
# finds if they matter.
AS_TEXT: dict[str, Any] = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}
END = "\0\0"  # behind the last line of a csv file: in a cell of its own, unless a quote is still open
LONGEST_ROW = 2**20  # characters of a line, and of a csv cell
LOOK_AHEAD = 100  # json lines that may lack the text before the column counts as wrong

T = TypeVar("T")
Texts = tuple[str, ...]  # a text, or the two of a pair
Choice = Callable[[Collection[str]], list[str]]  # of the columns, those of the text


class Row(tuple[str, ...]):
    """The texts of a row, with its id and its numbers, if they are asked for."""

    id: str | None = None
    numbers: Sequence[float] = ()


@dataclass(frozen=True)
class Unusable:
    """A row that cannot be classified, why, and its id if that is known."""

    reason: str
    id: str | None = None


class RowError(Exception):
    """Why a row is unusable."""

    id: str | None = None


def read_rows(
    stream: TextIO,
    kind: str,
    named: str | None = None,
    id_column: str | None = None,
    delimiter: str | None = None,
    numeric: Sequence[str] = (),
    usual: str | None = None,
) -> Iterator[Texts | Unusable]:
    """The texts of `stream`.

    Args:
        stream: opened with `AS_TEXT`.
        kind: `text` (one text per line), `csv` or `tsv` (with a header; blank lines are skipped), or `jsonl` (objects).
        named: column of the text, or two, comma-separated, for pairs; guessed if None.
        delimiter: of csv; guessed from the header if None.
        id_column: column whose value becomes the `id` of each `Row`.
        usual: columns of the text as in `named`, which are taken if there are such.
        numeric: columns that become its `numbers`, NaN where a cell is empty. Lines of text have none; json objects may
            lack them.

    Raises:
        ValueError: a column that does not exist, columns that are ambiguous, or an array of json objects.
    """
    lines = _Lines(stream)
    names = names_in(named)
    if len(names) > 2:
        raise ValueError(f"Expected one or two text columns, got {names}. Name at most two.")
    if kind == "text":
        if names or id_column:
            raise ValueError("Expected no columns for text lines, got some. Pass --input_format csv or jsonl.")
        return _each(lines, lambda line: usable((line.rstrip("\r\n"),)))

    def choose(columns: Collection[str]) -> list[str]:
        known = names or [name for name in names_in(usual) if {*names_in(usual)} <= {*columns}]
        others = {id_column, *numeric} - {*known}
        return choose_text_columns([name for name in columns if name not in others], known)

    return (
        _csv_rows(lines, delimiter or (None if kind == "csv" else "\t"), choose, id_column, numeric)
        if kind in ("csv", "tsv")
        else _json_rows(lines, choose, id_column, numeric)
    )


def choose_text_columns(columns: list[str], named: list[str]) -> list[str]:
    """The text column(s): as named, else guessed from the names if there is only one reading."""
    missing = [name for name in named if name not in columns]
    if missing:
        raise ValueError(f"Expected column {missing[0]!r}, got the columns {columns}. Check --text_column_names.")
    if named:
        return named
    found = guess_text(columns, [c for c in columns if c.lower() not in LABEL_NAMES])
    if found is None:
        raise ValueError(
            f"Cannot tell the text column among {columns}. Pass --text_column_names NAME, or NAME,NAME for pairs."
        )
    return found


class _Lines:
    """The lines of a stream. Not a generator, because it must go on after an error."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.start = ""  # the first character that is no white space, once it was read

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self.stream.readline(LONGEST_ROW + 1)
        if not line:
            raise StopIteration
        self.start = self.start or line.lstrip()[:1]
        if len(line) > LONGEST_ROW:
            while line and not line.endswith(("\n", "\r")):
                line = self.stream.readline(LONGEST_ROW)
            raise RowError(f"Expected a row of at most {LONGEST_ROW} characters, got a longer one.")
        return line


def _each(items: Iterator[T], parse: Callable[[T], Any]) -> Iterator[Any]:
    """`parse` of each item: an `Unusable` for an item that cannot be read or parsed, nothing if it returns None."""
    while True:
        try:
            parsed = parse(next(items))
        except StopIteration:
            return
        except (RowError, csv.Error) as error:
            yield Unusable(str(error), getattr(error, "id", None))
        else:
            if parsed is not None:
                yield parsed


def usable(texts: Iterable[Any]) -> Texts:
    """The texts of a row as they are.

    Raises:
        RowError: one of them is missing, empty or no text.
    """
    texts = tuple(texts)
    for text in texts:
        if text is None:
            raise RowError("Expected a text, got none.")
        if not isinstance(text, str):
            raise RowError(f"Expected a text, got {type(text).__name__}.")
        if not text.strip():
            raise RowError("Expected a text, got an empty one.")
        if "\0" in text:
            raise RowError("Expected text in UTF-8, got characters of the code 0, as of UTF-16. Save it as UTF-8.")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RowError("Expected text in UTF-8, got other bytes.") from None
    return texts


def _row(texts: Iterable[Any], id: Any, numbers: dict[str, Any]) -> Row:
    """Usable texts with the id of their row and its numbers; the id also goes into the error if they are not usable."""
    id = None if id is None else str(id)
    shown = id and id.encode("utf-8", "backslashreplace").decode()
    try:
        if shown != id:
            raise RowError("Expected an id in UTF-8, got other bytes.")
        found = Row(usable(texts))
        found.numbers = [_number(name, cell) for name, cell in numbers.items()]
    except RowError as error:
        error.id = shown
        raise
    found.id = id
    return found


def _number(name: str, cell: Any) -> float:
    try:
        return number(cell)
    except ValueError as error:
        raise RowError(f"{error} This is the column {name!r}.") from None


def _csv_rows(
    lines: Iterator[str], delimiter: str | None, choose: Choice, id_column: str | None, numeric: Sequence[str]
) -> Iterator[Texts | Unusable]:
    csv.field_size_limit(LONGEST_ROW)
    try:
        start = next((line for line in lines if line.strip("\r\n")), "")
        cells = csv.reader(chain([start], lines, [END]), delimiter=delimiter or guess_delimiter(start))
        header = next(cells, [])
        "".join(header).encode()
    except (RowError, csv.Error, UnicodeEncodeError) as error:
        raise ValueError(f"Expected a header in UTF-8 in the first line, got something else: {error}.") from None
    if not header:
        raise ValueError("Expected a header line with the names of the columns, got an empty input.")
    check_once(header)
    if id_column is not None and id_column not in header:
        raise ValueError(f"Expected column {id_column!r}, got the columns {header}. Check --id_column.")
    check_numbers(header, numeric)
    where = [header.index(name) for name in choose(header)]

    def parse(row: list[str]) -> Texts | None:
        if not row or row == [END]:
            return None
        if row[-1].endswith(END):  # it took all rows behind it for one cell
            raise ValueError(
                "Expected a quote that is closed, got the end of the input: close it, or write two for one in a text. "
                f"The row begins with {row[0].removesuffix(END)[:40]!r}."
            )
        if len(row) != len(header):
            raise RowError(f"Expected {len(header)} cells, as the header has, got {len(row)}.")
        id = None if id_column is None else row[header.index(id_column)]
        return _row((row[i] for i in where), id, {name: row[header.index(name)] for name in numeric})

    return _each(cells, parse)


def _json_rows(
    lines: _Lines, choose: Choice, id_column: str | None, numeric: Sequence[str]
) -> Iterator[Texts | Unusable]:
    objects = _each(lines, _json_object)
    start = list(islice(objects, 1))
    if lines.start == "[":
        raise ValueError("Expected a json object in each line, got an array. Write one object per line.")
    first, columns = _first_with_text(chain(start, objects), choose, {id_column, *numeric})
    for name in numeric if first and not isinstance(first[-1], Unusable) else ():
        if name not in first[-1]:
            logger.warning("No %s in the first row: where it is missing, its mean counts.", name)

    def parse(row: dict | Unusable) -> Texts:
        if isinstance(row, Unusable):
            raise RowError(row.reason)
        id = None if id_column is None else row.get(id_column)
        return _row((row.get(name) for name in columns), id, {name: row.get(name) for name in numeric})

    return _each(chain(first, objects), parse)


def _json_object(line: str) -> dict | None:
    if not line.strip():
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RowError(f"Expected a json object, got none: {error}.") from None
    if not isinstance(row, dict):
        raise RowError(f"Expected a json object, got {type(row).__name__}.")
    return row


def _first_with_text(
    objects: Iterator[dict | Unusable], choose: Choice, others: Collection[str | None]
) -> tuple[list, list[str]]:
    """The rows up to the first one that has the text column, and the column(s). `others`: keys that are no text."""
    rows: list[dict | Unusable] = []
    keys: dict[str, None] = {}
    for row in islice(objects, LOOK_AHEAD):
        rows.append(row)
        if isinstance(row, dict):
            keys |= dict.fromkeys(name for name in row if name not in others)
            try:
                return rows, choose(row)
            except ValueError:
                continue
    return rows, choose(keys) if keys else ["text"]
