"""The commands that put a model behind an address: hf-al demo and hf-al serve. Imports happen when a command runs."""

import sys
from argparse import Namespace
from pathlib import Path

from .early import check_exit, check_is_new, check_model_name
from .flags import (
    MODEL,
    add_file,
    add_model,
    add_revision,
    exit_name,
    not_negative,
    port,
    positive,
    set_threads,
    set_up_output,
)
from .parsing import FlagParser

# --- demo


def demo_flags(parser: FlagParser) -> None:
    add_model(parser, MODEL)
    add_revision(parser)
    add_file(parser, "--examples", "to try, one text per line, or two with a tab between (default: a few sentences)")
    parser.add_argument("--server_name", metavar="HOST", help="address to serve (default: this machine only)")
    parser.add_argument("--server_port", type=port, metavar="N", help="(default: the first free one from 7860)")
    parser.add_argument("--share", action="store_true", help="also a public address, through gradio's servers")
    parser.add_argument("--space", metavar="DIR", help="write the files of a Hub Space there instead")


def run_demo(flags: Namespace) -> None:
    check_model_name(flags.model, flags.revision)
    if flags.examples and not Path(flags.examples).is_file():
        raise ValueError(f"Expected a file at {flags.examples}, found none. Check --examples.")
    if flags.space:
        check_is_new(Path(flags.space), "--space")
    set_up_output(disable_tqdm=not sys.stderr.isatty())
    from .saved.demo import demo

    demo(flags)


# --- serve


def serve_flags(parser: FlagParser) -> None:
    add_model(parser, MODEL)
    add_revision(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="HOST", help="address to serve; 0.0.0.0 for all (default: this machine)"
    )
    parser.add_argument("--port", type=port, default=8000, metavar="N", help="(default: 8000)")
    parser.add_argument(
        "--exit",
        type=exit_name,
        metavar="K",
        help="the block to stop at, or adaptive, unless a request names one (default: adaptive if the model is "
        "calibrated, else the last block)",
    )
    numbers = {
        "max_batch_size": (32, positive, "texts that are answered together"),
        "max_wait_ms": (5, not_negative, "milliseconds that a text waits for others to be answered with"),
        "max_waiting": (256, positive, "texts that may wait; more are refused with status 503"),
        "max_body_kib": (1024, positive, "size of a request"),
    }
    for name, (default, kind, help) in numbers.items():
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=f"{help} (default: {default})")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: all cores)")


def run_serve(flags: Namespace) -> None:
    check_model_name(flags.model, flags.revision)
    check_exit(flags.model, flags.exit)
    if flags.max_waiting < flags.max_batch_size:
        raise ValueError(
            f"Expected max_waiting of at least max_batch_size, {flags.max_batch_size}, got {flags.max_waiting}: no "
            "batch would be full. Pass another --max_waiting."
        )
    set_up_output(disable_tqdm=True)
    from .saved.serving import serve

    set_threads(flags)
    serve(flags)
