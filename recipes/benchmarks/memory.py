"""Memory of fine-tuning an encoder: Associated Learning beside backpropagation, on the same layers and batches.

    python recipes/benchmarks/memory.py --json out/memory.json --plot out/memory.png

Needs no data and no pretrained weights: the encoder is a BERT of 6 layers of width 384 with random weights. Counts the
most bytes that activations and gradients hold during a step of the training loop; and in all, with weights and
optimizer state, the most bytes that a process of its own holds during a step, beyond what it held before it made the
model (on a GPU, the bytes that its allocator gave out). Times steps in turns. The arms:

    backprop                  the whole network is one unit
    checkpointed              the same, with activation checkpointing of every layer
    optimizer in backward     the same again, and each weight is updated as soon as its gradient is there, which cannot
                              be with --accumulation
    al_ce, 3 or 6 blocks      block by block, as `hf-al train --encoder` does; also with bridges that look ahead, and
                              with --offload, in the folder --offload_dir
"""

import gc
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import interleaved, paired_ratio, peak_bytes, timing_parser, write_results
from datasets import Dataset
from step import CLASSES, loop_step, random_rows
from transformers import BertConfig

from hf_al import ALEncoderConfig, ALEncoderForSequenceClassification
from hf_al.data.batching import Collator
from hf_al.flags import set_up_output
from hf_al.messages import table

