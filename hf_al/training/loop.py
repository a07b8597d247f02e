"""THE training loop. One process is one stage; with one stage it owns every block.

Everything a step does follows from (arguments, data, step): batch order, dropout and learning rate have no state. A
resumed run therefore needs weights, optimizer tensors and a step number, and ends where the undisturbed one ends.
"""

import logging
import math
import os
import resource
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from datasets import Dataset, DatasetDict
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .. import report as reporting
from ..data import sources, tokenization
from ..data.batching import BatchOrder, Collator, micro_batches, token_lengths
from ..evaluation import BEST_METRIC, exit_metrics, is_better
from ..modeling.configuration_al import ALLstmConfig, ALTransformerConfig
from ..modeling.modeling_al import (
    ALForSequenceClassification,
    ALLstmForSequenceClassification,
    ALTransformerForSequenceClassification,
)
from ..parallel.placement import place
from ..parallel.stage import Stage
from . import checkpoint, health
from .arguments import TrainingArguments, check_model_keys
from .optim import BlockOptimizers

logger = logging.getLogger(__name__)

CLASSES: dict[str, tuple[Any, Any]] = {
    "al_lstm": (ALLstmConfig, ALLstmForSequenceClassification),
    "al_transformer": (ALTransformerConfig, ALTransformerForSequenceClassification),
}
# What a run may leave in its folder, and so what --overwrite_output_dir removes
RUN_FILES = ("checkpoints", "report.json", "report.md", "training_config.yaml", "config.json", "model*.safetensors*",
             "tokenizer*.json", "special_tokens_map.json", "vocab.txt", "logs", "*_al.py", "blocks.py", "objectives.py",
             "export.tmp")  # fmt: skip


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
        datasets: splits train[, validation][, test] with columns text[, text_pair] and label; loaded from the data
            arguments where it is None.

    Raises:
        ValueError: arguments or data that cannot work, with what to do instead.
    """
    check_model_keys(args)
    output_dir = prepare_output_dir(args)
    accelerator = make_accelerator(args, output_dir)
    set_threads(args)
    set_seed(args.seed)
    data = sources.load_text_datasets(args) if datasets is None else _given(datasets, args)
    tokenizer = tokenization.build_tokenizer(args, data["train"])
    model = build_model(args, tokenizer, data["train"]).to(accelerator.device)
    run = Run(args, output_dir, accelerator, model, tokenizer, tokenization.tokenize(data, tokenizer, args))
    run.resume()
    run.fit()
    report = run.finish()
    accelerator.end_training()
    AcceleratorState._reset_state()  # so that the next run in this process may choose another precision
    return TrainResult(run.model, tokenizer, report)


def _given(datasets: DatasetDict, args: TrainingArguments) -> DatasetDict:
    named = [n for n in ("train_file", "dataset_name") if getattr(args, n)]
    if named:
        raise ValueError(f"Expected data once, got datasets and {named[0]}. Leave one of them out.")
    text, label = sources.choose_columns(datasets["train"].column_names, args, datasets["train"])
    names = dict(zip([*text, label], [*("text", "text_pair")[: len(text)], "label"], strict=True))
    keep = {s: d.select_columns(list(names)) for s, d in datasets.items() if s in ("train", "validation", "test")}
    return sources.finish_splits(
        DatasetDict({s: d.rename_columns({a: b for a, b in names.items() if a != b}) for s, d in keep.items()}), args
    )


# --- before the first step


def prepare_output_dir(args: TrainingArguments) -> Path:
    """The output folder: new or empty, emptied of an earlier run, or holding the run to resume."""
    if not args.output_dir:
        raise ValueError("Expected output_dir, got none. Pass output_dir='out/my_run', for example.")
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"Expected a folder as output_dir, got the file {folder}.")
    if folder.exists() and any(folder.iterdir()) and args.resume_from_checkpoint is None:
        if not args.overwrite_output_dir:
            raise ValueError(
                f"Expected an empty output_dir, got files in {folder}. Pass --overwrite_output_dir to start anew, "
                "--resume_from_checkpoint last to go on, or another folder."
            )
        for path in [p for pattern in RUN_FILES for p in folder.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        probe = folder / "checkpoints" / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"Expected a writable output_dir, got {folder}: {error.strerror}.") from None
    return folder


def make_accelerator(args: TrainingArguments, output_dir: Path) -> Accelerator:
    trackers = [] if args.report_to in ("none", "") else args.report_to.split(",")
    try:
        accelerator = Accelerator(
            cpu=args.use_cpu,
            mixed_precision="bf16" if args.bf16 else "no",
            log_with=trackers or None,
            project_dir=str(output_dir),
        )
    except (ValueError, ImportError) as error:
        raise ValueError(f"Could not start accelerate: {error}") from error
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world != 1 or accelerator.num_processes != 1:
        raise ValueError(
            f"Expected one process, got {max(world, accelerator.num_processes)}: this version trains all blocks in one. "
            "Launch with accelerate launch --num_processes 1."
        )
    return accelerator


def set_threads(args: TrainingArguments) -> None:
    """The number of threads decides rounding, so it follows from the arguments and never from the launcher."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = args.threads or max(1, cores // local)
    torch.set_num_threads(threads)
    logger.info("Threads: %d of %d cores (%d processes here).", threads, cores, local)


