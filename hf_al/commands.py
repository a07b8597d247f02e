"""The commands of hf-al: the flags of each, and what it does. Imports happen when a command runs."""

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .depth import grow_flags, prune_flags, run_grow, run_prune
from .early import (
    check_can_push,
    check_data_arguments,
    check_destination,
    check_exit,
    check_input_and_output,
    check_model_folder,
    check_model_name,
    check_parent,
    check_training,
    input_format,
)
from .export_command import export_flags, run_export
from .flags import (
    COLUMNS,
    MODEL,
    add_delimiter,
    add_file,
    add_labelled,
    add_machine_flags,
    add_model,
    add_revision,
    check_labelled_file,
    exit_name,
    labelled,
    positive,
    set_threads,
    set_up_output,
    trained_columns,
)
from .messages import table
from .metadata import check_metadata
from .modeling.limits import EXIT_RULES
from .parallel.launch import failing_once, is_for_others_to_start, is_launched, is_main, launch
from .parallel.placement import check_placement
from .parsing import FlagParser, add_training_flags, planned_blocks, reader, resolve
from .report import read_report
from .serving_commands import demo_flags, run_demo, run_serve, serve_flags
from .study.command import run_study, study_flags
from .sweep.command import run_sweep, sweep_flags

# --- train


def _train_flags(parser: FlagParser) -> None:
    parser.usage = "hf-al train --output_dir DIR [--config FILE] [--train_file FILE] [flags]"
    add_training_flags(parser)


def _train(flags: Namespace) -> None:
    train(vars(flags))


def train(flags: dict[str, Any]) -> None:
    """One run, with these flags."""
    args = failing_once(lambda: resolve(flags))
    if flags["print_config"]:
        print(args.to_yaml(), end="")
        return
    failing_once(lambda: check_training(args, is_main(), reads_data=not (args.dispatch_data and is_launched())))
    if not args.model_name_or_path:
        failing_once(lambda: check_placement(args.placement, planned_blocks(args), args.stages))
    if args.processes > 1 and not is_for_others_to_start():
        launch(args.to_yaml(), args.processes, args.use_cpu)
        return
    set_up_output(args.disable_tqdm)
    import torch.distributed as dist

    from .training import loop

    try:
        report = loop.train(args).report
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if not is_main():
        return
    split = "test" if "test" in report else "validation"
    print(f"{split} metrics by exit ({args.output_dir}/report.md has the rest):\n{table(report[split])}")


# --- evaluate, predict


def _evaluate_flags(parser: FlagParser) -> None:
    add_model(parser, MODEL)
    add_revision(parser)
    add_labelled(parser, "test")
    add_file(parser, "--predictions", "also write the answers to each row: .jsonl, .csv, .tsv or .parquet")
    parser.add_argument(
        "--per_device_eval_batch_size",
        type=positive,
        default=128,
        metavar="N",
        help="examples per batch (default: 128)",
    )
    add_machine_flags(parser)


def _evaluate(flags: Namespace) -> None:
    check_model_name(flags.model, flags.revision)
    check_labelled_file(flags, "test")
    if flags.predictions:
        check_destination("--predictions", flags.predictions, flags.test_file, flags.model)
    set_up_output(flags.disable_tqdm)
    from .evaluation import evaluate

    data = labelled(flags, "test")
    set_threads(flags)
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
    add_model(parser, MODEL)
    parser.add_argument("texts", metavar="TEXT", nargs="*", default=[], help="to classify, in place of --input")
    add_revision(parser)
    add_file(parser, "--input", "text to classify, .txt, .csv, .tsv or .jsonl, also .gz (default: standard input)")
    add_file(
        parser, "--output", ".jsonl, .csv, .tsv or .parquet, one row each (default: json lines to standard output)"
    )
    parser.add_argument(
        "--input_format",
        choices=["text", "csv", "tsv", "jsonl"],
        help="text: one text per line (default: from the ending of --input; text for standard input)",
    )
    parser.add_argument("--text_column_names", metavar="NAME", help=COLUMNS)
    add_delimiter(parser)
    parser.add_argument("--id_column", metavar="NAME", help="column whose value is put into each answer as its id")
    parser.add_argument("--with_text", action="store_true", help="put the text into each answer")
    parser.add_argument("--all_scores", action="store_true", help="give scores of all classes, not just the answer's")
    parser.add_argument(
        "--exit",
        "--exit_block",
        type=exit_name,
        dest="exit_block",
        metavar="K",
        help="stop after block K, counted from 0; adaptive: each text stops where hf-al calibrate found the model to "
        "be sure enough",
    )
    parser.add_argument("--batch_size", type=positive, default=64, metavar="N", help="texts per batch (default: 64)")
    add_machine_flags(parser)


def _predict(flags: Namespace) -> None:
    check_model_name(flags.model, flags.revision)
    input_format(flags.input, flags.input_format)
    check_input_and_output(flags)
    check_exit(flags.model, flags.exit_block)
    set_up_output(flags.disable_tqdm)
    from .saved.prediction import predict_file

    set_threads(flags)
    predict_file(flags, trained_columns(flags.model).get("text_column_names"))


# --- calibrate


