"""Before the first step: the output folder, the accelerator, the threads, the model."""

import dataclasses
import logging
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from huggingface_hub.errors import StrictDataclassError

from ..arguments import TrainingArguments, named
from ..atomic import CODE, EXPORTS, WEIGHTS, alone_in, existing
from ..early import check_can_push, check_output_dir
from ..loading import load_encoder_config
from ..messages import last_line
from ..modeling.configuration_al import ALConfig
from ..modeling.objectives import OBJECTIVES
from ..parallel.alone import Alone
from ..parallel.launch import ACCELERATE, LOCAL_RANK, check_gpus, processes_here
from ..parallel.placement import Placement, place
from ..parallel.schema import PROTOCOL
from ..parsing import BALANCED, check_model_keys, check_new_model
from ..registration import MODEL_CLASSES
from ..values import available_cores, capped
from . import trackers
from .checkpoint import differences
from .optim import make_optimizer, make_schedule
from .run_folder import clear_leftovers

logger = logging.getLogger(__name__)

NEED_LABELS = ("class_weights", "label_smoothing")  # config values whose check needs the data
# Arguments in which processes may differ: where a machine has its files, and what it displays
OF_A_MACHINE = {*named("path", "file", "any"), "preprocessing_num_workers", "disable_tqdm", "report_to", "plots"}
# What a run may leave in its folder, and so what --overwrite_output_dir removes
RUN_FILES = (
    "config.json", *WEIGHTS, EXPORTS, "shared-????????.tmp", "checkpoints", "logs", "report.json", "report.md", "plots",
    "trace.json", "training_config.yaml", "tokenizer.json", "tokenizer_config.json", *CODE,
)  # fmt: skip


def check_arguments(args: TrainingArguments, look: bool = True) -> None:
    """Refuses what cannot work before any data is read; with `look`, also an output folder that cannot be used, and a
    push to a Hub that cannot work."""
    check_model(args)
    if look:
        check_output_dir(args)
        if args.push_to_hub:
            check_can_push(args.hub_id)


def check_model(args: TrainingArguments) -> None:
    """Refuses unknown config values, and those out of range, before any data is read. Those for a saved model are
    checked when it is there."""
    make_schedule(args, total_steps=100)
    make_optimizer(args, [{"params": [torch.zeros(1)], "lr": 1.0}])
    if args.model_name_or_path:
        return
    check_model_keys(args)
    check_new_model(args)
    config = make_config(args, known_values(args))
    if args.encoder and args.max_seq_length > config.max_position_embeddings:
        raise ValueError(
            f"Expected a max_seq_length of at most {config.max_position_embeddings}, the positions of {args.encoder}, "
            f"got {args.max_seq_length}. Pass --max_seq_length {config.max_position_embeddings} or less."
        )


def known_values(args: TrainingArguments) -> dict[str, Any]:
    """The config values that are known before the data: without those that need labels, and cuts to be measured."""
    return {n: v for n, v in args.model.items() if n not in NEED_LABELS and v != BALANCED}


def make_config(args: TrainingArguments, values: dict[str, Any]) -> ALConfig:
    """The config of the run's model; of a pretrained encoder, with what that decides."""
    make = MODEL_CLASSES[args.model_type][0]
    if args.encoder:
        make = partial(make.from_encoder, load_encoder_config(args.encoder))
    try:
        config: ALConfig = make(**values)
    except StrictDataclassError as error:  # it is neither a ValueError nor one line
        raise ValueError(last_line(error)) from None
    if args.cache_frozen and getattr(config, "carry_state", False):
        raise ValueError(
            "Expected carry_state=False with cache_frozen, got True: only hidden states are kept. Leave one out."
        )
    return config


@contextmanager
def held_output_dir(folder: Path, args: TrainingArguments, transport: Alone) -> Iterator[None]:
    """Prepares the folder; inside, no other run can have it."""
    with ExitStack() as held:
        transport.together(lambda: prepare_output_dir(folder, args, held) if transport.is_main else None)
        yield


