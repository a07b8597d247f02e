"""`hf-al grow` and `hf-al prune`: more blocks behind those of a trained model, or fewer. Imports happen late."""

import logging
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .arguments import PRETRAINED, TrainingArguments
from .atomic import export
from .early import check_model_name, check_output_dir
from .flags import MODEL, add_copy, add_model, columns_of_run, load_for_copy, positive, set_up_output
from .headers import columns_of
from .parallel.launch import failing_once, is_launched
from .parallel.placement import PLACEMENTS
from .parsing import PER_BLOCK, FlagParser, add_training_flags, reader, resolve
from .report import read_report, write_report

logger = logging.getLogger(__name__)

# --- grow

DECIDED = ("model_name_or_path", "num_blocks", "frozen_blocks", "freeze", "objective")  # by what is grown


def grow_flags(parser: FlagParser) -> None:
    parser.usage = "hf-al grow DIR --output_dir OUT (--add_blocks N | --grow_until N) [flags of hf-al train]"
    add_model(parser, MODEL)
    add_training_flags(parser)
    depth = parser.add_argument_group("grow").add_mutually_exclusive_group(required=True)
    depth.add_argument(
        "--add_blocks", type=positive, metavar="N", help="new blocks, which learn while all others stay as they are"
    )
    depth.add_argument(
        "--grow_until",
        type=positive,
        metavar="N",
        help="one new block after the other, up to N in all, as long as the last exit becomes better on validation",
    )


def run_grow(flags: Namespace, run: Callable[[dict[str, Any]], None]) -> None:
    """`run`: trains with the flags of hf-al train."""
    values = dict(vars(flags))
    name, add, until = (values.pop(key) for key in ("model", "add_blocks", "grow_until"))
    given = [key for key in DECIDED if key in values]
    if given:
        raise ValueError(
            f"Expected no --{given[0]} with hf-al grow, got one: it follows from {name}. Leave it out, or use hf-al "
            "train."
        )
    failing_once(lambda: check_model_name(name, values.get("model_revision")))
    if until is None:
        run(failing_once(lambda: with_columns({**values, **growth(name, values.get("model_revision"), add)})))
    else:
        grow_until(values, name, until, run)


