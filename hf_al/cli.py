"""The command line: hf-al train | grow | prune | evaluate | predict | calibrate | inspect | compare | push | export |
plan | sweep | study | demo | serve.

Results go to standard output, messages to standard error. Exit status 0, 2 for a user's mistake, 130 for Ctrl-C.
A command's imports happen when it runs: no `--help` waits for torch.
"""

import os
import select
import sys
from argparse import RawDescriptionHelpFormatter
from importlib.metadata import version
from typing import NoReturn

import shtab

from .commands import COMMANDS
from .messages import last_line, nearest
from .own import import_own, named_in
from .parallel.launch import is_launched
from .parsing import FlagParser

EXAMPLES = """\
  hf-al train --train_file train.csv --test_file test.csv --output_dir out/mine
  hf-al evaluate out/mine --test_file test.csv
  hf-al grow out/mine --add_blocks 1 --train_file train.csv --output_dir out/deeper
  hf-al prune out/mine out/shallow --keep 1
  hf-al predict out/mine < texts.txt
  hf-al calibrate out/mine --validation_file validation.csv
  hf-al inspect out/mine
  hf-al compare out/mine out/other
  hf-al push out/mine user/name
  hf-al export out/mine out/small --inference_only
  hf-al export out/mine out/onnx --format onnx
  hf-al plan --config recipes/tweets_lstm.yaml --stages 1,2
  hf-al sweep recipes/sweeps/tweets_lstm.yaml --output_dir out/sweep
  hf-al study recipes/studies/objectives.yaml --output_dir out/study
  hf-al demo out/mine
  hf-al serve out/mine
hf-al COMMAND --help lists the flags of a command."""


def build_parser() -> tuple[FlagParser, dict[str, FlagParser]]:
    """The parser of the program, and those of its commands by name."""
    parser = FlagParser(
        "hf-al",
        usage="hf-al COMMAND [flags]",
        description="Text classifiers trained block by block with Associated Learning.",
        epilog=f"examples:\n{EXAMPLES}",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hf-al {version('hf_al')}")
    shtab.add_argument_to(parser, "--print_completion", help="print a shell's completion script and stop")
    group = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", parser_class=FlagParser)
    commands = {}
    for name, command in COMMANDS.items():
        description = command.help[0].upper() + command.help[1:] + "."
        commands[name] = group.add_parser(name, prog=f"hf-al {name}", help=command.help, description=description)
        command.add_flags(commands[name])
    return parser, commands


# --- running


def main(argv: list[str] | None = None) -> None:
    """Runs one command; a user's mistake becomes one message and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    program = f"hf-al {argv[0]}" if argv and argv[0] in COMMANDS else "hf-al"
    try:
        try:
            _run(argv)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt as stop:
        if is_launched():  # the process that launched it reports it
            sys.exit(130)
        _stop(f"{program}: interrupted.", stop, 130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_closed(sys.stdout.fileno()):
            sys.exit(0)
        if not _is_users_mistake(error):
            raise
        _stop(f"{program}: error: {last_line(error) if _is_strict(error) else error}", error, 2)


def _run(argv: list[str]) -> None:
    for modules in named_in(argv):  # before the parser is built: own config values are flags, too
        import_own(modules)
    parser, commands = build_parser()
    if not argv or argv[0] == "help":
        parser.print_help()
        sys.exit(0 if argv else 2)
    if not argv[0].startswith("-") and argv[0] not in COMMANDS:
        names = list(COMMANDS)
        raise ValueError(
            f"Expected one of {', '.join(names)}, got {argv[0]!r}.{nearest(argv[0], names)} See hf-al --help."
        )
    flags, unknown = parser.parse_known_args(argv)
    command = commands.get(flags.command, parser)
    command.refuse(command.take(unknown, flags))
    if flags.command is None:
        raise ValueError("Expected a command, got none. See hf-al --help.")
    del flags.print_completion
    COMMANDS[vars(flags).pop("command")].run(flags)


def _stop(message: str, error: BaseException, status: int) -> NoReturn:
    """Prints one message: the error and the notes that were added to it (`add_note`). Then ends with `status`."""
    print(" ".join([message, *getattr(error, "__notes__", [])]), file=sys.stderr)
    sys.exit(status)


def _is_closed(standard_output: int) -> bool:
    """Whether the reader of our output is gone (`| head`). If so, the rest is silently dropped."""
    poll = select.poll()
    poll.register(standard_output, 0)
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), standard_output)
    return True


def _is_users_mistake(error: Exception) -> bool:
    return isinstance(error, (ValueError, OSError)) or _is_strict(error)


def _is_strict(error: Exception) -> bool:
    """Whether it comes from transformers' strict configs, which put lines of their own before the message raised."""
    from huggingface_hub.errors import StrictDataclassError

    return isinstance(error, StrictDataclassError)


if __name__ == "__main__":
    main()
