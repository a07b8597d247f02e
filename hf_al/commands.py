"""The commands of hf-al: the flags of each, and what it does. Imports happen when a command runs."""

import json
import logging
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shtab

from .early import (
    check_can_push,
    check_data_arguments,
    check_destination,
    check_exit,
    check_input_and_output,
    check_is_new,
    check_labelled,
    check_model_name,
    check_training,
    columns_of,
    input_format,
)
from .messages import table
from .metadata import check_metadata
from .parallel.launch import is_for_others_to_start, is_launched, is_main, launch, said_once
from .parallel.placement import check_placement
from .parsing import FlagParser, add_training_flags, planned_blocks, reader, resolve
from .report import read_report
from .values import capped

MODEL = "folder of a trained model, or a Hub id"
COLUMNS = "column of the text, or two, comma-separated, for pairs (default: guessed)"


def positive(text: str) -> int:
    """For argparse's `type`: a whole number of at least 1."""
    number: int = reader(int)(text)
    if number < 1:
        raise ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return number


def port(text: str) -> int:
    """For argparse's `type`: a port of this machine."""
    number: int = reader(int)(text)
    if not 0 < number < 2**16:
        raise ArgumentTypeError(f"expected a number from 1 to 65535, got {text!r}")
    return number


def character(text: str) -> str:
    """For argparse's `type`: what separates cells."""
    if len(text) != 1:
        raise ArgumentTypeError(f"expected one character, got {text!r}")
    return text


# --- train


def _train_flags(parser: FlagParser) -> None:
    parser.usage = "hf-al train --output_dir DIR [--config FILE] [--train_file FILE] [flags]"
    add_training_flags(parser)


def _train(flags: Namespace) -> None:
    args = said_once(lambda: resolve(vars(flags)))
    if flags.print_config:
        print(args.to_yaml(), end="")
        return
    said_once(lambda: check_training(args, is_main(), reads_data=not (args.dispatch_data and is_launched())))
    if not args.model_name_or_path:
        said_once(lambda: check_placement(args.placement, planned_blocks(args), args.stages))
    if args.processes > 1 and not is_for_others_to_start():
        launch(args.to_yaml(), args.processes, args.use_cpu)
        return
    set_up_output(args.disable_tqdm)
    import torch.distributed as dist

    from .training.loop import train

    try:
        report = train(args).report
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if not is_main():
        return
    split = "test" if "test" in report else "validation"
    print(f"{split} metrics by exit ({args.output_dir}/report.md has the rest):\n{table(report[split])}")


# --- evaluate, predict


def _evaluate_flags(parser: FlagParser) -> None:
    _add_model(parser, MODEL)
    _add_revision(parser)
    data = parser.add_mutually_exclusive_group(required=True)
    _add_file(data, "--test_file", "csv, tsv, json lines or parquet, also .gz")
    data.add_argument("--dataset_name", metavar="NAME", help="in place of a file: a Hub id, or tweets")
    _add_delimiter(parser)
    _add_file(parser, "--predictions", "also write the answers to each row: .jsonl, .csv, .tsv or .parquet")
    parser.add_argument("--dataset_config_name", metavar="NAME", help="configuration of the Hub data set")
    parser.add_argument("--test_split_name", metavar="NAME", help="its split (default: test)")
    parser.add_argument("--text_column_names", metavar="NAME", help=COLUMNS)
    parser.add_argument("--label_column_name", metavar="NAME", help="column of the label (default: guessed)")
    parser.add_argument(
        "--per_device_eval_batch_size",
        type=positive,
        default=128,
        metavar="N",
        help="examples per batch (default: 128)",
    )
    _add_machine_flags(parser)


def _evaluate(flags: Namespace) -> None:
    check_model_name(flags.model, flags.revision)
    if flags.test_file:
        columns = columns_of(flags.test_file, flags.csv_delimiter)
        check_labelled(columns, flags.text_column_names, flags.label_column_name, flags.test_file)
    if flags.predictions:
        check_destination("--predictions", flags.predictions, flags.test_file, flags.model)
    set_up_output(flags.disable_tqdm)
    from .data.sources import load_split, read_file
    from .evaluation import evaluate

    if flags.dataset_name:
        data = load_split(flags.dataset_name, flags.dataset_config_name, flags.test_split_name or "test")
    elif flags.dataset_config_name or flags.test_split_name:
        raise ValueError("Expected --dataset_name with --dataset_config_name or --test_split_name, got --test_file.")
    else:
        data = read_file(flags.test_file, flags.csv_delimiter)
    if flags.threads:
        import torch

        torch.set_num_threads(capped("threads", flags.threads))
    found = evaluate(
        flags.model,
        data,
        text_column_names=flags.text_column_names,
        label_column_name=flags.label_column_name,
        batch_size=flags.per_device_eval_batch_size,
        show_progress=sys.stderr.isatty() and not flags.disable_tqdm,
        revision=flags.revision,
        predictions=flags.predictions,
    )
    print(json.dumps(found))


