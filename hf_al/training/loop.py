"""THE training loop. One process is one stage; with one stage it owns every block.

Everything a step does follows from (arguments, data, step): batch order, dropout and learning rate have no state. A
resumed run therefore needs only weights, optimizer tensors and a step number, and ends like an uninterrupted one.
"""

import json
import logging
import signal
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import DatasetDict
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PreTrainedTokenizerBase

from ..arguments import TrainingArguments
from ..atomic import existing
from ..data.batching import Collator, token_lengths
from ..data.streaming import StreamOrder
from ..hub import Checkpoints, push_or_warn
from ..metrics import SMALLER_IS_BETTER, exit_metrics
from ..modeling.modeling_al import ALForSequenceClassification
from ..modeling.objectives import OBJECTIVES
from ..parallel.alone import Alone
from ..parallel.launch import failing_once
from ..parallel.transport import connect
from ..parsing import BALANCED
from . import checkpoint, dispatch, energy, health, run_folder, trackers
from .finish import finish
from .measure import measured_cuts, unit_seconds
from .memory import shortage_explained
from .offload import Offload
from .optim import BlockOptimizers
from .plan import Plan, make_plan
from .progress import OnEvaluation, Progress
from .record import Record
from .setup import (
    check_arguments,
    check_same,
    check_same_arguments,
    for_this_run,
    held_output_dir,
    look_for_folder,
    make_accelerator,
    place_blocks,
    progress_bars,
    set_threads,
)
from .signals import StopSignals
from .stage import Stage
from .start import keep_blocks, load, weights_digest
from .trace import write_trace

logger = logging.getLogger(__name__)

WIRES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class TrainResult:
    """What `train` returns: the best model, its tokenizer, and the content of report.json.

    With several processes, only the main process has the whole model; in the others, blocks of other stages have names
    and shapes, but no weights (device "meta").
    """

    model: ALForSequenceClassification
    tokenizer: PreTrainedTokenizerBase
    report: dict[str, Any]


def train(
    args: TrainingArguments, datasets: DatasetDict | None = None, on_evaluation: OnEvaluation | None = None
) -> TrainResult:
    """Trains a classifier according to `args`; leaves model, tokenizer, report and checkpoints in `args.output_dir`.

    With several stages or replicas, every process of the launch calls it with the same arguments and trains its own
    blocks.

    Args:
        args: the run.
        datasets: the splits train, validation (needed with `streaming`) and test, with columns as the column arguments
            name them, else guessed; loaded from the data arguments if None.
        on_evaluation: called in the main process after each evaluation, with the name of the metric that chooses the
            checkpoint and the history of report.json so far. What it raises ends the run.

    Raises:
        ValueError: arguments or data that cannot work, with what to do instead: before the first step, and the output
            folder is as it was. Later: a tracker that cannot start, training that diverges, or too little memory.
        OSError: a disk that is full or refuses; the last checkpoint is kept.
        ConnectionError: a process that is gone, or silent for `args.ddp_timeout` seconds.
        KeyboardInterrupt, SystemExit: Ctrl-C, SIGTERM (status 143), SIGHUP (129): the step is finished and saved first.
            Status 2 in processes that end because another one raised.
    """
    at_ends = partial(shortage_explained, lambda: "the start or the end of the run", "model")
    with progress_bars(shown=not args.disable_tqdm), at_ends(can_offload=not args.offload):
        return _train(failing_once(partial(for_this_run, args)), datasets, on_evaluation)