def build_model(
    args: TrainingArguments, tokenizer: PreTrainedTokenizerBase, train: Dataset
) -> ALForSequenceClassification:
    """A new model whose vocabulary, labels and problem type follow from tokenizer and data; weights from `args.seed`."""
    names = sources.label_names(train)
    problem_type = sources.problem_type_of(train)
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "problem_type": problem_type,
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        **args.model,
    }
    if problem_type == "regression":
        labels = np.asarray(train["label"], np.float64)
        values |= {"label_mean": [float(labels.mean())], "label_std": [float(labels.std())]}
    if args.model_type == "al_transformer":
        values.setdefault("max_position_embeddings", max(512, args.max_seq_length))
    rows = None
    if args.word_vectors:
        rows = tokenization.embedding_rows(tokenizer, args.word_vectors, args.seed)
        wanted = values.setdefault("embedding_size", rows.shape[1])
        if wanted != rows.shape[1]:
            raise ValueError(
                f"Expected embedding_size={rows.shape[1]}, the word vectors' width, got {wanted}. Leave it out."
            )
    config_class, model_class = CLASSES[args.model_type]
    config = config_class(**values)
    torch.manual_seed(args.seed)
    model = model_class(config)
    if rows is not None:
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(torch.from_numpy(rows))
    return model