def _predict_flags(parser: FlagParser) -> None:
    _add_model(parser, MODEL)
    parser.add_argument("texts", metavar="TEXT", nargs="*", default=[], help="to classify, in place of --input")
    _add_revision(parser)
    _add_file(parser, "--input", "text to classify, .txt, .csv, .tsv or .jsonl, also .gz (default: standard input)")
    _add_file(
        parser, "--output", ".jsonl, .csv, .tsv or .parquet, one row each (default: json lines to standard output)"
    )
    parser.add_argument(
        "--input_format",
        choices=["text", "csv", "tsv", "jsonl"],
        help="text: one text per line (default: from the ending of --input; text for standard input)",
    )
    parser.add_argument("--text_column_names", metavar="NAME", help=COLUMNS)
    _add_delimiter(parser)
    parser.add_argument("--id_column", metavar="NAME", help="column whose value is put into each answer as its id")
    parser.add_argument("--with_text", action="store_true", help="put the text into each answer")
    parser.add_argument("--all_scores", action="store_true", help="give scores of all classes, not just the answer's")
    parser.add_argument("--exit_block", type=reader(int), metavar="K", help="stop after block K, counted from 0")
    parser.add_argument("--batch_size", type=positive, default=64, metavar="N", help="texts per batch (default: 64)")
    _add_machine_flags(parser)


def _predict(flags: Namespace) -> None:
    check_model_name(flags.model, flags.revision)
    input_format(flags.input, flags.input_format)
    check_input_and_output(flags)
    check_exit(flags.model, flags.exit_block)
    set_up_output(flags.disable_tqdm)
    from .saved.prediction import predict_file

    predict_file(flags)


# --- inspect, compare


def _inspect_flags(parser: FlagParser) -> None:
    _add_model(parser, MODEL)
    _add_revision(parser)
    parser.add_argument("--json", action="store_true", help="one json object instead of a table")


def _inspect(flags: Namespace) -> None:
    check_model_name(flags.model, flags.revision)
    set_up_output()
    from .saved.inspection import as_text, inspect

    found = inspect(flags.model, flags.revision)
    print(json.dumps(found) if flags.json else as_text(found))


def _compare_flags(parser: FlagParser) -> None:
    _add_model(parser, "folders of finished runs (output_dir of hf-al train), or Hub ids", "models", nargs="+")
    parser.add_argument("--json", action="store_true", help="one json object instead of tables")


def _compare(flags: Namespace) -> None:
    from .saved.comparison import as_text, compare

    found = compare(flags.models)
    print(json.dumps(found) if flags.json else as_text(found))


# --- push


def _push_flags(parser: FlagParser) -> None:
    _add_model(parser, "folder of a finished run (output_dir of hf-al train)")
    parser.add_argument("repo_id", metavar="USER/NAME", help="the repository; created if there is none")
    parser.add_argument("--private", action="store_true", help="create a private repository; a public one is refused")
    parser.add_argument("--revision", metavar="BRANCH", help="created if there is none (default: main)")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--inference_only", action="store_true", help="drop the parameters that only training needs")
    parser.add_argument("--language", metavar="CODE", help="of the texts, for the card, such as en")
    parser.add_argument("--license", metavar="NAME", help="of the model, for the card, such as apache-2.0")
    parser.add_argument(
        "--baseline", metavar="DIR", help="run by backpropagation on the same rows, or a Hub id: to compare with"
    )
    parser.add_argument("--commit_message", metavar="TEXT", help="first line of the commit")


def _push(flags: Namespace) -> None:
    check_metadata(flags.language, flags.license)
    read_report(flags.model)
    check_can_push(flags.repo_id)
    set_up_output(disable_tqdm=not sys.stderr.isatty())
    from .hub import push

    values = vars(flags)
    print(push(values.pop("model"), **values))


# --- demo


def _demo_flags(parser: FlagParser) -> None:
    _add_model(parser, MODEL)
    _add_revision(parser)
    _add_file(parser, "--examples", "to try, one text per line, or two with a tab between (default: a few sentences)")
    parser.add_argument("--server_name", metavar="HOST", help="address to serve (default: this machine only)")
    parser.add_argument("--server_port", type=port, metavar="N", help="(default: the first free one from 7860)")
    parser.add_argument("--share", action="store_true", help="also a public address, through gradio's servers")
    parser.add_argument("--space", metavar="DIR", help="write the files of a Hub Space there instead")