def _train(args: TrainingArguments, datasets: DatasetDict | None, on_evaluation: OnEvaluation | None) -> TrainResult:
    accelerator = failing_once(partial(make_accelerator, args))
    device = torch.device(accelerator.device)
    transport = connect(args.stages, args.replicas, device, args.ddp_timeout)
    if not transport.is_main:
        logging.getLogger("hf_al").setLevel(logging.ERROR)  # the main process reports for all
    output_dir = Path(args.output_dir)
    try:
        check_same_arguments(args, transport)
        transport.together(partial(check_arguments, args, look=transport.is_main))
        transport.meet()
        set_threads(args)
        set_seed(args.seed)
        if args.model.get("cuts") == BALANCED and args.encoder:
            args.model["cuts"] = transport.tell(partial(measured_cuts, args, device))
        rows = dispatch.read(args, datasets, transport)
        start = transport.together(partial(load, args, *rows), main_first=True)
        model, tokenizer = start.model, start.tokenizer
        times = None
        if args.placement == "balanced" and 1 < args.stages <= len(model.config.units):
            times = transport.tell(lambda: unit_seconds(model, args, device, token_lengths(start.data["train"])))
        placement = transport.together(partial(place_blocks, args, model.config, times))
        plan = transport.together(partial(make_plan, args, start, placement, device))
        check_same("data", plan.identity["data"], transport)
        # everything else about the run follows from the arguments
        run_facts = {"total_steps": plan.total_steps, "placement": placement.blocks_by_stage()}
        if args.processes > 1 and (args.model_name_or_path or args.encoder or args.word_vectors):  # files may differ
            run_facts["first weights"] = weights_digest(model)
        if args.replicas > 1:  # else their weights drift apart
            run_facts |= {name: plan.conditions[name] for name in ("threads", "device", "torch")}
        check_same("run", run_facts, transport)
        check_same("model", plan.identity["model"], transport)
        run = Run(plan, model, tokenizer, accelerator, transport, on_evaluation)
        look_for_folder(output_dir, transport)
        run.resume()
        with held_output_dir(output_dir, args, transport):
            with energy.measured(transport.is_main and trackers.ENERGY in trackers.chosen(args.trackers)) as kwh:
                run.fit()
            report = finish(run, tokenizer, kwh)
            if args.push_to_hub and transport.is_main:
                push_or_warn(args.output_dir, args.hub_id, args.hub_private_repo)
    except Exception as error:
        transport.failed(error)
        raise
    finally:
        trackers.finish(accelerator, output_dir)
    return TrainResult(model, tokenizer, report)