def with_columns(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags of a run that grows a model, with the columns that none of them names as in the run of the model."""
    args = resolve({**flags, "print_config": True})
    columns = columns_of(args.train_file, args.csv_delimiter) if args.train_file else []
    theirs = columns_of_run(flags["model_name_or_path"], columns)
    return {**flags, **{flag: names for flag, names in theirs.items() if getattr(args, flag) is None}}


def growth(name: str, revision: str | None, blocks: int) -> dict[str, Any]:
    """The flags of a run that puts new blocks behind those of a trained model. The earlier blocks keep all their
    weights, so that their exits go on to answer the same.

    Raises:
        ValueError: not an AL model, or one behind which no block can be put.
    """
    from .modeling.objectives import OBJECTIVES
    from .saved.inspection import load_config

    config = load_config(name, revision)
    why = ""
    if config.model_type == PRETRAINED:
        why = "whose layers are those of a pretrained encoder. Cut that into more blocks: hf-al train --encoder"
    elif config.inference_only:
        why = "saved with inference_only=True, which cannot be trained. Pass the whole model"
    elif OBJECTIVES[config.objective].end_to_end:
        why = f"of the objective {config.objective}, whose only exit would move. Pass one of a local objective"
    if why:
        raise ValueError(f"Expected a model that can grow, got {name}, {why}.")
    return {
        "model_name_or_path": name,
        "num_blocks": config.num_blocks + blocks,
        "frozen_blocks": config.num_blocks,
        "freeze": "blocks",
        "objective": config.objective,
    }


def grow_until(values: dict[str, Any], name: str, most: int, run: Callable[[dict[str, Any]], None]) -> None:
    """Adds one block at a time, each by a run of its own in a folder `blocks-N` of the output folder, until one does
    not make the last exit better on validation, or there are `most`. The best model becomes that of the output folder.

    Args:
        values: flags of hf-al train.
        name: the model to start from.
        most: blocks in all.
        run: trains with such flags.

    Raises:
        ValueError: a model that cannot grow or has `most` blocks already, or flags that do not go together.
    """
    from .metrics import is_better
    from .training.setup import remove_run

    best, revision = name, values.pop("model_revision", None)
    first = growth(best, revision, 1)
    if most < first["num_blocks"]:
        raise ValueError(
            f"Expected grow_until above {first['frozen_blocks']}, the blocks of {name}, got {most}. Pass more."
        )
    flags = with_columns({**values, **first, "model_revision": revision})
    if values["print_config"]:  # of the first run
        run(flags)
        return
    args = resolve(flags)
    _check_several_runs(args, most > first["num_blocks"])
    folder = check_output_dir(args)
    if args.overwrite_output_dir and args.resume_from_checkpoint is None:
        remove_run(folder, ["blocks-*"])
    set_up_output(args.disable_tqdm)
    for blocks in range(first["num_blocks"], most + 1):
        here = folder / f"blocks-{blocks}"
        if not (args.resume_from_checkpoint and (here / "report.json").is_file()):
            flags = {**values, **growth(best, revision, 1), "model_revision": revision, "output_dir": str(here)}
            run(with_columns(flags))
        report = read_report(str(here))
        metric = report["metric"]
        before, now = (exit[metric] for exit in report["validation"][-2:])
        if not is_better(metric, now, before):
            logger.info("Block %d does not help: validation %s %.4f, before %.4f.", blocks - 1, metric, now, before)
            break
        best, revision = str(here), None
    _copy(best, revision, folder)
    logger.info("The best model, that of %s, is in %s.", best, folder)


def _check_several_runs(args: TrainingArguments, several: bool) -> None:
    """Refuses what only one run can do, if there may be `several`."""
    fixed = [name for name in PER_BLOCK if isinstance(getattr(args, name), list)]
    fixed += ["placement"] if args.placement not in PLACEMENTS else []
    if several and fixed:
        raise ValueError(
            f"Expected one {fixed[0]} for any number of blocks with --grow_until, got {getattr(args, fixed[0])}: each "
            "run has a block more. Leave it out, or add the blocks one by one: --add_blocks 1."
        )
    if is_launched():
        raise ValueError(
            "Expected no launcher with --grow_until, got one: each run starts its own processes. Pass --stages to "
            "hf-al grow itself."
        )
    if args.push_to_hub:
        raise ValueError("Expected no push_to_hub with --grow_until, got it. Run hf-al push when it is done.")
    if args.resume_from_checkpoint not in (None, "last"):
        raise ValueError(
            f"Expected resume_from_checkpoint=last with --grow_until, got {args.resume_from_checkpoint}: there are "
            "several runs, and the one that was stopped goes on."
        )


def _copy(name: str, revision: str | None, folder: Path) -> None:
    """The files of a finished run, without its checkpoints and logs."""
    from .loading import local_copy

    source = local_copy(name, revision)
    with export(folder) as aside:
        for path in source.iterdir():
            if path.is_file():
                shutil.copy(path, aside)
        if (source / "plots").is_dir():
            shutil.copytree(source / "plots", aside / "plots")


# --- prune


def prune_flags(parser: FlagParser) -> None:
    add_copy(parser)
    parser.add_argument("--keep", type=reader(int), required=True, metavar="N", help="how many blocks, the first ones")


def run_prune(flags: Namespace) -> None:
    model, tokenizer, out = load_for_copy(flags)
    from .loading import local_copy, weights_sha256
    from .saved.pruning import prune, pruned_report

    pruned = prune(model, flags.keep)
    source = local_copy(flags.model, flags.revision)
    with export(out) as aside:
        pruned.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        if (source / "report.json").is_file():  # a model need not come from a run of hf-al train
            report = pruned_report(read_report(str(source)), pruned)
            write_report(aside, {**report, "weights": weights_sha256(aside)})
