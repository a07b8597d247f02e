"""`hf-al export`: a copy of a model, or graphs of it for other runtimes. Imports happen when it runs."""

import importlib.util
from argparse import ArgumentTypeError, Namespace
from pathlib import Path

from .atomic import export
from .early import check_is_new, check_model_name
from .flags import add_copy, add_labelled, check_labelled_file, labelled, load_for_copy, set_up_output
from .parsing import FlagParser, reader

COPY, ONNX, PROGRAM = FORMATS = ("safetensors", "onnx", "torch_export")
PACKAGES = ("onnx", "onnxruntime", "onnxscript")  # for onnx
DATA = ("validation_file", "dataset_name")  # flags that name labelled text
OF_DATA = ("csv_delimiter", "dataset_config_name", "validation_split_name", "text_column_names", "label_column_name")


def export_flags(parser: FlagParser) -> None:
    add_copy(parser)
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default=COPY,
        help="safetensors: a model as it was; onnx: graphs for onnxruntime; torch_export: programs for torch alone "
        "(default: safetensors)",
    )
    parser.add_argument("--inference_only", action="store_true", help="drop the parameters that only training needs")
    parser.add_argument(
        "--exits",
        type=exit_list,
        metavar="LIST",
        help="besides a graph of each block: after which blocks graphs of the whole model stop, or all (default: the "
        "last)",
    )
    parser.add_argument("--quantize", choices=["int8"], help="with onnx: also write each graph with int8 weights")
    add_labelled(parser, "validation", required=False)


def exit_list(text: str) -> list[int] | str:
    """For argparse's `type`: blocks, or `all`."""
    blocks: list[int] = [] if text == "all" else reader(list[int])(text)
    if text != "all" and (not blocks or len(set(blocks)) < len(blocks)):
        raise ArgumentTypeError(f"expected blocks, counted from 0, each once, or all, got {text!r}")
    return sorted(blocks) or text


def run_export(flags: Namespace) -> None:
    _check_flags(flags)
    if flags.format == COPY:
        model, tokenizer, out = load_for_copy(flags)
        with export(out) as aside:
            model.save_pretrained(aside, inference_only=flags.inference_only)
            tokenizer.save_pretrained(aside)
        return
    check_model_name(flags.model, flags.revision)
    check_is_new(Path(flags.out))
    set_up_output()
    from .saved.inspection import load_config

    config = load_config(flags.model, flags.revision)
    if config.late_block is not None:
        raise ValueError(
            f"Expected a model without late text with --format {flags.format}, got {flags.model} with "
            f"late_block={config.late_block}, whose blocks read different parts of a text. Leave --format out."
        )
    if config.numeric_columns:
        raise ValueError(
            f"Expected a model that reads text alone with --format {flags.format}, got {flags.model}, which also reads "
            f"the columns {', '.join(config.numeric_columns)}. Leave --format out."
        )
    exits = _exits(flags, config.exits())
    rows = labelled(flags, "validation") if any(getattr(flags, name) for name in DATA) else None
    model, tokenizer, out = load_for_copy(flags)
    from .exporting import as_text, export_graphs

    found = export_graphs(
        model, tokenizer, out, flags.model, flags.format, exits, flags.quantize == "int8", rows,
        flags.text_column_names, flags.label_column_name,
    )  # fmt: skip
    print(as_text(found))


def _check_flags(flags: Namespace) -> None:
    """Refuses what a format does not have, and a missing package.

    Raises:
        ValueError: with what to do.
    """
    given = [name for name in ("exits", "quantize", *DATA) if getattr(flags, name) is not None]
    if flags.format == COPY and given:
        raise ValueError(
            f"Expected --format onnx or torch_export with --{given[0]}, got {COPY}, which copies a model as it is. "
            "Pass --format onnx, or leave it out."
        )
    if flags.format != COPY and flags.inference_only:
        raise ValueError(
            f"Expected no --inference_only with --format {flags.format}, got it: graphs never have what only training "
            "needs. Leave it out."
        )
    if flags.quantize and flags.format == PROGRAM:
        raise ValueError(
            f"Expected --format onnx with --quantize, got {PROGRAM}: only ONNX graphs are quantised. Pass --format "
            "onnx, or leave it out."
        )
    unused = [name for name in OF_DATA if getattr(flags, name) is not None]
    if unused and not any(name in given for name in DATA):
        raise ValueError(f"Expected --validation_file with --{unused[0]}, got none. Pass a file, or leave it out.")
    missing = [name for name in PACKAGES if flags.format == ONNX and importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"Expected the package {missing[0]} for --format onnx, found none. Run: pip install 'hf_al[onnx]'"
        )
    check_labelled_file(flags, "validation")


def _exits(flags: Namespace, known: list[int]) -> list[int]:
    """The blocks whose exits get a graph.

    Raises:
        ValueError: one that has no exit.
    """
    if flags.exits is None:
        return known[-1:]
    if flags.exits == "all":
        return known
    wrong = [block for block in flags.exits if block not in known]
    if wrong:
        raise ValueError(
            f"Expected --exits among {','.join(map(str, known))}, the blocks of {flags.model} that have an exit, got "
            f"{wrong[0]}. Pass one of them, or all."
        )
    return flags.exits
