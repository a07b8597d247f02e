"""What is fixed before the first step: arguments, data, batch order, placement, and what identifies the run."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict

from ..arguments import TrainingArguments
from ..data.batching import BatchOrder, Collator, MicroBatch, micro_batches
from ..data.oddities import data_warnings
from ..data.streaming import StreamOrder
from ..data.tokenization import tokenizer_digest, tokens_digest
from ..metrics import chosen_metric
from ..parallel.placement import Placement
from .start import Start

IDENTITY = ("seed", "bf16", "wire_dtype", "optim", "embedding_optimizer")
CONDITIONS = (
    "learning_rate", "target_learning_rate_factor", "bridge_learning_rate_factor", "embedding_learning_rate_factor",
    "weight_decay", "target_weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "max_grad_norm",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "eval_strategy", "eval_steps",
    "early_stopping_patience", "torch_compile", "frozen_blocks", "freeze", "cache_frozen",
    "per_device_train_batch_size", "gradient_accumulation_steps", "replicas",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A run before it starts; the same in every process.

    Args:
        args: the arguments.
        data: the tokenized splits.
        order: which rows make up which batch.
        about_data: what the report says of the rows as they were read.
        total_steps: optimizer steps of the whole run.
        placement: which stage owns which blocks.
        problem_type: single label, multi-label or regression.
        metric: the validation metric that chooses the checkpoint.
        labels: of validation and test, in the form that the metrics need.
        identity: what must be the same in a resumed run, and in every process.
        warnings: what is odd about the data.
        conditions: what a resumed run may change; its result then differs from that of an uninterrupted run.
    """

    args: TrainingArguments
    data: DatasetDict
    order: BatchOrder | StreamOrder
    about_data: dict[str, Any]
    total_steps: int
    placement: Placement
    problem_type: str
    metric: str
    labels: dict[str, np.ndarray]
    identity: dict[str, dict[str, Any]]
    conditions: dict[str, Any]
    warnings: list[str]

    @property
    def output_dir(self) -> Path:
        """The folder of the run."""
        return Path(self.args.output_dir)

    @property
    def train(self) -> Dataset | StreamOrder:
        """What rows of the batch order are looked up in."""
        return self.order if isinstance(self.order, StreamOrder) else self.data["train"]

    def steps(self, first: int, last: int, replica: int) -> Iterator[tuple[int, list[MicroBatch]]]:
        """(step, micro-batches of a replica) of the optimizer steps `first` .. `last` - 1, from 0."""
        for step, rows in self.order.steps(first, last):
            yield step, micro_batches(rows, self.args.gradient_accumulation_steps, replica, self.args.replicas)

    @property
    def evaluate_every(self) -> int:
        if self.args.eval_strategy == "no":
            return self.total_steps
        return self.args.eval_steps or len(self.order)  # type: ignore[arg-type]  # streams have eval_steps

    def evaluates_after(self, steps: int) -> bool:
        return steps == self.total_steps or steps % self.evaluate_every == 0

    def next_evaluation(self, steps: int) -> int:
        """The number of steps after which the next evaluation comes, once `steps` are done."""
        return min(self.total_steps, (steps // self.evaluate_every + 1) * self.evaluate_every)

    def saves_after(self, steps: int) -> bool:
        every = self.args.save_steps
        return steps == self.total_steps or (every is not None and steps % every == 0)


def make_plan(args: TrainingArguments, start: Start, placement: Placement, device: torch.device) -> Plan:
    """The plan of a run.

    Args:
        args: of the run.
        start: what it starts with.
        placement: of the blocks.
        device: where this process trains.

    Raises:
        ValueError: a metric that this kind of problem does not have.
    """
    config, tokenizer, data, order = start.model.config, start.tokenizer, start.data, start.order
    if isinstance(order, StreamOrder):
        total_steps, how = args.max_steps, f" in windows of {args.streaming_buffer_size}"
    else:
        steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * len(order))
        total_steps, how = max(1, steps), ""
    problem_type = config.resolved_problem_type
    collator = Collator(tokenizer.pad_token_id, config.classes)
    values = json.loads(config.to_json_string(use_diff=False))
    metric = chosen_metric(args.metric_for_best_model, problem_type)
    return Plan(
        args=args,
        data=data,
        order=order,
        about_data=start.about,
        total_steps=total_steps,
        placement=placement,
        problem_type=problem_type,
        metric=metric,
        labels={name: collator.all_labels(data[name]) for name in data if name != "train"},
        identity={
            "data": {name: tokens_digest(data[name]) + (how if name == "train" else "") for name in data},
            "run": {
                **{name: getattr(args, name) for name in IDENTITY},
                "global_batch_size": args.global_batch_size,
                "metric_for_best_model": metric,
                "tokenizer": tokenizer_digest(tokenizer),
            },
            "model": {key: value for key, value in values.items() if key != "transformers_version"},
        },
        conditions={
            **{name: getattr(args, name) for name in CONDITIONS},
            "total_steps": total_steps,
            "threads": torch.get_num_threads(),
            "device": device.type,
            "torch": torch.__version__,
        },
        warnings=data_warnings(data, config.label_names, tokenizer, is_trained=args.tokenizer_source is None),
    )
