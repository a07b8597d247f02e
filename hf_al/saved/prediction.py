"""Answers of a trained model for text that streams through: one json object per row, in the order of the rows.

Legend: N batch, C classes.
"""

import gzip
import io
import logging
import math
import sys
import zlib
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import tee
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..atomic import replacing
from ..early import input_format
from ..loading import best_device, device_of, load_model, longest_text
from ..modeling.early_exit import ways_out
from ..modeling.limits import MULTI, REGRESSION
from ..modeling.modeling_al import ALForSequenceClassification
from ..report import reads_pairs
from .answers import Write, columns, writer
from .rows import AS_TEXT, Texts, Unusable, read_rows

logger = logging.getLogger(__name__)

CHUNK_BATCHES = 16  # batches that are read, sorted by length and answered together
CHUNK_CHARACTERS = 2**22  # a chunk of long texts ends earlier


def predict(
    model: ALForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Texts | Unusable],
    batch_size: int = 64,
    exit_block: int | str | None = None,
    all_scores: bool = False,
    most_tokens: int | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Answers in chunks of `CHUNK_BATCHES` batches; at most one chunk of rows is held at a time.

    Args:
        model, tokenizer: of a finished run.
        rows: texts (or pairs), as `Row` with numbers if the model reads any; an `Unusable` gives
            `{"row": its number from 0, "error": why}`.
        batch_size: texts per batch, at most.
        most_tokens: of a batch, with padding; None for any number.
        exit_block: the block to stop at, from 0; the last if None; `"adaptive"`: each text leaves as calibrated.
        all_scores: also return the scores of all classes.

    Returns:
        A dict per row. Single label: `label` and `score` (softmax); multi-label: `labels`, those above 0.5, each with
        its `score` (sigmoid); regression: `value`, or `values` by name if there are several. `exits` holds the same
        for every exit on the way, with its `block`. With `"adaptive"`, `exit` holds the block after which the text
        left, whose answer it is, with calibrated scores.

    Raises:
        ValueError: an exit that does not exist, `"adaptive"` for a model that is not calibrated, or, with the first
            answers, a model whose weights are not finite.
    """
    ways_out(model.config, exit_block)  # refuses what cannot be done, at once

    def chunks() -> Iterator[list[dict[str, Any]]]:
        model.eval()
        done = 0
        for chunk in _chunks(rows, batch_size * CHUNK_BATCHES):
            answers: list[dict[str, Any]] = [
                {"row": done + i, "error": row.reason} if isinstance(row, Unusable) else {}
                for i, row in enumerate(chunk)
            ]
            usable = [i for i, row in enumerate(chunk) if not isinstance(row, Unusable)]
            ids = _token_ids(model, tokenizer, [chunk[i] for i in usable])  # type: ignore[misc]
            numbers = _numbers(model, [chunk[i] for i in usable])  # type: ignore[misc]
            size = batch_size
            if most_tokens is not None:
                size = max(1, min(batch_size, most_tokens // max([1, *map(len, ids)])))
            if isinstance(exit_block, str):
                answered = _adaptive(model, ids, numbers, size, exit_block, all_scores)
            else:
                answered = _every_exit(model, ids, numbers, size, exit_block, all_scores)
            for i, answer in answered:
                answers[usable[i]] = answer
            done += len(chunk)
            yield answers

    return chunks()


def _every_exit(
    model: ALForSequenceClassification,
    ids: list[list[int]],
    numbers: Tensor | None,
    batch_size: int,
    exit_block: int | None,
    all_scores: bool,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number of each text, and its answer with those of the exits on the way."""
    exits = [k for k in model.config.exits() if exit_block is None or k <= exit_block]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        input_ids_NT, mask_NT = _padded(model, [ids[i] for i in batch])
        with torch.inference_mode():
            logits = model(
                input_ids_NT, mask_NT, exit_block=exit_block, output_exit_logits=True,
                numeric_values=None if numbers is None else numbers[batch],
            ).exit_logits  # fmt: skip
        readings = [readings_of(logits_NC, model.config, all_scores) for logits_NC in logits]
        for n, i in enumerate(batch):
            by_exit = [{"block": k, **reading[n]} for k, reading in zip(exits, readings, strict=True)]
            yield i, {**readings[-1][n], "exits": by_exit}


