"""THE training loop. One process is one stage; with one stage it owns every block.

Everything a step does follows from (arguments, data, step): batch order, dropout and learning rate have no state. A
resumed run therefore needs weights, optimizer tensors and a step number, and ends where the undisturbed one ends.
"""

import json
import logging
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset, DatasetDict
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PreTrainedTokenizerBase

from .. import report as reporting
from ..data import sources, tokenization
from ..data.batching import BatchOrder, Collator, micro_batches, token_lengths
from ..evaluation import SMALLER_IS_BETTER, chosen_metric, exit_metrics, is_better
from ..modeling.modeling_al import ALForSequenceClassification
from ..parallel.placement import place
from ..parallel.stage import Stage
from . import checkpoint, health, trackers
from .arguments import TrainingArguments
from .atomic import export
from .optim import BlockOptimizers
from .setup import build_model, check_model, check_output_dir, make_accelerator, prepare_output_dir, set_threads
from .signals import StopSignals
from .window import Window

logger = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """What `train` returns: the best model, its tokenizer, and the content of report.json."""

    model: ALForSequenceClassification
    tokenizer: PreTrainedTokenizerBase
    report: dict[str, Any]


@dataclass
class Progress:
    """What a checkpoint remembers besides tensors."""

    step: int = 0
    best_step: int | None = None
    best_metric: float | None = None
    evaluations_without_gain: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


def train(args: TrainingArguments, datasets: DatasetDict | None = None) -> TrainResult:
    """Trains a classifier as `args` say; leaves model, tokenizer, report and checkpoints in `args.output_dir`.

    Args:
        args: the run.
        datasets: the split train and, where there are any, validation and test, with columns text, label and, for
            pairs, text_pair; loaded from the data arguments where it is None.

    Raises:
        ValueError: arguments or data that cannot work, with what to do instead; the output folder is as it was.
        OSError: a disk that is full or refuses; the last checkpoint is kept.
        KeyboardInterrupt, SystemExit: Ctrl-C, SIGTERM (status 143): the step is finished and saved first.
    """
    check_model(args)
    trackers.chosen(args.report_to)
    output_dir = check_output_dir(args)
    accelerator = make_accelerator(args, output_dir)
    set_threads(args)
    set_seed(args.seed)
    data = sources.load_text_datasets(args, datasets)
    tokenizer = tokenization.build_tokenizer(args, data["train"])
    model = build_model(args, tokenizer, data["train"]).to(accelerator.device)
    run = Run(args, output_dir, accelerator, model, tokenizer, tokenization.tokenize(data, tokenizer, args))
    try:
        run.resume()
        prepare_output_dir(output_dir, args)
        run.fit()
        report = run.finish()
    finally:
        trackers.finish(accelerator, output_dir)
    return TrainResult(run.model, tokenizer, report)


