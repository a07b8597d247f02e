"""`hf-al plan`: what a step would take if the blocks were split over machines like this one, with Associated Learning
and with ways to split backpropagation.

The blocks are timed here, one by one; who waits for whom then follows from the timetables of parallel/schedule.py.
"""

import copy
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from .arguments import TrainingArguments
from .data.batching import token_lengths
from .loading import best_device
from .messages import table
from .modeling.modeling_al import ALForSequenceClassification
from .modeling.objectives import OBJECTIVES
from .parallel import schedule
from .parallel.placement import balanced_cuts
from .parallel.schedule import Task
from .parsing import BALANCED, check_stages
from .training.costs import Cost, backprop_costs, local_costs
from .training.measure import measured_cuts, median_length
from .training.memory import shortage_explained
from .training.setup import check_model, known_values, make_config, set_threads
from .training.start import load, new_model

MICRO_BATCHES = (2, 4, 8, 16)  # of the pipelines, which use the best number
ROUNDS = 6  # timed steps of each block; the first one warms up
DEPTHS = (1, 2, 4, 8, 12, 16, 24, 32)  # stages of one block each, in the plot over depth
MANY = 64  # batches in that plot
UNKNOWN = {  # arguments that would change what is predicted, and the values that it is for
    "replicas": 1, "gradient_accumulation_steps": 1, "placement": "balanced", "offload": False, "torch_compile": False,
}  # fmt: skip
UNITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
PIPELINES = {"GPipe": schedule.gpipe, "1F1B": schedule.one_f_one_b, "zero bubble": schedule.zero_bubble}


@dataclass(frozen=True)
class Link:
    """Between two stages, in each direction.

    Args:
        rate: bits per second.
        latency: seconds until the first one arrives.
    """

    rate: float = 10e9
    latency: float = 50e-6

    def seconds(self, size: float) -> float:
        """How long `size` bytes keep it busy."""
        return 8 * size / self.rate


def quantity(text: str, units: str) -> float:
    """`10Gbit` -> 1e10, `50us` -> 5e-5. `units`: of which kind, `bit` or `s`.

    Raises:
        ValueError: no number, or another unit.
    """
    number = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
    match = re.fullmatch(f"{number} ?([kmgu]?{units})(?:/s)?", text.strip(), re.IGNORECASE)
    value = float(match[1]) * UNITS.get(match[2].lower(), 0.0) if match else 0.0
    if value <= 0:
        example = "100Mbit or 10Gbit" if units == "bit" else "50us or 20ms"
        raise ValueError(f"Expected a number above 0 with its unit, such as {example}, got {text!r}.")
    return value