def _demo(flags: Namespace) -> None:
    check_model_name(flags.model, flags.revision)
    if flags.examples and not Path(flags.examples).is_file():
        raise ValueError(f"Expected a file at {flags.examples}, found none. Check --examples.")
    if flags.space:
        check_is_new(Path(flags.space), "--space")
    set_up_output(disable_tqdm=not sys.stderr.isatty())
    from .saved.demo import demo

    demo(flags)


# --- export


def _export_flags(parser: FlagParser) -> None:
    _add_model(parser, MODEL)
    _add_revision(parser)
    parser.add_argument("out", metavar="OUT", help="new or empty folder").complete = shtab.DIRECTORY  # type: ignore
    parser.add_argument("--inference_only", action="store_true", help="drop the parameters that only training needs")


def _export(flags: Namespace) -> None:
    check_model_name(flags.model, flags.revision)
    out = Path(flags.out)
    check_is_new(out)
    set_up_output(disable_tqdm=not sys.stderr.isatty())
    from .loading import load_model

    model, tokenizer = load_model(flags.model, flags.revision)
    model.save_pretrained(out, inference_only=flags.inference_only)
    tokenizer.save_pretrained(out)


# --- plan


def _plan_flags(parser: FlagParser) -> None:
    parser.usage = "hf-al plan [--config FILE] [flags of hf-al train] [--stages LIST] [--bandwidth RATE]"
    parser.conflict_handler = "resolve"  # --stages is a list here
    add_training_flags(parser)
    group = parser.add_argument_group("plan")
    group.add_argument(
        "--stages", type=reader(list[int]), default=[1, 2, 4], metavar="LIST", help="how many (default: 1,2,4)"
    )
    group.add_argument("--bandwidth", default="10Gbit", metavar="RATE", help="of a link, per second (default: 10Gbit)")
    group.add_argument("--latency", default="50us", metavar="TIME", help="of a link (default: 50us)")
    group.add_argument("--tokens", type=positive, metavar="N", help="of each text; then no data is read")
    group.add_argument("--json", action="store_true", help="one json object instead of a table")
    _add_file(group, "--plot", "draw texts per second over stages, and time over depth")


def _plan(flags: Namespace) -> None:
    names = ("stages", "bandwidth", "latency", "tokens", "json", "plot")
    own = {name: vars(flags).pop(name) for name in names}
    args = resolve({**vars(flags), "print_config": True})  # without an output folder
    if own["tokens"] is None:
        check_data_arguments(args)
    set_up_output(args.disable_tqdm)
    from .forecast import Link, as_text, draw, plan, quantity

    link = Link(quantity(own["bandwidth"], "bit"), quantity(own["latency"], "s"))
    found = plan(args, own["stages"], link, own["tokens"])
    print(json.dumps(found) if own["json"] else as_text(found))
    if own["plot"]:
        draw(own["plot"], found)


# --- the table


@dataclass(frozen=True)
class Command:
    help: str
    add_flags: Callable[[FlagParser], None]
    run: Callable[[Namespace], None]


COMMANDS = {
    "train": Command("train a classifier", _train_flags, _train),
    "evaluate": Command("metrics of a trained model on labelled text, one json object", _evaluate_flags, _evaluate),
    "predict": Command("classify text: a file, or lines from standard input", _predict_flags, _predict),
    "inspect": Command("blocks, shapes, parameters and exits of a model", _inspect_flags, _inspect),
    "compare": Command("a table of several runs", _compare_flags, _compare),
    "push": Command("share a finished run on the Hub: model, card, results", _push_flags, _push),
    "export": Command("a copy of a model, whole or for inference only", _export_flags, _export),
    "plan": Command("predict speed, waiting and memory of a split over machines", _plan_flags, _plan),
    "demo": Command("a page on which to try a model: the answer at every exit", _demo_flags, _demo),
}


# --- what several of them share


def _add_model(parser: FlagParser, help: str, name: str = "model", **options: str) -> None:
    parser.add_argument(name, metavar="DIR", help=help, **options).complete = shtab.DIRECTORY  # type: ignore


def _add_revision(parser: FlagParser) -> None:
    parser.add_argument("--import", dest="import_module", metavar="MODULE", help="imported first: see hf-al train")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hub id (default: main)")


def _add_delimiter(parser: FlagParser) -> None:
    parser.add_argument("--csv_delimiter", type=character, metavar="C", help="of csv cells (default: guessed)")


def _add_file(parser: Any, flag: str, help: str) -> None:
    parser.add_argument(flag, metavar="FILE", help=help).complete = shtab.FILE


def _add_machine_flags(parser: FlagParser) -> None:
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
