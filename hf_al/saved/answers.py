"""Answers as files: json lines as they are, csv, tsv and parquet with one column for each of their values."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from ..modeling.limits import MULTI, REGRESSION

Write = Callable[[list[dict[str, Any]]], None]
KINDS = {".csv": ",", ".tsv": "\t", ".parquet": ""}  # the delimiter


def columns(config: Any, exit_block: int | str | None, all_scores: bool, extra: list[str]) -> dict[str, pa.DataType]:
    """The columns of flat answers, with their types: `extra` ones first, then the answer, then that of every exit, or
    where each text left if they leave where they may.

    Args:
        config: of the model.
        exit_block, all_scores: as in `predict`.
        extra: names of further columns of text: `id`, `text`, `text_pair`.
    """
    kind, names = config.resolved_problem_type, config.label_names
    if kind == REGRESSION:
        answer = {"value" if len(names) == 1 else f"value_{name}": pa.float64() for name in names}
    elif kind == MULTI:
        answer = {"labels": pa.string()}
    else:
        answer = {"label": pa.string(), "score": pa.float64()}
    scores = {f"score_{name}": pa.float64() for name in names} if all_scores and kind != REGRESSION else {}
    if exit_block == "adaptive":
        return {**dict.fromkeys(extra, pa.string()), **answer, **scores, "exit": pa.int64(), "error": pa.string()}
    exits = [k for k in config.exits() if exit_block is None or k <= int(exit_block)]
    by_exit = {f"exit_{k}_{name}": kind for k in exits for name, kind in {**answer, **scores}.items()}
    return {**dict.fromkeys(extra, pa.string()), **answer, **scores, **by_exit, "error": pa.string()}


def flat(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer with its values one level deep, under the names of `columns`. Labels are joined by commas."""
    row = _reading(answer)
    for reading in answer.get("exits", []):
        row |= {f"exit_{reading['block']}_{name}": value for name, value in _reading(reading).items()}
    return row


def _reading(reading: dict[str, Any]) -> dict[str, Any]:
    row = {name: value for name, value in reading.items() if name not in ("exits", "block", "row", "scores", "values")}
    if "labels" in row:
        row["labels"] = ",".join(found["label"] for found in row["labels"])
    for name, values in (("score", reading.get("scores", {})), ("value", reading.get("values", {}))):
        row |= {f"{name}_{label}": value for label, value in values.items()}
    return row


def writer(out: TextIO, path: str | None, known: dict[str, pa.DataType]) -> tuple[Write, Callable[[], None]]:
    """How chunks of answers are written to `out`, by the ending of `path`, and what to do after the last one."""
    kind = Path(path).suffix.lower() if path else ""
    if kind == ".parquet":
        table = pq.ParquetWriter(out.buffer, pa.schema(known))

        def write_table(answers: list[dict[str, Any]]) -> None:
            rows = [{name: row.get(name) for name in known} for row in map(flat, answers)]
            table.write_table(pa.Table.from_pylist(rows, pa.schema(known)))

        return write_table, table.close
    if kind in KINDS:
        how: dict[str, Any] = {"extrasaction": "ignore", "delimiter": KINDS[kind], "lineterminator": "\n"}
        cells = csv.DictWriter(out, list(known), **how)
        quoted = csv.DictWriter(out, list(known), quoting=csv.QUOTE_ALL, **how)
        cells.writeheader()

        def write_cells(answers: list[dict[str, Any]]) -> None:
            for row in map(flat, answers):  # the writer leaves a lone \r without quotes, and readers end the row there
                (quoted if any("\r" in str(value) for value in row.values()) else cells).writerow(row)
            out.flush()

        return write_cells, out.flush

    def write_lines(answers: list[dict[str, Any]]) -> None:
        out.writelines(json.dumps(answer) + "\n" for answer in answers)
        out.flush()

    return write_lines, out.flush