def plan(
    args: TrainingArguments, stages: Sequence[int], link: Link | None = None, tokens: int | None = None
) -> dict[str, Any]:
    """Predicts a step of the run for each number of stages.

    Args:
        args: of the run, whose `stages` do not count.
        stages: how many machines, each like this one.
        link: between them.
        tokens: of each text. If None, the data is read, and its median length is used.

    Returns:
        `rows`: for each number of stages and each way of training, `step_ms`, `texts_per_second`, `waiting` (share of
        the time, mean over stages), and of each stage `sent_mib` (in a step) and `memory_mib` (weights, optimizer
        state, gradients, what backward passes need, boundaries). `depth`: seconds of 64 batches with one stage for
        each of 1 to 32 blocks like the middle one here. And `tokens`, `batch`, `blocks`.

    Raises:
        ValueError: more stages than blocks, an objective whose gradients cross all blocks, arguments whose effect is
            not predicted, or what `train` refuses.
    """
    link, device = link or Link(), torch.device("cpu" if args.use_cpu else best_device())
    for name, value in UNKNOWN.items():
        if getattr(args, name) != value:
            raise ValueError(
                f"Expected {name}={value} with hf-al plan, got {getattr(args, name)}: its effect is not predicted. "
                "Leave it out."
            )
    model, tokens = _model_of(args, tokens, device)
    config, batch = model.config, args.per_device_train_batch_size
    if OBJECTIVES[config.objective].end_to_end:
        raise ValueError(
            f"Expected a local objective, got {config.objective}, whose gradients cross all blocks. Leave --objective "
            "out: ways to split backpropagation are in the table anyway."
        )
    stages = stages or [2**i for i in range(config.num_blocks.bit_length())]
    for number in stages:
        check_stages(number, config.num_blocks)
    timed: dict[str, Any] = {"args": args, "device": device, "tokens": tokens}
    timed |= {"rounds": ROUNDS, "typical": statistics.median}
    whole = copy.deepcopy(config)
    whole.objective = "backprop"
    parts = sorted({1, *(m for m in (*MICRO_BATCHES, *stages) if batch % m == 0)})
    with shortage_explained(lambda: "the timing of blocks", "train", can_offload=False):
        local = local_costs(model, rows=batch, **timed)
        end_to_end = new_model(whole, args.seed)
        backprop = {m: backprop_costs(end_to_end, rows=batch // m, **timed) for m in parts}
    rows = [row for number in stages for row in rows_of(number, args, local, backprop, link, batch)]
    middle = len(local) // 2
    most = max(m for m in parts if m <= 8)
    depth = over_depth(local[middle], backprop[most][middle], backprop[1][middle], link, most)
    return {"rows": rows, "depth": depth, "tokens": tokens, "batch": batch, "blocks": config.num_blocks}


def _model_of(
    args: TrainingArguments, tokens: int | None, device: torch.device
) -> tuple[ALForSequenceClassification, int]:
    """The model of the run, and how long its texts are."""
    set_threads(args)
    check_model(args)
    if args.model.get("cuts") == BALANCED:
        args.model["cuts"] = measured_cuts(args, device)
    if tokens is None:
        start = load(args, None)
        return start.model, median_length(start.model, token_lengths(start.data["train"]))
    if args.model_name_or_path:
        raise ValueError(
            f"Expected no --tokens with {args.model_name_or_path}, got {tokens}: a trained model goes on with its data."
        )
    values = known_values(args)
    if not args.encoder:
        values = {"vocab_size": args.tokenizer_vocab_size, **values, "max_position_embeddings": tokens}
    config = make_config(args, values)
    if tokens > config.max_position_embeddings:
        raise ValueError(
            f"Expected at most {config.max_position_embeddings} tokens, the positions of {args.encoder}, got {tokens}."
        )
    return new_model(config, args.seed), tokens


# --- the ways of training


def rows_of(
    stages: int, args: TrainingArguments, local: list[Cost], backprop: dict[int, list[Cost]], link: Link, batch: int
) -> list[dict[str, Any]]:
    """The rows of the table for one number of stages.

    Args:
        stages: how many.
        args: of the run.
        local: what the blocks cost when each learns by itself, on a micro-batch.
        backprop: what they cost by backpropagation, by the number of micro-batches that the batch is cut into.
        link: between stages.
        batch: texts of an optimizer step.
    """
    found = [{"way": "Associated Learning", **stream_row(stages, args, local, link)}]
    for name, make in PIPELINES.items() if stages > 1 else ():
        tried = [pipeline_row(make, stages, m, backprop[m], link) for m in MICRO_BATCHES if m in backprop]
        if tried:
            found.append({"way": name, **min(tried, key=lambda row: row["step_ms"])})
    if stages in backprop:
        way = "data parallel" if stages > 1 else "backpropagation"
        found.append({"way": way, **data_parallel_row(stages, backprop[stages], link)})
    return [{"stages": stages, **row, "texts_per_second": 1000 * batch / row["step_ms"]} for row in found]


def stream_row(stages: int, args: TrainingArguments, costs: list[Cost], link: Link) -> dict[str, Any]:
    """Associated Learning: a stage takes the local steps of its blocks, and sends what leaves the last one before that
    block's backward pass."""
    wire = [cost.sent_in_bf16 if args.wire_dtype == "bf16" else cost.sent for cost in costs]
    cuts = balanced_cuts([cost.step for cost in costs], stages, [cost.copy for cost in costs])
    owned = [costs[a:b] for a, b in pairwise(cuts)]
    sent = [wire[b - 1] for b in cuts[1:-1]] + [0]

    def seconds(stage: int, task: Task) -> float:
        *earlier, last = owned[stage]
        if task.kind == "local":
            return last.backward + last.update
        copies = last.copy * (stage < stages - 1) + (owned[stage - 1][-1].copy if stage else 0.0)
        return sum(cost.step for cost in earlier) + last.forward + copies

    spans = schedule.simulate(
        schedule.stream(stages, 2 * stages + 4), seconds, lambda stage, task: link.seconds(sent[stage]), link.latency
    )
    memory = [
        sum(cost.weights + cost.state for cost in own)
        + max(cost.gradients + cost.kept for cost in own)
        + 3 * (sent[s] + (sent[s - 1] if s else 0))  # one at work, two on their way
        for s, own in enumerate(owned)
    ]
    return _row(schedule.step_seconds(spans), _waiting(spans), sent, memory)


def pipeline_row(make: Any, stages: int, parts: int, costs: list[Cost], link: Link) -> dict[str, Any]:
    """A pipeline of backpropagation that is emptied for every update."""
    cuts = balanced_cuts([cost.forward + cost.backward for cost in costs], stages, [cost.copy for cost in costs])
    owned = [costs[a:b] for a, b in pairwise(cuts)]
    splits = make is schedule.zero_bubble

    def seconds(stage: int, task: Task) -> float:
        own = owned[stage]
        inner = sum(cost.to_input for cost in own) if stage else 0.0
        whole = sum(cost.backward for cost in own)
        return {
            "forward": sum(cost.forward for cost in own),
            "backward": inner if splits else whole,
            "weights": max(0.0, whole - inner),
            "update": sum(cost.update for cost in own),
        }[task.kind]

    def sent(stage: int, task: Task) -> float:
        return owned[stage if task.kind == "forward" else stage - 1][-1].sent

    orders = make(stages, stages + 3, parts)
    spans = schedule.simulate(orders, seconds, lambda stage, task: link.seconds(sent(stage, task)), link.latency)
    most = {schedule.gpipe: [parts] * stages, schedule.zero_bubble: [stages] * stages}
    at_once = [min(parts, number) for number in most.get(make, range(stages, 0, -1))]
    memory = [
        sum(cost.weights + cost.state + cost.gradients + number * cost.kept for cost in own)
        for own, number in zip(owned, at_once, strict=True)
    ]
    down = [parts * own[-1].sent for own in owned[:-1]]
    both = [a + b for a, b in zip([*down, 0], [0, *down], strict=True)]  # hidden states down, their gradients back
    return _row(schedule.step_seconds(spans), _waiting(spans), both, memory, parts)


def data_parallel_row(replicas: int, costs: list[Cost], link: Link) -> dict[str, Any]:
    """Every machine has all blocks and a part of the batch; gradients are summed around a ring, block by block. One
    machine has nothing to sum: plain backpropagation."""
    around = 2 * (replicas - 1)
    sizes = [around / replicas * cost.gradients for cost in costs]
    step = schedule.data_parallel(
        [cost.forward for cost in costs],
        [cost.backward for cost in costs],
        [link.seconds(size) + around * link.latency for size in sizes],
        sum(cost.update for cost in costs),
    )
    busy = sum(cost.step for cost in costs)
    memory = sum(cost.weights + cost.state + cost.gradients + cost.kept for cost in costs)
    return _row(step, max(0.0, 1 - busy / step), [sum(sizes)] * replicas, [memory] * replicas)


def _row(
    seconds: float, waiting: float, sent: Sequence[float], memory: Sequence[float], parts: int = 1
) -> dict[str, Any]:
    return {
        "micro_batches": parts,
        "step_ms": 1000 * seconds,
        "waiting": waiting,
        "sent_mib": [size / 2**20 for size in sent],
        "memory_mib": [size / 2**20 for size in memory],
    }


def _waiting(spans: list[list[schedule.Span]]) -> float:
    """The share of a step in which a stage waits once all have work: the mean over stages."""
    batches = spans[0][-1].task.batch + 1
    busy = sum(span.end - span.start for row in spans for span in row) / batches
    return max(0.0, 1 - busy / len(spans) / schedule.step_seconds(spans))


# --- depth


def over_depth(local: Cost, part: Cost, whole: Cost, link: Link, micro_batches: int) -> list[dict[str, float]]:
    """Seconds of 64 batches for depths of 1 to 32 blocks like these, one stage each: O(n + l) with Associated Learning,
    O(n l) if a batch of backpropagation is on one stage at a time, and 1F1B between them.

    Args:
        local: a block that learns by itself.
        part: by backpropagation, on one of `micro_batches`.
        whole: the same, on the whole batch.
        link: between stages.
    """
    rows = []
    for depth in DEPTHS:
        stream = schedule.simulate(
            schedule.stream(depth, MANY),
            lambda stage, task: local.forward if task.kind == "forward" else local.backward + local.update,
            lambda stage, task: link.seconds(local.sent),
            link.latency,
        )
        batch = schedule.simulate(
            schedule.one_f_one_b(depth, 1, micro_batches),
            lambda stage, task: getattr(part, task.kind),
            lambda stage, task: link.seconds(part.sent),
            link.latency,
        )
        back = depth * whole.step + 2 * (depth - 1) * (link.seconds(whole.sent) + link.latency)
        ends = [max(row[-1].end for row in spans) for spans in (stream, batch)]
        rows.append({"blocks": depth, "stream": ends[0], "1f1b": MANY * ends[1], "backprop": MANY * back})
    return rows


# --- for people


def as_text(found: dict[str, Any]) -> str:
    """The table, and what it is about."""
    rows = [
        {
            "stages": row["stages"],
            "way": row["way"],
            "micro-batches": row["micro_batches"],
            "step ms": f"{row['step_ms']:,.1f}",
            "texts/s": f"{row['texts_per_second']:,.1f}",
            "waiting": f"{row['waiting']:.0%}",
            "sent MiB": f"{max(row['sent_mib']):,.1f}",
            "memory MiB": f"{max(row['memory_mib']):,.0f}",
        }
        for row in found["rows"]
    ]
    return (
        f"{table(rows)}\n{found['blocks']} blocks, {found['batch']} texts of {found['tokens']} tokens in a step, timed "
        "here. Every stage is taken to be a machine like this one."
    )


def draw(path: str, found: dict[str, Any]) -> None:
    """Texts per second over stages, and time over depth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    ways = dict.fromkeys(row["way"] for row in found["rows"] if row["way"] != "backpropagation")
    for way in ways:
        mine = [row for row in found["rows"] if row["way"] == way]
        left.plot([row["stages"] for row in mine], [row["texts_per_second"] for row in mine], marker="o", label=way)
    left.set_xticks(sorted({row["stages"] for row in found["rows"]}))
    left.set(xlabel="stages", ylabel="texts per second")
    names = {"stream": "Associated Learning", "1f1b": "1F1B", "backprop": "backpropagation, one stage at a time"}
    for name, label in names.items():
        right.plot([row["blocks"] for row in found["depth"]], [row[name] for row in found["depth"]], label=label)
    right.set(xlabel="blocks, a stage each", ylabel=f"seconds for {MANY} batches", yscale="log")
    for axes in (left, right):
        axes.set_ylim(bottom=0 if axes is left else None)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
