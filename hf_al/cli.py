"""The command line: hf-al train | evaluate.

Results go to standard output, messages to standard error. Exit status 0, or 2 for a user's mistake.
"""

import json
import logging
import sys
from collections.abc import Callable

USAGE = """usage: hf-al COMMAND [flags]

commands:
  train      train a classifier:   hf-al train --config recipes/tweets_lstm.yaml --output_dir out/tweets
  evaluate   metrics of a model:   hf-al evaluate out/tweets --test_file test.csv

hf-al COMMAND --help lists the flags of a command.
"""


def _train(argv: list[str]) -> None:
    from .training.arguments import parse_arguments

    args = parse_arguments(argv, "hf-al train")
    from . import train

    report = train(args).report
    split = "test" if "test" in report else "validation"
    from .report import table

    print(f"{split} metrics by exit ({args.output_dir}/report.md has the rest):\n{table(report[split])}")


def _evaluate(argv: list[str]) -> None:
    from .training.arguments import FlagParser

    parser = FlagParser("hf-al evaluate", description="Metrics of a trained model, one json object.")
    parser.add_argument("model", metavar="DIR", help="folder of a trained model, or a Hub id")
    parser.add_argument("--test_file", required=True, help="csv, tsv, json lines or parquet, also .gz")
    parser.add_argument("--text_column_names", help="column of the text, or two, comma-separated, for pairs")
    parser.add_argument("--label_column_name", help="column of the label")
    parser.add_argument("--per_device_eval_batch_size", type=int, default=128, help="examples of a batch")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    args = parser.parse_args(argv)
    from .evaluation import evaluate_file

    print(json.dumps(evaluate_file(args)))


COMMANDS: dict[str, Callable[[list[str]], None]] = {"train": _train, "evaluate": _evaluate}


def main(argv: list[str] | None = None) -> None:
    """Runs one command; a user's mistake becomes one message and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        sys.exit(0 if argv else 2)
    if argv[0] not in COMMANDS:
        print(f"hf-al: Expected one of {', '.join(COMMANDS)}, got {argv[0]!r}. See hf-al --help.", file=sys.stderr)
        sys.exit(2)
    set_up_output()
    try:
        COMMANDS[argv[0]](argv[1:])
    except KeyboardInterrupt:
        print("hf-al: interrupted. --resume_from_checkpoint last goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not _is_users_mistake(error):
            raise
        print(f"hf-al {argv[0]}: error: {_message(error)}", file=sys.stderr)
        sys.exit(2)


def set_up_output() -> None:
    """Messages to standard error; no progress bars of libraries where nobody watches."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("hf_al").setLevel(logging.INFO)
    from datasets import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if not sys.stderr.isatty():
        disable_progress_bars()


def _is_users_mistake(error: Exception) -> bool:
    from huggingface_hub.errors import StrictDataclassError

    return isinstance(error, (ValueError, OSError, StrictDataclassError))


def _message(error: Exception) -> str:
    """The sentence that was raised; transformers' strict configs wrap it in a line of their own."""
    text = str(error)
    if "validation error" in text.lower() and ": " in text.splitlines()[-1]:
        text = text.splitlines()[-1].split(": ", 1)[1]
    return text


if __name__ == "__main__":
    main()
