"""Memory of fine-tuning an encoder: Associated Learning beside backpropagation, on the same layers and batches.

    python recipes/benchmarks/memory.py --json out/memory.json --plot out/memory.png

Needs no data and no pretrained weights: the encoder is a BERT of 6 layers of width 384 with random weights. Counts the
most bytes that activations and gradients hold during a step of the training loop, and times steps in turns. The arms:

    backprop                  the whole network is one unit
    checkpointed              the same, with activation checkpointing of every layer
    optimizer in backward     the same again, and each weight is updated as soon as its gradient is there
    al_ce, 3 or 6 blocks      block by block, as `hf-al train --encoder` does; also with bridges that look ahead
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import interleaved, paired_ratio, peak_bytes, write_results
from datasets import Dataset
from step import CLASSES, loop_step, random_rows
from transformers import BertConfig

from hf_al import ALEncoderConfig, ALEncoderForSequenceClassification
from hf_al.commands import set_up_output
from hf_al.data.batching import Collator
from hf_al.messages import table

SIZES = {"vocab_size": 30_522, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
SMALL = {"vocab_size": 30_000, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512}
Step = Callable[[], Any]


def make_model(sizes: dict[str, int], layers: int, **values: Any) -> ALEncoderForSequenceClassification:
    torch.manual_seed(0)
    encoder = BertConfig(**sizes, num_hidden_layers=layers, max_position_embeddings=512)
    config = ALEncoderConfig.from_encoder(encoder, num_labels=CLASSES, **values)
    return ALEncoderForSequenceClassification(config).train()


def updating_step(model: ALEncoderForSequenceClassification, data: Dataset, batch: int) -> Step:
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
    inputs = {name: t.to(device) for name, t in inputs.items() if name != "lengths"}
    return lambda: model(**inputs).loss.backward()


def make_arms(sizes: dict[str, int], layers: int, batch: int, tokens: int) -> tuple[dict[str, Step], dict[str, int]]:
    """The steps by name, and how many parameters each arm has."""
    steps, counts = {}, {}
    for name, values in {
        "backprop": {"objective": "backprop", "num_blocks": layers},
        "checkpointed": {"objective": "backprop", "num_blocks": layers},
        "optimizer in backward": {"objective": "backprop", "num_blocks": layers},
        "al_ce, 3 blocks": {"num_blocks": 3},
        "al_ce, 3 blocks, lookahead 1": {"num_blocks": 3, "lookahead": 1},
        "al_ce, 3 blocks, lookahead 2": {"num_blocks": 3, "lookahead": 2},
        "al_ce, 6 blocks": {"num_blocks": 6},
        "al_ce, 6 blocks, lookahead 1": {"num_blocks": 6, "lookahead": 1},
    }.items():
        model = make_model(sizes, layers, **values)
        if name in ("checkpointed", "optimizer in backward"):
            model.activation_checkpointing_enable({"use_reentrant": False})
        make = updating_step if name == "optimizer in backward" else loop_step
        steps[name], counts[name] = make(model, random_rows([tokens] * batch), batch), model.num_parameters()
    return steps, counts


def compare(batch: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    steps, counts = make_arms(SIZES, 6, batch, tokens)
    for step in steps.values():
        step()  # optimizer state exists from here on
    peaks = {name: peak_bytes(step) for name, step in steps.items()}
    seconds = interleaved(steps, rounds, warmup=1)
    kept = {name: 4 * 3 * count for name, count in counts.items()}  # weights and two moments, float32
    return [
        {
            "tokens": tokens,
            "arm": name,
            "peak MiB": peaks[name] / 2**20,
            "peak / bp": peaks[name] / peaks["backprop"],
            "total MiB": (peaks[name] + kept[name]) / 2**20,
            "total / bp": (peaks[name] + kept[name]) / (peaks["backprop"] + kept["backprop"]),
            "peak / checkpointed": peaks[name] / peaks["checkpointed"],
            "step s": statistics.median(seconds[name]),
            "time / bp": paired_ratio(seconds[name], seconds["backprop"]),
        }
        for name in steps
    ]


def by_depth(depths: list[int]) -> list[dict[str, Any]]:
    """Peak bytes of activations and gradients of small encoders, one block per layer."""
    rows = []
    for depth in depths:
        row: dict[str, Any] = {"layers": depth}
        for objective in ("backprop", "al_ce"):
            model = make_model(SMALL, depth, objective=objective, num_blocks=depth)
            step = loop_step(model, random_rows([64] * 8), batch=8)
            step()
            row[objective] = peak_bytes(step) / 2**20
        rows.append(row)
    return rows


def plot(path: str, rows: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for objective, colour in (("backprop", "#e69f00"), ("al_ce", "#0072b2")):
        values = [row[objective] for row in rows]
        axes.plot([row["layers"] for row in rows], values, "o-", label=objective, color=colour)
    axes.set_xlabel("layers, one block each")
    axes.set_ylabel("activations and gradients, MiB")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="where to keep machine, rows and ratios")
    parser.add_argument("--plot", metavar="FILE", help="where to draw the peak by depth")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", default="128,512", help="lengths, comma-separated")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--depths", default="2,6,12,24,48", help="layers, comma-separated")
    args = parser.parse_args()
    set_up_output()
    rows = [row for tokens in args.tokens.split(",") for row in compare(args.batch, int(tokens), args.rounds)]
    print(table(rows, markdown=True))
    depths = by_depth([int(depth) for depth in args.depths.split(",")])
    print(table(depths, markdown=True))
    first, last = depths[0], depths[-1]
    ratios = {f"peak_bytes_depth_{last['layers']}_over_depth_{first['layers']}": last["al_ce"] / first["al_ce"]}
    for row in rows:
        if row["arm"] == "al_ce, 6 blocks":
            suffix = "" if row["tokens"] == 128 else f"_{row['tokens']}"
            ratios |= {
                f"al_over_bp_peak_bytes_6_blocks{suffix}": row["peak / bp"],
                f"al_over_bp_total_bytes_6_blocks{suffix}": row["total / bp"],
                f"al_over_checkpointing_peak_bytes_6_blocks{suffix}": row["peak / checkpointed"],
                f"al_over_bp_step_time_6_blocks{suffix}": row["time / bp"],
            }
    write_results(args.json, rows + depths, ratios)
    if args.plot:
        plot(args.plot, depths)


if __name__ == "__main__":
    main()