def _adaptive(
    model: ALForSequenceClassification,
    ids: list[list[int]],
    numbers: Tensor | None,
    batch_size: int,
    exit: str,
    all_scores: bool,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number of each text, and its answer with the block after which it left."""
    if ids:
        out = model.predict(*_padded(model, ids), exit=exit, batch_size=batch_size, numeric_values=numbers)
        assert out.logits is not None
        assert out.exit_blocks is not None
        readings = readings_of(out.logits, model.config, all_scores)
        blocks = out.exit_blocks.tolist()
        yield from ((i, {**reading, "exit": blocks[i]}) for i, reading in enumerate(readings))


def _chunks(rows: Iterable[Texts | Unusable], count: int) -> Iterator[list[Texts | Unusable]]:
    chunk: list[Texts | Unusable] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += 0 if isinstance(row, Unusable) else sum(map(len, row))
        if len(chunk) == count or characters > CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _token_ids(
    model: ALForSequenceClassification, tokenizer: PreTrainedTokenizerBase, rows: list[Texts]
) -> list[list[int]]:
    if not rows:
        return []
    limit = longest_text(model.config, tokenizer)
    return tokenizer(*map(list, zip(*rows, strict=True)), truncation=True, max_length=limit)["input_ids"]


def _numbers(model: ALForSequenceClassification, rows: list[Texts]) -> Tensor | None:
    """Those of the rows (N, F), where the model is; NaN in rows without any, None for a model that reads none."""
    names = model.config.numeric_columns
    if not names:
        return None
    found = [getattr(row, "numbers", None) or [math.nan] * len(names) for row in rows]
    return torch.tensor(found, dtype=torch.float64, device=device_of(model)).view(len(rows), len(names))


def _padded(model: ALForSequenceClassification, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask (N, T), where the model is."""
    pad = model.config.pad_token_id
    rows = [torch.tensor(row or [pad], dtype=torch.long) for row in ids]  # a text may be without any token
    input_ids_NT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    mask_NT = torch.arange(input_ids_NT.shape[1]) < torch.tensor([len(row) for row in ids])[:, None]
    return input_ids_NT.to(device_of(model)), mask_NT.to(device_of(model))


def readings_of(logits_NC: Tensor, config: Any, all_scores: bool) -> list[dict[str, Any]]:
    """The answer of one exit for each text, with the scores of transformers' text-classification pipeline.

    Raises:
        ValueError: logits that are not finite.
    """
    kind, names = config.resolved_problem_type, config.label_names
    logits_NC = logits_NC.float().cpu()
    if not logits_NC.isfinite().all():
        raise ValueError("Expected a model that answers with numbers, got NaN or infinity from it. Train it again.")
    if kind == REGRESSION:
        values = logits_NC.tolist()
        return [
            {"value": row[0]} if len(names) == 1 else {"values": dict(zip(names, row, strict=True))} for row in values
        ]
    multi_label = kind == MULTI
    readings = []
    for row in (logits_NC.sigmoid() if multi_label else logits_NC.softmax(1)).tolist():
        ranked = sorted(zip(names, row, strict=True), key=lambda pair: -pair[1])
        reading: dict[str, Any]
        if multi_label:
            reading = {"labels": [{"label": name, "score": score} for name, score in ranked if score > 0.5]}
        else:
            reading = {"label": ranked[0][0], "score": ranked[0][1]}
        readings.append({**reading, "scores": dict(ranked)} if all_scores else reading)
    return readings


# --- the command


def predict_file(flags: Namespace, usual: str | None = None) -> None:
    """`hf-al predict`: from a file or standard input to a file or standard output.

    Args:
        flags: of the command.
        usual: the text columns that the model was trained on, for files that have such.

    Raises:
        ValueError: a file, a format, a column, an exit or a model that does not exist or cannot be read.
    """
    kind = input_format(flags.input, flags.input_format)
    model, tokenizer = load_model(flags.model, flags.revision)
    model.to(best_device())  # type: ignore[arg-type]
    if flags.input is None and not flags.texts and sys.stdin.isatty():
        logger.info("Reading %s from the terminal; Ctrl-D ends it.", "lines" if kind == "text" else kind)
    if kind == "text" and model.config.numeric_columns:
        names = ", ".join(model.config.numeric_columns)
        logger.warning("The model also reads %s, which lines of text do not have: each counts as its mean.", names)
    total, errors = 0, 0
    bar = tqdm(unit=" rows", disable=flags.disable_tqdm or not sys.stderr.isatty())
    with bar, _source(flags) as stream:
        numeric = model.config.numeric_columns or ()
        rows = read_rows(stream, kind, flags.text_column_names, flags.id_column, flags.csv_delimiter, numeric, usual)
        if Path(flags.model).is_dir() and reads_pairs(flags.model):  # the Hub is not asked
            rows = _warned_of_single_texts(rows)
        rows, asked = tee(rows)  # which keeps those that have no answer yet
        chunks = predict(model, tokenizer, rows, flags.batch_size, flags.exit_block, flags.all_scores)
        extra = ["id"] * (flags.id_column is not None) + ["text", "text_pair"] * flags.with_text
        known = columns(model.config, flags.exit_block, flags.all_scores, extra)
        with answers_to(flags.output, known) as write:
            for answers in chunks:
                answers = [{**_asked(next(asked), flags), **answer} for answer in answers]
                write(answers)
                total += len(answers)
                errors += sum("error" in answer for answer in answers)
                bar.update(len(answers))
    logger.info("%d %s, %s with an error.", total, "row" if total == 1 else "rows", errors or "none")


def _warned_of_single_texts(rows: Iterator[Texts | Unusable]) -> Iterator[Texts | Unusable]:
    """The same rows; a message if the first text is a single one, which a model of pairs has never seen."""
    looking = True
    for row in rows:
        if looking and not isinstance(row, Unusable):
            looking = False
            if len(row) == 1:
                logger.warning(
                    "The model was trained on pairs of texts, and these are single ones. Name two columns: "
                    "--text_column_names."
                )
        yield row


def _asked(row: Texts | Unusable, flags: Namespace) -> dict[str, Any]:
    """What of a row goes into its answer: the id, the text."""
    found: dict[str, Any] = {}
    if flags.id_column is not None:
        found["id"] = getattr(row, "id", None)
    if flags.with_text and not isinstance(row, Unusable):
        found |= dict(zip(("text", "text_pair"), row, strict=False))
    return found


@contextmanager
def _source(flags: Namespace) -> Iterator[TextIO]:
    """What to classify: the texts on the command line, a file, or standard input."""
    path = flags.input
    if flags.texts:
        yield io.StringIO("\n".join(" ".join(text.split()) for text in flags.texts))
        return
    if path is None:
        sys.stdin.reconfigure(**AS_TEXT)  # type: ignore[union-attr]
        yield sys.stdin
        return
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", **AS_TEXT) as stream:
            yield stream
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        problem = ValueError(f"Expected {path} to be a gzip file, got a broken one: {error}. Pack it again.")
        for note in getattr(error, "__notes__", []):
            problem.add_note(note)
        raise problem from error


@contextmanager
def answers_to(path: str | None, known: dict[str, pa.DataType]) -> Iterator[Write]:
    """A function that writes chunks of answers to standard output, or to a file that gets its name when it is complete.

    Args:
        path: its ending decides the format; standard output if None.
        known: the `columns` of a table.

    Raises:
        ValueError: a file that cannot take them.
    """
    with _destination(path) as out:
        write, close = writer(out, path, known)

        def written(answers: list[dict[str, Any]]) -> None:
            try:
                write(answers)
            except OSError as error:
                if path is None:  # a closed standard output is no mistake
                    raise
                raise ValueError(_unwritable(path, error)) from error

        try:
            yield written
        except BaseException:
            with suppress(Exception):  # what is there so far can be read
                close()
            raise
        close()


@contextmanager
def _destination(path: str | None) -> Iterator[TextIO]:
    """Standard output, or a file that gets its name when it is complete."""
    if path is None:
        yield sys.stdout
        return
    with ExitStack() as stack:
        try:
            out = stack.enter_context(replacing(Path(path), keep_part=True))
        except OSError as error:
            raise ValueError(_unwritable(path, error)) from error
        yield out


def _unwritable(path: str, error: OSError) -> str:
    return f"Could not write the answers to {path}: {error.strerror or error}. Make room there, or name another file."