def _calibrate_flags(parser: FlagParser) -> None:
    add_model(parser, "folder of a trained model")
    parser.add_argument("--import", dest="import_module", metavar="MODULE", help="imported first: see hf-al train")
    add_labelled(parser, "validation")
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument(
        "--max_accuracy_drop",
        type=reader(float),
        default=0.002,
        metavar="X",
        help="how much accuracy may be lost, as a share of the rows; as fast as possible (default: 0.002)",
    )
    goal.add_argument(
        "--target_speedup",
        type=reader(float),
        metavar="X",
        help="how many times as fast it is expected to be; as accurate as possible",
    )
    parser.add_argument("--rule", choices=EXIT_RULES, default=EXIT_RULES[0], help="by which texts leave early")
    add_machine_flags(parser)


def _calibrate(flags: Namespace) -> None:
    check_model_folder(flags.model)
    check_labelled_file(flags, "validation")
    set_up_output(flags.disable_tqdm)
    from .exits import calibrate_folder

    data = labelled(flags, "validation")
    set_threads(flags)
    found = calibrate_folder(
        flags.model,
        data,
        max_accuracy_drop=flags.max_accuracy_drop,
        target_speedup=flags.target_speedup,
        rule=flags.rule,
        text_column_names=flags.text_column_names,
        label_column_name=flags.label_column_name,
        show_progress=sys.stderr.isatty() and not flags.disable_tqdm,
    )
    print(table(found.pop("exits")), table([found]), sep="\n\n")


# --- inspect, compare


def _inspect_flags(parser: FlagParser) -> None:
    add_model(parser, MODEL)
    add_revision(parser)
    parser.add_argument("--json", action="store_true", help="one json object instead of a table")


def _inspect(flags: Namespace) -> None:
    check_model_name(flags.model, flags.revision)
    set_up_output()
    from .saved.inspection import as_text, inspect

    found = inspect(flags.model, flags.revision)
    print(json.dumps(found) if flags.json else as_text(found))


def _compare_flags(parser: FlagParser) -> None:
    add_model(parser, "folders of finished runs (output_dir of hf-al train), or Hub ids", "models", nargs="+")
    parser.add_argument("--json", action="store_true", help="one json object instead of tables")


def _compare(flags: Namespace) -> None:
    from .saved.comparison import as_text, compare

    found = compare(flags.models)
    print(json.dumps(found) if flags.json else as_text(found))


# --- push


def _push_flags(parser: FlagParser) -> None:
    add_model(parser, "folder of a finished run (output_dir of hf-al train)")
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
    parser.add_argument("--import", dest="import_module", metavar="MODULE", help="imported first: see hf-al train")


def _push(flags: Namespace) -> None:
    check_metadata(flags.language, flags.license)
    read_report(flags.model)
    check_can_push(flags.repo_id)
    set_up_output(disable_tqdm=not sys.stderr.isatty())
    from .hub import push

    values = {name: value for name, value in vars(flags).items() if name != "import_module"}
    print(push(values.pop("model"), **values))


# --- plan


def _plan_flags(parser: FlagParser) -> None:
    parser.usage = "hf-al plan [--config FILE] [flags of hf-al train] [--stages LIST] [--bandwidth RATE]"
    parser.conflict_handler = "resolve"  # --stages is a list here
    add_training_flags(parser)
    group = parser.add_argument_group("plan")
    group.add_argument(
        "--stages", type=reader(list[int]), default=[], metavar="LIST", help="how many (default: 1,2,4,... one a block)"
    )
    group.add_argument("--bandwidth", default="10Gbit", metavar="RATE", help="of a link, per second (default: 10Gbit)")
    group.add_argument("--latency", default="50us", metavar="TIME", help="of a link (default: 50us)")
    group.add_argument("--tokens", type=positive, metavar="N", help="of each text; then no data is read")
    group.add_argument("--json", action="store_true", help="one json object instead of a table")
    add_file(group, "--plot", "draw texts per second over stages, and time over depth")


def _plan(flags: Namespace) -> None:
    names = ("stages", "bandwidth", "latency", "tokens", "json", "plot")
    own = {name: vars(flags).pop(name) for name in names}
    args = resolve({**vars(flags), "print_config": True})  # without an output folder
    if own["plot"]:
        check_parent("--plot", Path(own["plot"]))
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
    "grow": Command("add blocks to a trained model, which stays as it is", grow_flags, partial(run_grow, run=train)),
    "prune": Command("remove the last blocks of a trained model", prune_flags, run_prune),
    "evaluate": Command("metrics of a trained model on labelled text, one json object", _evaluate_flags, _evaluate),
    "predict": Command("classify text: a file, or lines from standard input", _predict_flags, _predict),
    "calibrate": Command("let texts leave a trained model early, where it is sure", _calibrate_flags, _calibrate),
    "inspect": Command("blocks, shapes, parameters and exits of a model", _inspect_flags, _inspect),
    "compare": Command("a table of several runs", _compare_flags, _compare),
    "push": Command("share a finished run on the Hub: model, card, results", _push_flags, _push),
    "export": Command("a copy of a model, or graphs of it for other runtimes", export_flags, run_export),
    "plan": Command("predict speed, waiting and memory of a split over machines", _plan_flags, _plan),
    "sweep": Command("the best settings of each way of training, searched by Optuna", sweep_flags, run_sweep),
    "study": Command("many runs that answer one question, and a page on them", study_flags, run_study),
    "demo": Command("a page on which to try a model: the answer at every exit", demo_flags, run_demo),
    "serve": Command("answer requests over HTTP, many at a time", serve_flags, run_serve),
}