class Run:
    """The steps of one stage, between a plan and a finished model. Call `resume`, then `fit`."""

    def __init__(
        self,
        plan: Plan,
        model: ALForSequenceClassification,
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator,
        transport: Alone,
        on_evaluation: OnEvaluation | None,
    ):
        args, number = plan.args, transport.number
        self.plan, self.args, self.model, self.transport = plan, args, model, transport
        self.on_evaluation = on_evaluation
        device = torch.device(accelerator.device)
        keep_blocks(model, plan.placement.blocks(number), torch.device("cpu") if args.offload else device)
        blocks = {k: model.model.blocks[k] for k in plan.placement.blocks(number)}
        units, larger_is_better = plan.placement.units(number), plan.metric not in SMALLER_IS_BETTER
        self.optimizers = BlockOptimizers(blocks, units, args, plan.total_steps, larger_is_better)
        collator = Collator(tokenizer.pad_token_id, model.config.classes)
        wire = WIRES[args.wire_dtype]
        offload = Offload(blocks, self.optimizers, device, plan.output_dir) if args.offload else None
        self.stage = Stage(
            model, plan.placement, device, collator, self.optimizers, transport, wire, args.bf16, offload
        )
        if args.torch_compile:
            self.stage.compile()
        can_offload = not (args.offload or OBJECTIVES[model.config.objective].end_to_end)
        self.shortage_explained = partial(shortage_explained, can_offload=can_offload)
        shares_checkpoints = args.push_to_hub and args.hub_strategy == "checkpoint" and transport.is_main
        self.shared = Checkpoints(args.hub_id, args.hub_private_repo) if shares_checkpoints else None
        self.progress = Progress()
        self.record = Record(plan, self.progress, accelerator, transport)
        self.processes: list[dict[str, Any]] = []  # what each did, once they are done
        self.events: list[dict[str, Any]] = []  # of the trace
        self.at_start = health.part_sums(model, args.embedding_learning_rate_factor == 0)

    def resume(self) -> None:
        """Loads the checkpoint that `resume_from_checkpoint` names; warns if there is none."""
        name, output_dir = self.args.resume_from_checkpoint, self.plan.output_dir
        if name is None:
            return
        found = self.transport.tell(lambda: [str(path) for path in run_folder.candidates(name, output_dir)])
        path = run_folder.first_intact([Path(folder) for folder in found], self._load)
        if path is None:
            logger.warning("No complete checkpoint in %s: starting at step 0.", output_dir)
            return
        best = self.progress.best_step
        with checkpoint.writing("the best checkpoint so far", output_dir):
            self.transport.tell(lambda: run_folder.adopt_best(path, output_dir, best))
        logger.info("Resuming from %s, step %d of %d.", path, self.progress.step, self.plan.total_steps)

    def _load(self, path: Path) -> str | None:
        """Loads this stage's blocks from a checkpoint of this run. Returns what any stage found damaged, else None."""
        transport, offload, damage = self.transport, self.stage.offload, None
        try:
            manifest = run_folder.manifest_of(path, transport)
            if isinstance(self.plan.order, StreamOrder):  # outside of `together`: others may send its rows
                self.plan.order.read_up_to(manifest["progress"]["step"])
            changed = transport.together(partial(self._check_run, manifest, path))
            found = self.stage.blocks, self.optimizers, self.plan.placement
            for k in run_folder.load_blocks(path, manifest, *found, transport):
                if offload:
                    offload.put_away(self.stage.blocks[k])
            history = checkpoint.read_history(path, manifest) if transport.is_main else []
        except checkpoint.Damaged as error:
            damage = error.reason
        damage = next(filter(None, transport.gather(damage)), None)
        if damage is None:
            vars(self.progress).update(manifest["progress"], history=history)
            self.progress.changes += [f"after step {self.progress.step}, {change}" for change in changed]
        return damage

    def _check_run(self, manifest: dict[str, Any], path: Path) -> list[str]:
        """Refuses another run's checkpoint; warns about other differences, and returns them."""
        for what, now in self.plan.identity.items():
            differences = checkpoint.differences(manifest["identity"][what], now)
            if differences:
                raise checkpoint.CannotResume(
                    f"Expected the {what} of {path}, got another: {differences[0]}. Resume with the arguments and data "
                    "of that run, or start anew in another output_dir."
                )
        done, total = manifest["progress"]["step"], self.plan.total_steps
        if done > total:
            raise checkpoint.CannotResume(
                f"Expected a run of more than the {done} steps that {path} has done, got {total}. Raise --max_steps or "
                "--num_train_epochs, or resume from an earlier checkpoint."
            )
        order = self.plan.order
        if isinstance(order, StreamOrder) and order.read_up_to(done) != manifest["stream"]:
            raise checkpoint.CannotResume(
                f"Expected the stream of {path}, got other rows before step {done}. Resume with the data of that run, "
                "or start anew in another output_dir."
            )
        changed = checkpoint.differences(manifest["conditions"], json.loads(json.dumps(self.plan.conditions)))
        if changed:
            logger.warning(
                "The run continues under other conditions, so its result will not be that of an uninterrupted run: %s.",
                "; ".join(changed),
            )
        return changed

    def fit(self) -> None:
        """Runs the remaining optimizer steps, with evaluations, checkpoints and logs."""
        plan, progress, units = self.plan, self.progress, len(self.model.config.units)
        device = self.stage.device
        replicas = self.args.replicas
        found = self.transport.gather(device.type if device.type == "cpu" else str(device))
        devices = [", ".join(dict.fromkeys(found[stage * replicas :][:replicas])) for stage in range(self.args.stages)]
        logger.info(
            "Training %d %s for %d steps on %s.\n%s",
            units, "unit" if units == 1 else "units", plan.total_steps, plan.order.size(),
            plan.placement.table(self.model.model.blocks, replicas, devices),
        )  # fmt: skip
        with logging_redirect_tqdm(), StopSignals() as stop:
            if self.args.cache_frozen and progress.step < plan.total_steps:
                self._cache_frozen()
            self.record.start()
            self.record.warn(plan.warnings)
            self.model.train()
            self.stage.trace.start(progress.step, self.args.trace)
            watched = sys.stderr.isatty() and self.transport.is_main and not self.args.disable_tqdm
            objective = self.model.config.objective
            with self.shortage_explained(lambda: f"step {progress.step + 1} of {plan.total_steps}", "train"):
                self._train_steps(
                    tqdm(total=plan.total_steps, initial=progress.step, disable=not watched, desc=objective), stop
                )
            if self.shared:
                self.shared.finish()
            self.processes = self.record.work_done()
            with checkpoint.writing("the trace", plan.output_dir):
                self.events = write_trace(plan.output_dir, self.stage.trace, self.transport)
            self.transport.tell(lambda: None)  # the main process has everything, and its checkpoint has its name
            # a signal that came meanwhile, to whichever stage, stops all of them here
            received = max(self.transport.gather(int(stop.received or 0)))
        stop.received = signal.Signals(received) if received else None
        if stop.received:
            logger.warning(
                "Stopped by %s after step %d of %d, with a checkpoint in %s. "
                "Continue with --resume_from_checkpoint last.",
                stop.received.name, progress.step, plan.total_steps, plan.output_dir,
            )  # fmt: skip
            stop.raise_received()

    def _cache_frozen(self) -> None:
        rows, folder = self.plan.data["train"], existing(self.plan.output_dir)
        logger.info("Computing the states of frozen blocks, once for each of %d rows.", len(rows))
        with (
            checkpoint.writing("the states of frozen blocks", folder),
            self.shortage_explained(lambda: "the states of frozen blocks", "eval"),
        ):
            size = self.stage.cache_frozen(rows, self.args.per_device_eval_batch_size, folder)
        logger.info("They take %.0f MiB in %s until the run ends.", sum(self.transport.gather(size)) / 2**20, folder)

    def _train_steps(self, bar: tqdm, stop: StopSignals) -> None:
        plan, progress, record = self.plan, self.progress, self.record
        stopping, announced, replica = 0, progress.step, self.transport.replica
        for step, parts in self.stage.batches(plan.train, plan.steps(progress.step, plan.total_steps, replica)):
            if progress.out_of_patience(self.args.early_stopping_patience, plan.metric):
                break
            if step == announced:  # announces what will be received until the next evaluation
                announced = plan.next_evaluation(step)
                self.stage.expect_training(plan.order.lengths, plan.steps(step, announced, replica))
            record.add(*self.stage.train_batch(parts, step, self.args.seed))
            progress.step = step + 1
            bar.update()
            stopping = self.transport.stopping(stop.received or 0)
            evaluate, save = plan.evaluates_after(step + 1), plan.saves_after(step + 1) or stopping != 0
            if progress.step % self.args.logging_steps == 0 or evaluate or save:
                record.add(*self.stage.settle())
                bar.set_postfix(self._log())
                self.stage.trace.lap("log", step)
            if evaluate or save:
                self.stage.share_statistics()
                record.stop_clock()
                save = (evaluate and self._evaluate()) or save
                if save:
                    self._save()
                record.start_clock()
                self.stage.trace.lap("evaluation and checkpoint", step)
            if stopping:
                break
        # a signal that came after the first stage had begun the last step is ignored: the run is over anyway
        stop.received = signal.Signals(stopping) if stopping else None
        record.stop_clock()
        bar.close()
        self.optimizers.release()

    def _log(self) -> dict[str, float]:
        try:
            return self.record.log(self.optimizers.learning_rates(self.progress.step - 1))
        except FloatingPointError as error:
            raise self._not_finite(str(error)) from None

    def _evaluate(self) -> bool:
        """Computes validation metrics of every exit; returns whether the last exit is the best so far."""
        plan, progress = self.plan, self.progress
        with self.shortage_explained(lambda: f"the evaluation after step {progress.step}", "eval"):
            logits = self.stage.evaluate(plan.data["validation"], self.args.per_device_eval_batch_size)
        exits = exit_metrics(logits, plan.labels["validation"], plan.problem_type)
        found = torch.tensor([row[plan.metric] for row in exits], dtype=torch.float64, device=self.stage.device)
        self.transport.from_first_replica([found])  # or their learning rates could part
        self.optimizers.observe(dict(zip((int(row["block"]) for row in exits), found.tolist(), strict=True)))
        try:
            codes = health.code_health(self.model, torch.as_tensor(plan.labels["validation"]), self.transport)
        except FloatingPointError as error:
            raise self._not_finite(f"After step {progress.step}: {error}") from None
        warnings = health.code_warnings(codes, self.model.config, self.args)
        stages = self.transport.pass_on([{"exits": exits, "codes": codes, "warnings": warnings}])
        better = progress.judge(plan.metric, self.transport.tell(lambda: exits[-1][plan.metric]))
        if stages is not None:
            self.record.evaluation(stages, better)
            if self.on_evaluation and self.transport.is_main:
                self.on_evaluation(plan.metric, progress.history)
        return better

    def _not_finite(self, error: str) -> health.Diverged:
        if not (self.transport.is_main or self.transport.shares_folder):
            return health.Diverged(error)  # this process does not see the checkpoints
        kept = checkpoint.complete_checkpoints(self.plan.output_dir)
        last = f"The last checkpoint was written before that: {kept[-1]}." if kept else "There is no checkpoint yet."
        return health.Diverged(f"{error} {last}")

    def _save(self) -> None:
        output_dir, progress = self.plan.output_dir, self.progress
        path = checkpoint.checkpoint_path(output_dir, progress.step)
        facts = {name: value for name, value in vars(progress).items() if name != "history"}
        manifest: dict[str, Any] = {
            "identity": self.plan.identity,
            "conditions": self.plan.conditions,
            "progress": facts,
        }
        if isinstance(self.plan.order, StreamOrder):
            manifest["stream"] = self.plan.order.read_up_to(progress.step)
        with checkpoint.writing(path.name, output_dir):
            if checkpoint.save_checkpoint(
                path, self.stage.blocks, self.optimizers, manifest, progress.history, self.transport
            ):
                run_folder.rotate(output_dir, self.args.save_total_limit, progress.best_step, progress.step)
                if self.shared:
                    best = progress.step if progress.best_step is None else progress.best_step
                    self.shared.send(path, checkpoint.checkpoint_path(output_dir, best))
