"""The ways of training that throughput.py compares: each is made in both processes of a pair."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pair import WARM, Arm, Turn
from step import BATCHES, SHAPES, TOKENS, new_model, random_rows
from torch import Tensor, nn

from hf_al.arguments import TrainingArguments
from hf_al.data.batching import Collator, micro_batches, token_lengths
from hf_al.modeling.blocks import walk
from hf_al.modeling.objectives import OBJECTIVES, Boundary
from hf_al.parallel.alone import ALONE, Alone
from hf_al.parallel.placement import Placement, place
from hf_al.parallel.schema import Message
from hf_al.parallel.transport import Neighbours
from hf_al.training.costs import backprop_costs, local_costs
from hf_al.training.loop import WIRES
from hf_al.training.optim import BlockOptimizers
from hf_al.training.stage import Stage

CPU = torch.device("cpu")


def make_arm(process: int, spec: dict[str, Any]) -> Arm:
    """One way of training, from its name and settings."""
    torch.manual_seed(0)
    args = TrainingArguments(output_dir="unused", embedding_optimizer=spec["embedding_optimizer"])
    makers: dict[str, Any] = {"stream": stage_arm, "ceiling": stage_arm, "ddp": ddp_arm, "costs": costs_arm}
    makers |= {"gpipe": pipeline_arm, "1f1b": pipeline_arm}
    return makers.get(spec["kind"], one_process_arm)(process, spec, args)


class Unconnected(Alone):
    """A stage that gets the same boundary again and again."""

    def __init__(self, number: int, boundary: Boundary):
        self.number, self.boundary = number, boundary

    def receive(self, message: Message, first: Any) -> Boundary:
        return self.boundary if self.number else first()


def stage_arm(process: int, spec: dict[str, Any], args: TrainingArguments) -> Arm:
    """Half of the blocks, connected to the other half or not."""
    model = new_model(SHAPES[spec["network"]], spec["objective"])
    placement = cut_at(model, spec["cut"])
    if spec["kind"] == "stream":
        transport: Alone = Neighbours(2, 1, CPU, timeout=120.0)
    else:
        transport = Unconnected(1 - process, first_half(model, placement, spec["rows"]))
    wire = WIRES[spec.get("wire", "float32")]
    return partial(run_stage, stage_of(model, placement, transport, args, wire), spec["rows"])


def one_process_arm(process: int, spec: dict[str, Any], args: TrainingArguments) -> Arm:
    """All blocks in process 0, with two threads; the other one has nothing to do."""
    objective = "backprop" if spec["kind"] == "backprop" else spec["objective"]
    model = new_model(SHAPES[spec["network"]], objective)
    stage = stage_of(model, place(model.config.units), ALONE, args)

    def run(steps: int) -> Turn:
        if process:
            return Turn([], 0.0)
        torch.set_num_threads(2)
        try:
            return run_stage(stage, spec["rows"], steps)
        finally:
            torch.set_num_threads(1)

    return run


def stage_of(model: Any, placement: Placement, transport: Alone, args: TrainingArguments, *wire: torch.dtype) -> Stage:
    number, blocks = transport.number, model.model.blocks
    own = {k: blocks[k] for k in placement.blocks(number)}
    optimizers = BlockOptimizers(own, placement.units(number), args, total_steps=1_000_000)
    return Stage(model, placement, CPU, Collator(0, model.config.classes), optimizers, transport, *wire)


def first_half(model: Any, placement: Placement, rows: int) -> Boundary:
    """What leaves the first stage, for the first batch."""
    inputs = inputs_of(model, rows)[0]
    boundary = model.model.initial_boundary(inputs["labels"])
    for _, out in walk([model.model.blocks[k] for k in placement.blocks(0)], boundary, inputs, learning=True):
        boundary = out.boundary
    return boundary


def run_stage(stage: Stage, rows: int, steps: int) -> Turn:
    """Steps of the training loop."""
    data = random_rows([TOKENS] * rows * BATCHES)
    plan = [(n, micro_batches(np.arange(rows) + rows * (n % BATCHES), 1)) for n in range(steps)]
    stage.expect_training(token_lengths(data), plan)
    ends, before = [], 0.0
    for number, parts in stage.batches(data, plan):
        stage.train_batch(parts, number, seed=0)
        ends.append(time.monotonic())
        if number == WARM - 1:
            before = waited(stage)
    stage.settle()
    return Turn(ends, waited(stage) - before)


def waited(stage: Stage) -> float:
    found = stage.transport.statistics()
    return found.get("waited_receive", 0.0) + found.get("waited_send", 0.0)


def inputs_of(model: Any, rows: int, mine: slice = slice(None)) -> list[dict[str, Any]]:
    """The inputs of each of `BATCHES` batches, or those of some of their rows."""
    data, collator = random_rows([TOKENS] * rows * BATCHES), Collator(0, model.config.classes)
    batches = [collator(data, np.arange(rows)[mine] + rows * n) for n in range(BATCHES)]
    return [model.model.prepare_inputs(**batch) for batch in batches]


def ddp_arm(process: int, spec: dict[str, Any], args: TrainingArguments) -> Arm:
    """Half of the rows in each process; torch averages the gradients, a bucket as soon as its last one is there."""
    model = new_model(SHAPES[spec["network"]], "backprop")
    batches = inputs_of(model, spec["rows"], slice(process, None, 2))

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = model.model.blocks

        def forward(self, inputs: dict[str, Any]) -> Tensor:
            boundary = model.model.initial_boundary(inputs["labels"])
            *_, (_, out) = walk(self.blocks, boundary, inputs, learning=True)
            return out.loss

    whole, unit = Whole(), model.config.units[0]
    optimizers = BlockOptimizers(dict(enumerate(model.model.blocks)), [unit], args, total_steps=1_000_000)
    whole(batches[0]).backward()
    for parameter in whole.parameters():  # DistributedDataParallel waits for each gradient: none will come for these
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
    bucket = spec["bucket_mb"]
    parallel = nn.parallel.DistributedDataParallel(whole, bucket_cap_mb=bucket, gradient_as_bucket_view=True)

    def step(number: int) -> None:
        parallel(batches[number % BATCHES]).backward()
        optimizers.update(unit, number)

    return partial(run_steps, step)


def pipeline_arm(process: int, spec: dict[str, Any], args: TrainingArguments) -> Arm:
    """torch's own pipeline: the stages compute micro-batches, forward and backward."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    model = new_model(SHAPES[spec["network"]], "backprop")
    placement = cut_at(model, spec["cut"])
    own, blocks = placement.blocks(process), model.model.blocks
    parts = spec["micro_batches"]
    whole = inputs_of(model, spec["rows"])
    of_a_part = inputs_of(model, spec["rows"] // parts)[0]
    same = {name: value for name, value in of_a_part.items() if name not in ("input_ids", "labels")}
    decoders: Boundary = {}
    for block in blocks[: own[0]]:
        block.decode_target.requires_grad_(False)
        decoders = block.decoders(decoders)

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(blocks[k] for k in own)

        def forward(self, x: Tensor) -> Tensor:
            if x.requires_grad:
                x.register_hook(torch.Tensor.contiguous)  # torch's pipelines send nothing else
            inputs, boundary = (same, {"hidden": x}) if process else ({**same, "input_ids": x}, {})
            for block in self.blocks:
                boundary = block.encode(boundary, inputs)
            return boundary["hidden"].contiguous()

    def loss(hidden_NTD: Tensor, labels: Tensor) -> Tensor:
        received = decoders
        for k in own[:-1]:
            received = blocks[k].decoders(received)
        losses, _ = OBJECTIVES["backprop"].local_loss(blocks[-1], blocks[-1].pool(hidden_NTD, same), received, labels)
        return losses["exit"]

    unit = range(own[0], own[-1] + 1)
    optimizers = BlockOptimizers({k: blocks[k] for k in own}, [unit], args, total_steps=1_000_000)
    schedule_class = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[spec["kind"]]
    schedule = schedule_class(PipelineStage(Half(), process, 2, CPU), parts, loss_fn=loss)

    def step(number: int) -> None:
        batch = whole[number % BATCHES]
        if process:
            schedule.step(target=batch["labels"], losses=[])
        else:
            schedule.step(batch["input_ids"])
        optimizers.update(unit, number)

    return partial(run_steps, step)


def costs_arm(process: int, spec: dict[str, Any], args: TrainingArguments) -> Arm:
    """What `hf-al plan` starts from, with a thread in each process at the same time, or with two in process 0."""
    alone = spec["threads"] == 2
    local, whole = (new_model(SHAPES[spec["network"]], objective) for objective in (spec["objective"], "backprop"))

    def run(steps: int) -> Any:
        if alone and process:
            return None
        torch.set_num_threads(spec["threads"])
        try:
            timed: dict[str, Any] = {"tokens": TOKENS, "rounds": steps, "typical": statistics.median}
            parts = (1,) if alone else (2, 4, 8)
            backprop = {m: backprop_costs(whole, args, CPU, spec["rows"] // m, **timed) for m in parts}
            return local_costs(local, args, CPU, spec["rows"], **timed), backprop
        finally:
            torch.set_num_threads(1)

    return run


def run_steps(step: Callable[[int], None], steps: int) -> Turn:
    dist.barrier()
    ends = []
    for number in range(steps):
        step(number)
        ends.append(time.monotonic())
    return Turn(ends, 0.0)


def cut_at(model: Any, cut: int) -> Placement:
    """Two stages, the second from block `cut` on."""
    blocks = len(model.model.blocks)
    units = [range(k, k + 1) for k in range(blocks)]
    return place(units, 2, ",".join(f"{a}-{b - 1}" for a, b in ((0, cut), (cut, blocks))))