def prepare_output_dir(folder: Path, args: TrainingArguments, held: ExitStack) -> None:
    """Creates the folder, and one for its checkpoints, and holds it; if the arguments say so, removes an earlier run
    from it, its config.json first."""
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        held.enter_context(alone_in(folder))
        clear_leftovers(folder / "checkpoints")
        if args.overwrite_output_dir and args.resume_from_checkpoint is None:
            remove_run(folder)
    except OSError as error:
        raise ValueError(
            f"Expected an output_dir that can be emptied, got {folder}: {error.strerror or error}. Pass another "
            "folder, or fix its permissions."
        ) from None


def remove_run(folder: Path, more: Iterable[str] = ()) -> None:
    """Removes what a run may have left in its folder, its config.json first, and what else matches `more`."""
    for path in [p for pattern in (*RUN_FILES, *more) for p in folder.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def check_same_arguments(args: TrainingArguments, transport: Alone) -> None:
    values = {"protocol": PROTOCOL, **args.to_dict(), **args.model}
    check_same("arguments", {n: v for n, v in values.items() if n not in {"model", *OF_A_MACHINE}}, transport)


def check_same(what: str, facts: dict[str, Any], transport: Alone) -> None:
    """Every process must have been started with the same arguments and found the same data."""
    everywhere = transport.gather(facts)

    def compare() -> None:
        for process, other in enumerate(everywhere):
            found = differences(everywhere[transport.main], other, "{} is {!r} in the main process and {!r} there")
            if found:
                raise ValueError(
                    f"Expected the same {what} in all processes, got another at {transport.who(process)}: "
                    f"{found[0]}. Start all of them with the same arguments and data."
                )

    transport.together(compare)


def look_for_folder(folder: Path, transport: Alone) -> None:
    """Finds out whether all processes see the folder of the main process. If not, as on several machines, checkpoints
    will go over the wire."""
    if transport.main == 0:
        return

    def touched() -> str:
        descriptor, name = tempfile.mkstemp(prefix="shared-", suffix=".tmp", dir=existing(folder))
        os.close(descriptor)
        return name

    name = transport.tell(touched)
    try:
        found = transport.gather((existing(folder) / Path(name).name).exists())
    finally:
        if transport.is_main:
            os.unlink(name)
    if not all(found):
        logger.info("%s does not find %s: checkpoints go over the wire.", transport.who(found.index(False)), folder)
        transport.shares_folder = False
        transport.connect_all()


def make_accelerator(args: TrainingArguments) -> Accelerator:
    """The accelerator of this process, and the process group of the launch.

    Raises:
        ValueError: another number of processes than `args.processes`, with the command that starts the right number; a
            tracker that is unknown or not installed.
    """
    _check_world(args, int(os.environ.get("WORLD_SIZE", 1)))
    log_with = [name for name in trackers.chosen(args.trackers) if name != trackers.ENERGY]
    try:
        accelerator = Accelerator(  # places and tracks only; stage.py sets the precision, whatever an earlier one chose
            cpu=args.use_cpu,
            log_with=log_with or None,
            project_config=ProjectConfiguration(args.output_dir, logging_dir=os.path.join(args.output_dir, "logs")),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=args.ddp_timeout))],
        )
    except (ValueError, ImportError, NotImplementedError) as error:
        raise ValueError(f"Could not start accelerate: {error}") from error
    except RuntimeError as error:
        raise ConnectionError(
            f"Expected {args.processes} processes to meet within {args.ddp_timeout} seconds, not all did: "
            f"{str(error).splitlines()[0]}. One of them may have ended before, with a message of its own. Start all of "
            "them again, on another port if something else answered on this one."
        ) from None
    _check_world(args, accelerator.num_processes)
    if accelerator.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"Expected a CPU or a CUDA device, got {accelerator.device}: its random numbers cannot be seeded block by "
            "block, and a run could not be repeated. Pass --use_cpu."
        )
    if accelerator.device.type == "cuda":
        check_gpus(processes_here(), torch.cuda.device_count())
    return accelerator