# --- the run


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
        self.metric = args.metric_for_best_model or BEST_METRIC[self.problem_type]
        self.order = BatchOrder(
            token_lengths(data["train"]), args.per_device_train_batch_size * args.gradient_accumulation_steps, args.seed
        )
        steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * len(self.order))
        self.total_steps = max(1, steps)
        self.placement = place(model.config.units)
        units = self.placement.units(0)
        blocks = {k: model.model.blocks[k] for k in self.placement.blocks(0)}
        self.optimizers = BlockOptimizers(blocks, units, args, self.total_steps)
        collator = Collator(tokenizer.pad_token_id, model.config.num_labels)
        self.stage = Stage(model, self.placement, 0, accelerator, collator, self.optimizers)
        self.labels = {name: split_labels(data[name], collator) for name in data}
        self.progress = Progress()
        self.at_start = health.part_sums(model)
        self.window: dict[int, dict[str, Tensor]] = {}
        self.window_steps = 0
        self.identity = {
            "model": {k: v for k, v in model.config.to_dict().items() if k != "transformers_version"},
            "data": {name: sources.fingerprint(data[name]) for name in ("train", "validation")},
            "run": {
                name: getattr(args, name)
                for name in ["seed", "per_device_train_batch_size", "gradient_accumulation_steps", "bf16"]
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
        self.accelerator.init_trackers("hf_al", config=_flat(args.to_dict()))
        self.model.train()
        bar = tqdm(
            total=self.total_steps,
            initial=progress.step,
            disable=args.disable_tqdm or not sys.stderr.isatty(),
            desc=self.model.config.objective,
        )
        clock = time.perf_counter()
        for step, rows in self.order.steps(progress.step, self.total_steps):
            if self._stopped_early():
                break
            parts = micro_batches(rows, args.gradient_accumulation_steps)
            losses, _ = self.stage.train_batch(self.data["train"], parts, step, args.seed)
            progress.step = step + 1
            self._collect(losses)
            bar.update()
            last = progress.step == self.total_steps
            evaluate = self._due_evaluation(last)
            save = last or (args.save_steps is not None and progress.step % args.save_steps == 0)
            if progress.step % args.logging_steps == 0 or evaluate or save:
                bar.set_postfix(self._log())
            if evaluate or save:
                progress.seconds += time.perf_counter() - clock
                save = (evaluate and self._evaluate()) or save
                if save:
                    self._save()
                clock = time.perf_counter()
        progress.seconds += time.perf_counter() - clock
        bar.close()

    def _stopped_early(self) -> bool:
        patience = self.args.early_stopping_patience
        if patience is None or self.progress.evaluations_without_gain < patience:
            return False
        logger.info("Stopped early: %d evaluations without a better %s.", patience, self.metric)
        return True

    def _due_evaluation(self, last: bool) -> bool:
        if self.args.eval_strategy == "no":
            return last
        every = self.args.eval_steps if self.args.eval_strategy == "steps" else len(self.order)
        return last or self.progress.step % every == 0

    def _collect(self, losses: dict[int, dict[str, Tensor]]) -> None:
        """Adds to the running sums on the device; reading them waits for it, so that happens only when logging."""
        self.window_steps += 1
        for k, named in losses.items():
            sums = self.window.setdefault(k, {})
            for name, value in named.items():
                sums[name] = sums.get(name, 0) + value

    def _log(self) -> dict[str, float]:
        """Means since the last log, to history and trackers; the total of the local losses for the bar.

        Raises:
            ValueError: a loss that is not finite, naming block and step; the last checkpoint is from before it.
        """
        if not self.window_steps:
            return {}
        values = {
            f"loss/{k}/{name}": float(total) / self.window_steps
            for k, named in self.window.items()
            for name, total in named.items()
        }
        for name, value in values.items():
            if not math.isfinite(value):
                _, k, which = name.split("/")
                raise ValueError(
                    f"Expected finite losses, got {value} as the {which} loss of block {k} in the {self.window_steps} "
                    f"steps up to step {self.progress.step}. Lower the learning rate, or clip: --max_grad_norm 1. The "
                    "last checkpoint is from before."
                )
        self.window, self.window_steps = {}, 0
        row = {
            "step": self.progress.step,
            "learning_rate": self.optimizers.learning_rate(self.progress.step - 1),
            **values,
        }
        self.progress.history.append(row)
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=self.progress.step)
        return {"loss": round(sum(values.values()), 4)}

    def _evaluate(self) -> bool:
        """Validation metrics of every exit; whether the last exit is the best so far."""
        logits = self.stage.evaluate(self.data["validation"], self.args.per_device_eval_batch_size)
        exits = exit_metrics(logits, self.labels["validation"], self.problem_type)
        progress = self.progress
        if self.metric not in exits[-1]:
            raise ValueError(f"Expected metric_for_best_model among {list(exits[-1])[1:]}, got {self.metric!r}.")
        value = exits[-1][self.metric]
        better = is_better(self.metric, value, progress.best_metric)
        if better:
            progress.best_metric, progress.best_step, progress.evaluations_without_gain = value, progress.step, 0
        else:
            progress.evaluations_without_gain += 1
        progress.history.append({"step": progress.step, "validation": exits})
        flat = {f"validation/{row['block']}/{n}": v for row in exits for n, v in row.items() if n != "block"}
        self.accelerator.log(flat, step=progress.step)
        shown = " ".join(f"{row[self.metric]:.4f}" for row in exits)
        logger.info(
            "epoch %.2f step %d: validation %s by exit %s%s",
            progress.step / len(self.order), progress.step, self.metric, shown, " (best)" if better else "",
        )  # fmt: skip
        return better

    def _save(self) -> None:
        path = checkpoint.checkpoint_path(self.output_dir, self.progress.step)
        manifest = {
            "format": 1,
            "identity": self.identity,
            "total_steps": self.total_steps,
            "progress": vars(self.progress),
        }
        checkpoint.save_checkpoint(path, self.stage.blocks, self.optimizers, manifest)
        checkpoint.rotate(self.output_dir, self.args.save_total_limit, self.progress.best_step)

    # --- after the last step

    def finish(self) -> dict[str, Any]:
        """Loads the best checkpoint, reads test once, and writes model, tokenizer, arguments and report."""
        progress = self.progress
        warnings = health.warnings(self.model, torch.as_tensor(self.labels["validation"]), self.at_start)
        for message in warnings:
            logger.warning(message)
        if progress.best_step is not None and progress.best_step != progress.step:
            best = checkpoint.checkpoint_path(self.output_dir, progress.best_step)
            checkpoint.load_checkpoint(best, self.stage.blocks, None)
        report = self._report(warnings)
        self._export()
        self.args.save(self.output_dir / "training_config.yaml")
        reporting.write_report(self.output_dir, report)
        logger.info("Saved to %s.", self.output_dir)
        return report

    def _report(self, warnings: list[str]) -> dict[str, Any]:
        config, progress = self.model.config, self.progress
        results: dict[str, Any] = {}
        for split in ("validation", "test"):
            if split not in self.data:
                continue
            logits = self.stage.evaluate(self.data[split], self.args.per_device_eval_batch_size)
            results[split] = exit_metrics(logits, self.labels[split], self.problem_type)
            if self.problem_type == "single_label_classification":
                last = logits[max(logits)]
                results["confusion_matrix"] = reporting.confusion(last, self.labels[split], config.num_labels)
        names = dict(self.model.named_parameters())
        training_only = sum(p.numel() for n, p in names.items() if self.model.is_training_only(n))
        rows = len(self.data["train"])
        return {
            "model_type": config.model_type,
            "objective": config.objective,
            "num_blocks": config.num_blocks,
            "label_names": [config.id2label[i] for i in range(config.num_labels)],
            "problem_type": self.problem_type,
            "metric": self.metric,
            "steps": progress.step,
            "best_step": progress.best_step,
            **results,
            "parameters": {
                "inference": sum(p.numel() for p in names.values()) - training_only,
                "training_only": training_only,
            },
            "data": {
                "name": self.args.dataset_name or Path(self.args.train_file or "given data").name,
                "rows": {name: len(split) for name, split in self.data.items()},
                "fingerprint": self.identity["data"],
            },
            "speed": {
                "train_seconds": progress.seconds,
                "examples_per_second": progress.step / len(self.order) * rows / max(progress.seconds, 1e-9),
                "peak_memory_mib": peak_memory_mib(),
            },
            "code_health": health.code_health(self.model, torch.as_tensor(self.labels["validation"])),
            "warnings": warnings,
            "history": progress.history,
            "placement": self.placement.table(self.model.model.blocks, str(self.accelerator.device)),
            "machine": reporting.machine(),
            "arguments": self.args.to_dict(),
        }

    def _export(self) -> None:
        """Model and tokenizer written beside their place, then moved in, each file whole; the config last."""
        aside = self.output_dir / "export.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        self.model.eval()
        self.model.save_pretrained(aside)
        self.tokenizer.save_pretrained(aside)
        for path in sorted(aside.iterdir(), key=lambda p: p.name == "config.json"):
            path.replace(self.output_dir / path.name)
        aside.rmdir()


def split_labels(data: Dataset, collator: Collator) -> np.ndarray:
    """The labels of a split as the metrics and the health check want them: ids (N,), rows (N, C) or values (N,)."""
    return collator.labels(data.features["label"], data["label"]).numpy()


def peak_memory_mib() -> float:
    """Peak memory of the process (of the GPU, where there is one)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Trackers take flat mappings of plain values."""
    flat = {k: v for k, v in values.items() if isinstance(v, (int, float, str, bool))}
    return flat | {f"model.{k}": str(v) for k, v in values["model"].items()}