SIZES = {"vocab_size": 30_522, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
SMALL = {"vocab_size": 30_000, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512}
ARMS: dict[str, dict[str, Any]] = {
    "backprop": {"objective": "backprop", "num_blocks": 6},
    "checkpointed": {"objective": "backprop", "num_blocks": 6, "checkpointing": True},
    "optimizer in backward": {"objective": "backprop", "num_blocks": 6, "checkpointing": True, "in_backward": True},
    "al_ce, 3 blocks": {"num_blocks": 3},
    "al_ce, 3 blocks, lookahead 1": {"num_blocks": 3, "lookahead": 1},
    "al_ce, 3 blocks, lookahead 2": {"num_blocks": 3, "lookahead": 2},
    "al_ce, 3 blocks, offload": {"num_blocks": 3, "offload": True},
    "al_ce, 6 blocks": {"num_blocks": 6},
    "al_ce, 6 blocks, lookahead 1": {"num_blocks": 6, "lookahead": 1},
    "al_ce, 6 blocks, lookahead 2": {"num_blocks": 6, "lookahead": 2},
    "al_ce, 6 blocks, offload": {"num_blocks": 6, "offload": True},
}
DEPTH_ARMS = ("backprop", "al_ce", "al_ce, offload")
Step = Callable[[], Any]


def make_step(
    folder: str, bf16: bool, accumulation: int, sizes: dict[str, int], layers: int, batch: int, tokens: int,
    offload: bool = False, checkpointing: bool = False, in_backward: bool = False, **values: Any,
) -> Step:  # fmt: skip
    """A step of an arm of `ARMS`; `values` are those of the config."""
    torch.manual_seed(0)
    encoder = BertConfig(**sizes, num_hidden_layers=layers, max_position_embeddings=512)
    config = ALEncoderConfig.from_encoder(encoder, num_labels=CLASSES, **values)
    model = ALEncoderForSequenceClassification(config).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    data = random_rows([tokens] * batch)
    if in_backward:
        return updating_step(model, data, batch, bf16)
    return loop_step(
        model, data, batch, bf16=bf16, offload_to=Path(folder) if offload else None, accumulation=accumulation
    )


def updating_step(model: ALEncoderForSequenceClassification, data: Dataset, batch: int, bf16: bool) -> Step:
    """A step in which each weight is updated, and its gradient freed, inside the backward pass."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)

    def update(optimizer: torch.optim.Optimizer) -> Callable[[torch.Tensor], None]:
        def hook(_: torch.Tensor) -> None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return hook

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update(torch.optim.AdamW([parameter], lr=1e-5)))
    inputs = Collator(0, CLASSES)(data, np.arange(batch))
    inputs = {name: t.to(device) for name, t in inputs.items()}

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = model(**inputs).loss
        loss.backward()

    return step


def held_by_step(make: Callable[[], Step]) -> int:
    """Most bytes that this process (on a GPU: the allocator) holds during a step, beyond those before the model was
    made."""
    on_gpu = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() if on_gpu else _resident("VmRSS")
    step = make()
    for _ in range(2):
        step()  # optimizer state exists from here on
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    step()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def held_alone(make: Callable[[], Step]) -> int:
    """What `held_by_step` finds where nothing else is."""
    if torch.cuda.is_available():
        gc.collect()
        return held_by_step(make)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(held_by_step, make).result()


def compare(make: Callable[..., Step], arms: list[str], batch: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    makers = {name: partial(make, SIZES, 6, batch, tokens, **ARMS[name]) for name in arms}
    totals = {name: held_alone(maker) for name, maker in makers.items()}
    steps = {name: maker() for name, maker in makers.items()}
    for step in steps.values():
        step()
    peaks = {name: peak_bytes(step) for name, step in steps.items()}
    seconds = interleaved(steps, rounds, warmup=1)
    return [
        {
            "tokens": tokens,
            "arm": name,
            "peak MiB": peaks[name] / 2**20,
            "peak / bp": peaks[name] / peaks["backprop"],
            "total MiB": totals[name] / 2**20,
            "total / bp": totals[name] / totals["backprop"],
            "peak / checkpointed": peaks[name] / peaks["checkpointed"],
            "total / checkpointed": totals[name] / totals["checkpointed"],
            "step s": statistics.median(seconds[name]),
            "time / bp": paired_ratio(seconds[name], seconds["backprop"]),
        }
        for name in steps
    ]


def by_depth(make: Callable[..., Step], depths: list[int]) -> list[dict[str, Any]]:
    """Bytes of small encoders, one block per layer: of activations and gradients, and in all."""
    rows = []
    for depth in depths:
        row: dict[str, Any] = {"layers": depth}
        for arm in DEPTH_ARMS:
            objective, offload = arm.removesuffix(", offload"), arm.endswith(", offload")
            maker = partial(make, SMALL, depth, 8, 64, offload=offload, objective=objective, num_blocks=depth)
            step = maker()
            step()
            row[arm] = peak_bytes(step) / 2**20
            row[f"{arm}, in all"] = held_alone(maker) / 2**20
        rows.append(row)
    return rows


def plot(path: str, rows: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    titles = {"": "activations and gradients", ", in all": "with weights and optimizer state"}
    for axes, (suffix, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for arm, colour in zip(DEPTH_ARMS, ("#e69f00", "#0072b2", "#009e73"), strict=True):
            values = [row[arm + suffix] for row in rows]
            axes.plot([row["layers"] for row in rows], values, "o-", label=arm, color=colour)
        axes.set_title(title)
        axes.set_xlabel("layers, one block each")
        axes.set_ylabel("MiB")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = timing_parser(__doc__, rounds=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches that the batch is cut into")
    parser.add_argument("--tokens", default="128,512", help="lengths, comma-separated")
    parser.add_argument("--depths", default="2,6,12,24,48", help="layers, comma-separated; empty: none")
    parser.add_argument("--arms", help="a part of them, separated by semicolons; backprop and checkpointed are needed")
    parser.add_argument("--bf16", action="store_true", help="forward passes in bfloat16 (autocast)")
    parser.add_argument("--offload_dir", metavar="FOLDER", help="on a disk (default: a temporary folder)")
    args = parser.parse_args()
    set_up_output()
    with tempfile.TemporaryDirectory(dir=args.offload_dir) as folder:
        make = partial(make_step, folder, args.bf16, args.accumulation)
        possible = [name for name, values in ARMS.items() if args.accumulation == 1 or "in_backward" not in values]
        arms = args.arms.split(";") if args.arms else possible
        if not set(arms) <= set(possible):
            parser.error(
                f"expected arms that allow --accumulation {args.accumulation}, got {sorted(set(arms) - set(possible))}"
            )
        rows = []
        for tokens in args.tokens.split(","):
            rows += compare(make, arms, args.batch, int(tokens), args.rounds)
        print(table(rows, markdown=True), flush=True)
        depths = by_depth(make, [int(depth) for depth in args.depths.split(",") if depth])
    ratios = ratios_of(rows, depths)
    if depths:
        print(table(depths, markdown=True))
    for name, value in ratios.items():
        print(f"{name}: {value:.3g}")
    write_results(args.json, rows + depths, ratios)
    if args.plot:
        plot(args.plot, depths)


def ratios_of(rows: list[dict[str, Any]], depths: list[dict[str, Any]]) -> dict[str, float]:
    ratios = {}
    if depths:
        first, last = depths[0], depths[-1]
        between = f"depth_{last['layers']}_over_depth_{first['layers']}"
        ratios[f"peak_bytes_{between}"] = last["al_ce"] / first["al_ce"]
        ratios[f"peak_bytes_{between}_offload"] = last["al_ce, offload, in all"] / first["al_ce, offload, in all"]
    for row in rows:
        suffix = "" if row["tokens"] == 128 else f"_{row['tokens']}"
        if row["arm"] == "al_ce, 6 blocks":
            ratios |= {
                f"al_over_bp_peak_bytes_6_blocks{suffix}": row["peak / bp"],
                f"al_over_bp_total_bytes_6_blocks{suffix}": row["total / bp"],
                f"al_over_checkpointing_peak_bytes_6_blocks{suffix}": row["peak / checkpointed"],
                f"al_over_bp_step_time_6_blocks{suffix}": row["time / bp"],
            }
    return ratios


if __name__ == "__main__":
    main()