def _check_world(args: TrainingArguments, processes: int) -> None:
    if processes == args.processes:
        return
    if args.processes == 1:
        objective = args.model.get("objective")
        can_be_split = objective not in OBJECTIVES or not OBJECTIVES[objective].end_to_end
        fix = f"--stages {processes} or --replicas {processes}" if can_be_split else f"--replicas {processes}"
        raise ValueError(
            f"Expected one process, got {processes}: neither the blocks nor the batches are split unless --stages or "
            f"--replicas says so. Pass {fix}, or start it without a launcher: python {_program('-m')}"
        )
    each = "stage" if args.replicas == 1 else "stage of each replica"
    flags = f"--stages {args.stages}" + f" --replicas {args.replicas}" * (args.replicas > 1)
    raise ValueError(
        f"Expected {args.processes} processes, one per {each}, got {processes}. On one machine: hf-al train {flags} "
        f"..., with no {LOCAL_RANK} or {ACCELERATE} of a launcher set; or: {launch_command(args)}"
    )


def launch_command(args: TrainingArguments) -> str:
    """The command that starts `args.processes` processes on this machine."""
    on_cpu = "ACCELERATE_USE_CPU=1 " if args.use_cpu or not torch.cuda.is_available() else ""
    return (
        f"{on_cpu}accelerate launch --multi_gpu --num_processes {args.processes} --num_machines 1 --mixed_precision no "
        f"--dynamo_backend no {_program('--module')}"
    )


def _program(module_flag: str) -> str:
    """What was started, with its arguments, as another program takes it on its command line."""
    spec = sys.modules["__main__"].__spec__
    if spec is not None:
        program = f"{module_flag} {spec.name.removesuffix('.__main__')}"
    else:
        program = shlex.quote(sys.argv[0]) if Path(sys.argv[0]).is_file() else "PROGRAM"
    return f"{program} {shlex.join(sys.argv[1:])}"


def for_this_run(args: TrainingArguments) -> TrainingArguments:
    """A copy of the arguments, so that those of the caller stay as they are, with the precision that `accelerate launch
    --mixed_precision` asks for.

    Raises:
        ValueError: a precision in which blocks cannot be trained.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", "bf16"):
        raise ValueError(
            f"Expected --mixed_precision no or bf16, got {asked} from the launcher. fp16 and fp8 need a loss scaler, "
            "and one scaler cannot serve blocks that are updated one after the other. Pass bf16."
        )
    return dataclasses.replace(args, bf16=args.bf16 or asked == "bf16", model=dict(args.model))


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Without `shown`, `datasets` shows no bars inside."""
    if shown or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def set_threads(args: TrainingArguments) -> None:
    """Sets the number of threads. It affects rounding, so it follows from the arguments, never from the launcher."""
    local = processes_here()
    cores = available_cores()
    threads = capped("threads", args.threads) if args.threads else max(1, cores // local)
    torch.set_num_threads(threads)
    each = f", in each of {local} processes here" if local > 1 else ""
    logger.info("Threads: %d of %d cores%s.", threads, cores, each)


def place_blocks(args: TrainingArguments, config: ALConfig, times: list[list[float]] | None) -> Placement:
    """Which stage owns which blocks, according to `args.placement`; `times` of `unit_seconds` are for `balanced`.

    Raises:
        ValueError: a split that this model does not allow.
    """
    split = [f"--stages {args.stages}"] * (args.stages > 1) + ["--offload"] * args.offload
    if split and OBJECTIVES[config.objective].end_to_end:
        raise ValueError(
            f"Expected a local objective with {split[0]}, got {config.objective}: its gradients cross all blocks. "
            f"Leave {split[0]} out, or pass another --objective."
        )
    return place(config.units, args.stages, args.placement, *(times or []))
