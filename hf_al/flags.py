"""Flags that several commands of hf-al share, and what is done with them."""

import logging
import math
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import shtab

from .early import check_is_new, check_model_name
from .headers import check_labelled, columns_of
from .parsing import FlagParser, reader
from .report import read_report
from .values import capped, names_in

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from .modeling.modeling_al import ALForSequenceClassification

MODEL = "folder of a trained model, or a Hub id"
COLUMNS = "column of the text, or two, comma-separated, for pairs (default: guessed)"


def whole(least: int, most: float = math.inf) -> Callable[[str], int]:
    """For argparse's `type`: a whole number from `least` to `most`."""

    def read(text: str) -> int:
        number: int = reader(int)(text)
        if not least <= number <= most:
            wanted = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
            raise ArgumentTypeError(f"expected a number {wanted}, got {text!r}")
        return number

    return read


positive, not_negative, port = whole(1), whole(0), whole(1, 65535)


def character(text: str) -> str:
    """For argparse's `type`: what separates cells."""
    if len(text) != 1:
        raise ArgumentTypeError(f"expected one character, got {text!r}")
    return text


def exit_name(text: str) -> int | str:
    """For argparse's `type`: a block, or `adaptive`."""
    if text != "adaptive" and not text.isdecimal():
        raise ArgumentTypeError(f"expected a block, counted from 0, or adaptive, got {text!r}")
    return text if text == "adaptive" else int(text)


def add_model(parser: FlagParser, help: str, name: str = "model", **options: str) -> None:
    parser.add_argument(name, metavar="DIR", help=help, **options).complete = shtab.DIRECTORY  # type: ignore


def add_revision(parser: FlagParser) -> None:
    parser.add_argument("--import", dest="import_module", metavar="MODULE", help="imported first: see hf-al train")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hub id (default: main)")


def add_copy(parser: FlagParser) -> None:
    """The flags that name a model and where a model made from it goes."""
    add_model(parser, MODEL)
    add_revision(parser)
    parser.add_argument("out", metavar="OUT", help="new or empty folder").complete = shtab.DIRECTORY  # type: ignore


def load_for_copy(flags: Namespace) -> "tuple[ALForSequenceClassification, PreTrainedTokenizerBase, Path]":
    """The model and its tokenizer, and the folder for what is made from them."""
    check_model_name(flags.model, flags.revision)
    out = Path(flags.out)
    check_is_new(out)
    set_up_output(disable_tqdm=not sys.stderr.isatty())
    from .loading import load_model

    return *load_model(flags.model, flags.revision), out


def add_delimiter(parser: FlagParser) -> None:
    parser.add_argument("--csv_delimiter", type=character, metavar="C", help="of csv cells (default: guessed)")


def add_file(parser: Any, flag: str, help: str) -> None:
    parser.add_argument(flag, metavar="FILE", help=help).complete = shtab.FILE


def add_labelled(parser: FlagParser, split: str, required: bool = True) -> None:
    """The flags that name labelled text: a file, or a data set of the Hub and its split."""
    data = parser.add_mutually_exclusive_group(required=required)
    add_file(data, f"--{split}_file", "csv, tsv, json lines or parquet, also .gz")
    data.add_argument("--dataset_name", metavar="NAME", help="in place of a file: a Hub id, or tweets")
    add_delimiter(parser)
    parser.add_argument("--dataset_config_name", metavar="NAME", help="configuration of the Hub data set")
    parser.add_argument(f"--{split}_split_name", metavar="NAME", help=f"its split (default: {split})")
    parser.add_argument("--text_column_names", metavar="NAME", help=COLUMNS)
    parser.add_argument("--label_column_name", metavar="NAME", help="column of the label (default: guessed)")


def check_labelled_file(flags: Namespace, split: str) -> None:
    """What can be known of the file before it is read."""
    path = getattr(flags, f"{split}_file")
    if path:
        columns = columns_of(path, flags.csv_delimiter)
        use_columns_of_run(flags, columns)
        check_labelled(columns, flags.text_column_names, flags.label_column_name, path)


def use_columns_of_run(flags: Namespace, columns: list[str]) -> None:
    """Columns that no flag names are those of the run that trained the model."""
    for flag, names in columns_of_run(flags.model, columns).items():
        if getattr(flags, flag, names) is None:
            setattr(flags, flag, names)


def columns_of_run(model: str, columns: list[str]) -> dict[str, str]:
    """As `trained_columns`, those that are among `columns`: of a file, as far as they are known before it is read."""
    return {flag: names for flag, names in trained_columns(model).items() if set(names_in(names)) <= set(columns)}


def trained_columns(model: str) -> dict[str, str]:
    """By the name of their flag, the columns of text and label that a model was trained on, where its report names
    them. A copy without its report has none, nor has a Hub id, which is not looked up for this."""
    try:
        trained = read_report(model)["arguments"] or {}
    except ValueError:
        return {}
    return {flag: trained[flag] for flag in ("text_column_names", "label_column_name") if trained.get(flag)}


def labelled(flags: Namespace, split: str) -> "Dataset":
    """The rows of the file or of the Hub data set. Columns that no flag names become those of the run, if they are
    there."""
    from .data.files import read_file
    from .data.sources import load_split

    name = getattr(flags, f"{split}_split_name")
    if flags.dataset_name:
        data = load_split(flags.dataset_name, flags.dataset_config_name, name or split)
    elif flags.dataset_config_name or name:
        raise ValueError(
            f"Expected --dataset_name with --dataset_config_name or --{split}_split_name, got --{split}_file."
        )
    else:
        data = read_file(getattr(flags, f"{split}_file"), flags.csv_delimiter)
    use_columns_of_run(flags, data.column_names)
    return data


def set_threads(flags: Namespace) -> None:
    if flags.threads:
        import torch

        torch.set_num_threads(capped("threads", flags.threads))


def add_machine_flags(parser: FlagParser) -> None:
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--disable_tqdm", action="store_true", help="no progress bar")


def set_up_output(disable_tqdm: bool = False) -> None:
    """Messages go to standard error; libraries show no progress bars when nobody watches."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("hf_al").setLevel(logging.INFO)
    from datasets import disable_progress_bars
    from datasets.utils.logging import set_verbosity
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    set_verbosity(logging.CRITICAL)  # errors with a file are raised as well, and reported once
    if disable_tqdm or not sys.stderr.isatty():
        disable_progress_bars()