class Run:
    """One run: its data, its stage and its progress; `resume`, `fit` and `finish` in this order."""

    def __init__(
        self,
        args: TrainingArguments,
        output_dir: Path,
        accelerator: Accelerator,
        model: ALForSequenceClassification,
        tokenizer: PreTrainedTokenizerBase,
        data: DatasetDict,
    ):
        self.args, self.output_dir, self.accelerator = args, output_dir, accelerator
        self.model, self.tokenizer, self.data = model, tokenizer, data
        self.problem_type = model.config.resolved_problem_type
        self.metric = chosen_metric(args.metric_for_best_model, self.problem_type)
        self.order = BatchOrder(
            token_lengths(data["train"]), args.per_device_train_batch_size * args.gradient_accumulation_steps, args.seed
        )
        steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * len(self.order))
        self.total_steps = max(1, steps)
        self.placement = place(model.config.units)
        units = self.placement.units(0)
        blocks = {k: model.model.blocks[k] for k in self.placement.blocks(0)}
        larger_is_better = self.metric not in SMALLER_IS_BETTER
        self.optimizers = BlockOptimizers(blocks, units, args, self.total_steps, larger_is_better)
        collator = Collator(tokenizer.pad_token_id, model.config.classes)
        self.stage = Stage(model, self.placement, 0, accelerator, collator, self.optimizers)
        if args.torch_compile:
            self.stage.compile()
        self.labels = {name: split_labels(data[name], collator) for name in data}
        self.progress = Progress()
        self.at_start = health.part_sums(model, args.embedding_learning_rate_factor == 0)
        self.warned: set[str] = set()
        self.window = Window()
        self.window_start = self.clock = 0.0
        self.identity = {
            "model": {
                key: value
                for key, value in json.loads(model.config.to_json_string(use_diff=False)).items()
                if key != "transformers_version"
            },
            "data": {name: sources.fingerprint(data[name]) for name in ("train", "validation")},
            "run": {
                name: getattr(args, name)
                for name in [
                    "seed",
                    "per_device_train_batch_size",
                    "gradient_accumulation_steps",
                    "bf16",
                    "optim",
                    "embedding_optimizer",
                ]
            },
        }

    def resume(self) -> None:
        """Loads the checkpoint that `resume_from_checkpoint` names; says so where there is none."""
        if self.args.resume_from_checkpoint is None:
            return
        path = checkpoint.find_checkpoint(self.args.resume_from_checkpoint, self.output_dir)
        if path is None:
            logger.warning("No complete checkpoint in %s: starting at step 0.", self.output_dir)
            return
        manifest = checkpoint.read_manifest(path)
        assert manifest is not None
        for what, now in self.identity.items():
            difference = checkpoint.first_difference(manifest["identity"][what], now)
            if difference:
                raise ValueError(
                    f"Expected the {what} of {path}, got another: {difference}. Resume with the arguments and data of "
                    "that run, or start anew in another output_dir."
                )
        if manifest["total_steps"] != self.total_steps:
            logger.warning(
                "The run was planned for %d steps and now for %d: its learning rates follow the new plan.",
                manifest["total_steps"],
                self.total_steps,
            )
        checkpoint.load_checkpoint(path, self.stage.blocks, self.optimizers)
        with checkpoint.writing("the best checkpoint so far", self.output_dir):
            checkpoint.adopt_best(path, self.output_dir, manifest["progress"]["best_step"])
        self.progress = Progress(**manifest["progress"])
        logger.info("Resuming from %s, step %d of %d.", path, self.progress.step, self.total_steps)

    def fit(self) -> None:
        """The optimizer steps that are left, with evaluation, checkpoints and logs at their steps."""
        args, progress = self.args, self.progress
        logger.info(
            "Training %d units on %d rows: %d steps, %d an epoch.\n%s",
            len(self.model.config.units), len(self.data["train"]), self.total_steps, len(self.order),
            self.placement.table(self.model.model.blocks, str(self.accelerator.device)),
        )  # fmt: skip
        trackers.start(self.accelerator, self.output_dir, args.to_dict(), progress.step + 1)
        self.model.train()
        with logging_redirect_tqdm(), StopSignals() as stop:
            self._train_steps(
                tqdm(
                    total=self.total_steps,
                    initial=progress.step,
                    disable=args.disable_tqdm or not sys.stderr.isatty(),
                    desc=self.model.config.objective,
                ),
                stop,
            )
        if stop.received:
            logger.warning(
                "Stopped by %s after step %d of %d, with a checkpoint in %s. --resume_from_checkpoint last goes on.",
                stop.received.name, progress.step, self.total_steps, self.output_dir,
            )  # fmt: skip
            stop.raise_received()

    def _train_steps(self, bar: tqdm, stop: StopSignals) -> None:
        args, progress = self.args, self.progress
        self.window_start, self.clock = progress.seconds, time.perf_counter()
        for step, rows in self.order.steps(progress.step, self.total_steps):
            if self._stopped_early():
                break
            parts = micro_batches(rows, args.gradient_accumulation_steps)
            losses, norms = self.stage.train_batch(self.data["train"], parts, step, args.seed)
            progress.step = step + 1
            self.window.add(losses, norms, len(rows))
            bar.update()
            last = progress.step == self.total_steps
            evaluate = self._due_evaluation(last)
            stopping = stop.received is not None
            save = last or stopping or (args.save_steps is not None and progress.step % args.save_steps == 0)
            if progress.step % args.logging_steps == 0 or evaluate or save:
                bar.set_postfix(self._log())
            if evaluate or save:
                self._stop_clock()
                save = (evaluate and self._evaluate()) or save
                if save:
                    self._save()
                self.clock = time.perf_counter()
            if stopping:
                break
        self._stop_clock()
        bar.close()
        self.optimizers.release()

    def _stop_clock(self) -> None:
        """Adds the time since the clock was last started or stopped to the training time."""
        now = time.perf_counter()
        self.progress.seconds, self.clock = self.progress.seconds + now - self.clock, now

    def _stopped_early(self) -> bool:
        patience = self.args.early_stopping_patience
        if patience is None or self.progress.evaluations_without_gain < patience:
            return False
        logger.info("Stopped early: %d evaluations without a better %s.", patience, self.metric)
        return True

    def _due_evaluation(self, last: bool) -> bool:
        if self.args.eval_strategy == "no":
            return last
        every = self.args.eval_steps or len(self.order)
        return last or self.progress.step % every == 0

    def _log(self) -> dict[str, float]:
        """Means since the last log, to history and trackers; the total of the local losses for the bar.

        Raises:
            ValueError: a loss that is not finite, naming block and step; the last checkpoint is from before it.
        """
        if not self.window.rows:
            return {}
        examples = self.window.examples
        try:
            values = self.window.means(self.progress.step)
        except FloatingPointError as error:
            raise self._not_finite(error) from None
        self._stop_clock()  # after the values were read: that waited for the device
        rates = self.optimizers.learning_rates(self.progress.step - 1)
        same = len(set(rates.values())) == 1
        values |= {"learning_rate" if same else f"learning_rate/{k}": rate for k, rate in rates.items()}
        row = {
            "step": self.progress.step,
            **values,
            "examples_per_second": examples / max(self.progress.seconds - self.window_start, 1e-9),
            "peak_memory_mib": reporting.peak_memory_mib(self.accelerator.device),
        }
        self.window_start = self.progress.seconds
        self.progress.history.append(row)
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=self.progress.step)
        return {"loss": round(sum(value for name, value in values.items() if name.startswith("loss")), 4)}

    def _evaluate(self) -> bool:
        """Validation metrics of every exit; whether the last exit is the best so far."""
        logits = self.stage.evaluate(self.data["validation"], self.args.per_device_eval_batch_size)
        exits = exit_metrics(logits, self.labels["validation"], self.problem_type)
        progress = self.progress
        value = exits[-1][self.metric]
        better = is_better(self.metric, value, progress.best_metric)
        if better:
            progress.best_metric, progress.best_step, progress.evaluations_without_gain = value, progress.step, 0
        else:
            progress.evaluations_without_gain += 1
        self.optimizers.observe({int(row["block"]): row[self.metric] for row in exits})
        codes = self._check_codes()
        progress.history.append({"step": progress.step, "validation": exits, "codes": codes})
        flat = {f"validation/{row['block']}/{n}": v for row in exits for n, v in row.items() if n != "block"}
        flat |= {f"codes/{row['block']}/{n}": row[n] for row in codes for n in ("spread", "rank", "separation")}
        self.accelerator.log(flat, step=progress.step)
        shown = " ".join(f"{row[self.metric]:.4f}" for row in exits)
        logger.info(
            "epoch %.2f step %d: validation %s by exit %s%s",
            progress.step / len(self.order), progress.step, self.metric, shown, " (best)" if better else "",
        )  # fmt: skip
        return better

    def _not_finite(self, error: FloatingPointError | str) -> ValueError:
        kept = checkpoint.complete_checkpoints(self.output_dir)
        last = f"The last checkpoint is from before: {kept[-1]}." if kept else "There is no checkpoint yet."
        return ValueError(f"{error} {last}")

    def _check_codes(self) -> list[dict[str, Any]]:
        """The health of the target codes now; says once of each block what is wrong."""
        try:
            rows = health.code_health(self.model, torch.as_tensor(self.labels["validation"]))
        except FloatingPointError as error:
            raise self._not_finite(f"After step {self.progress.step}: {error}") from None
        self._warn(health.code_warnings(rows, self.model.config, self.args))
        return rows

    def _warn(self, messages: list[str]) -> None:
        for message in messages:
            what = message.split("(")[0]  # without the numbers, which change
            if what not in self.warned:
                self.warned.add(what)
                logger.warning(message)

    def _save(self) -> None:
        path = checkpoint.checkpoint_path(self.output_dir, self.progress.step)
        manifest = {
            "format": 1,
            "identity": self.identity,
            "total_steps": self.total_steps,
            "progress": vars(self.progress),
        }
        with checkpoint.writing(path.name, self.output_dir):
            checkpoint.save_checkpoint(path, self.stage.blocks, self.optimizers, manifest)
            checkpoint.rotate(self.output_dir, self.args.save_total_limit, self.progress.best_step, self.progress.step)

    # --- after the last step

    def finish(self) -> dict[str, Any]:
        """Loads the best checkpoint, reads test once, and writes model, tokenizer, arguments and report."""
        progress = self.progress
        codes = health.code_health(self.model, torch.as_tensor(self.labels["validation"]))
        warnings = health.code_warnings(codes, self.model.config, self.args)
        warnings += health.update_warnings(self.model, self.at_start)
        self._warn(warnings)
        if progress.best_step is not None and progress.best_step != progress.step:
            best = checkpoint.checkpoint_path(self.output_dir, progress.best_step)
            checkpoint.load_checkpoint(best, self.stage.blocks, None)
        report = reporting.build_report(self, warnings)
        self.model.eval()
        with checkpoint.writing("the model", self.output_dir), export(self.output_dir) as aside:
            self.model.save_pretrained(aside)
            self.tokenizer.save_pretrained(aside)
            self.args.save(aside / "training_config.yaml")
            reporting.write_report(aside, report)
        logger.info("Saved to %s.", self.output_dir)
        return report


def split_labels(data: Dataset, collator: Collator) -> np.ndarray:
    """The labels of a split as the metrics and the health check want them: ids (N,), rows (N, C) or values (N,)."""
    return collator.labels(data.features["label"], data["label"]).numpy()
