"""One optimizer step: Associated Learning beside backpropagation, on the same blocks and batches.

    python recipes/benchmarks/step.py --json out/step.json --plot out/step.png

Needs no data. Times steps of the training loop (batch, forward, backward, clipping, update) in turns on all cores, and
takes medians. Counts the floating-point operations of each step: their ratio is what the time ratio could be if matmuls
were the only cost. Measures the most bytes that activations and gradients hold.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import interleaved, paired_ratio, peak_bytes, timing_parser, write_results
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from torch.utils.flop_counter import FlopCounterMode

import hf_al
from hf_al.arguments import TrainingArguments
from hf_al.data import tokenization
from hf_al.data.batching import BatchOrder, Collator, micro_batches, token_lengths
from hf_al.flags import set_up_output
from hf_al.messages import table
from hf_al.parallel.placement import place
from hf_al.training.offload import Offload
from hf_al.training.optim import BlockOptimizers
from hf_al.training.stage import Stage

BATCH, BATCHES, TOKENS, WORDS, CLASSES = 32, 8, 64, 30_000, 4
SHAPES: dict[str, dict[str, Any]] = {
    "transformer": {"model_type": "al_transformer", "num_blocks": 8, "hidden_size": 256, "num_attention_heads": 4},
    "lstm": {"model_type": "al_lstm", "num_blocks": 4, "hidden_size": 256},
}


def random_rows(lengths: list[int]) -> Dataset:
    rng = np.random.default_rng(0)
    features = Features({"input_ids": List(Value("int32")), "label": ClassLabel(num_classes=CLASSES)})
    ids = [rng.integers(4, WORDS, length).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "label": rng.integers(0, CLASSES, len(ids)).tolist()}, features)


def new_model(shape: dict[str, Any], objective: str) -> Any:
    """A network of `SHAPES` in training mode, with the embedding in its first block; always the same weights."""
    config_class, _, model_class = hf_al.MODEL_CLASSES[shape["model_type"]]
    values = {name: value for name, value in shape.items() if name != "model_type"}
    sizes = {"vocab_size": WORDS, "num_labels": CLASSES, "max_position_embeddings": TOKENS, "target_size": 128}
    torch.manual_seed(0)
    return model_class(config_class(**values, **sizes, embedding_block=False, objective=objective)).train()


def make_step(
    shape: dict[str, Any],
    objective: str,
    data: Dataset,
    embedding_optimizer: str = "same",
    torch_compile: bool = False,
    bf16: bool = False,
) -> Callable[[], Any]:
    """Returns a function that takes one optimizer step of the training loop on the next batch."""
    return loop_step(new_model(shape, objective), data, BATCH, embedding_optimizer, torch_compile, bf16)


def loop_step(
    model: Any,
    data: Dataset,
    batch: int,
    embedding_optimizer: str = "same",
    torch_compile: bool = False,
    bf16: bool = False,
    offload_to: Path | None = None,
    accumulation: int = 1,
) -> Callable[[], Any]:
    """Returns a function that takes one optimizer step of the training loop on the next `batch` rows, in `accumulation`
    micro-batches."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if offload_to is None:
        model.to(device)
    units = model.config.units
    args = TrainingArguments(output_dir="unused", embedding_optimizer=embedding_optimizer)
    blocks = dict(enumerate(model.model.blocks))
    optimizers = BlockOptimizers(blocks, units, args, total_steps=1_000_000)
    offload = Offload(blocks, optimizers, device, offload_to) if offload_to else None
    stage = Stage(model, place(units), device, Collator(0, CLASSES), optimizers, bf16=bf16, offload=offload)
    if torch_compile:
        stage.compile()
    steps = [micro_batches(np.arange(batch) + batch * n, accumulation) for n in range(len(data) // batch)]
    batches = stage.batches(data, ((number, steps[number % len(steps)]) for number in range(1_000_000)))

    def step() -> None:
        number, parts = next(batches)
        stage.train_batch(parts, number, seed=0)

    return step


def flops(step: Callable[[], Any]) -> int:
    """Floating-point operations of the matmuls of a step; those inside cuDNN's LSTM are not seen."""

    def in_place(_: Any, a: torch.Size, b: torch.Size, **kwargs: Any) -> int:  # LSTM layers use in-place matmuls
        return 2 * a.numel() * b[-1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: in_place}) as counter:
        step()
    return counter.get_total_flops()


def compare(
    name: str, rounds: int, objectives: list[str], embedding_optimizer: str, bf16: bool
) -> tuple[list[dict], dict]:
    """Rows and ratios of one architecture."""
    data = random_rows([TOKENS] * BATCH * BATCHES)
    steps = {o: make_step(SHAPES[name], o, data, embedding_optimizer, bf16=bf16) for o in [*objectives, "backprop"]}
    work = {o: flops(step) for o, step in steps.items()}
    seconds = interleaved(steps, rounds)
    memory = {o: peak_bytes(step) for o, step in steps.items()}
    rows = []
    for o in steps:
        rows.append(
            {
                "network": name,
                "objective": o,
                "embedding rows": embedding_optimizer,
                "step ms": 1000 * statistics.median(seconds[o]),
                "time / bp": paired_ratio(seconds[o], seconds["backprop"]),
                "ideal": work[o] / work["backprop"],
                "GFLOP": work[o] / 1e9,
                "peak MiB": memory[o] / 2**20,
                "peak / bp": memory[o] / memory["backprop"],
            }
        )
    first = rows[0]
    suffix = name if embedding_optimizer == "sparse_adam" else f"{name}_dense_rows"
    ratios = {
        f"al_over_bp_step_time_{suffix}": first["time / bp"],
        f"ideal_{suffix}": first["ideal"],
        f"al_over_bp_peak_bytes_{suffix}": first["peak / bp"],
    }
    return rows, ratios


def compare_compiled(rounds: int) -> tuple[list[dict], dict]:
    """The transformer's steps with and without torch.compile (needs a C++ compiler)."""
    data = random_rows([TOKENS] * BATCH * BATCHES)
    steps = {
        f"{o} {'compiled' if c else 'eager'}": make_step(SHAPES["transformer"], o, data, "sparse_adam", c)
        for o in ("associated", "backprop")
        for c in (False, True)
    }
    seconds = interleaved(steps, rounds)
    rows = [{"step": name, "step ms": 1000 * statistics.median(times)} for name, times in seconds.items()]
    ratios = {
        f"compiled_over_eager_step_time_{o}": paired_ratio(seconds[f"{o} compiled"], seconds[f"{o} eager"])
        for o in ("associated", "backprop")
    }
    return rows, ratios


# --- the data side


def made_up_texts(rows: int) -> list[str]:
    """Words follow Zipf's law, lengths are those of short messages (log-normal)."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(3, 0.6, rows).astype(int), 1, 120)
    return [" ".join(f"w{n}" for n in rng.zipf(1.3, length) % WORDS) for length in lengths]


def padding_share(lengths: np.ndarray, batches: list[np.ndarray]) -> float:
    cells = sum(len(rows) * lengths[rows].max() for rows in batches)
    return 1 - lengths.sum() / cells


@contextmanager
def timed(name: str, tokens: int, rows: list[dict]) -> Iterator[None]:
    clock = time.perf_counter()
    yield
    rows.append({"what": name, "tokens/s": tokens / (time.perf_counter() - clock)})


def data_side(rows_count: int = 20_000) -> tuple[list[dict], dict]:
    """Tokens per second of tokenization and of batching, and the cost of padding."""
    texts = Dataset.from_dict({"text": made_up_texts(rows_count), "label": [0, 1] * (rows_count // 2)})
    args = TrainingArguments(output_dir="unused")
    tokenizer = tokenization.build_tokenizer(args, texts)
    rows: list[dict] = []
    total = sum(len(t.split()) for t in texts["text"]) + 2 * rows_count
    with timed("tokenization", total, rows):
        data = tokenization.tokenize(DatasetDict(train=texts), tokenizer, args)["train"]
    lengths = token_lengths(data)
    data = data.cast_column("label", ClassLabel(num_classes=2))
    collator = Collator(tokenizer.pad_token_id, 2)
    order = BatchOrder(lengths, BATCH, seed=0).epoch(0)
    with timed("batching", int(lengths.sum()), rows):
        for batch in order:
            collator(data, batch)
    shuffled = np.random.default_rng(0).permutation(len(lengths))
    random_order = [shuffled[i : i + BATCH] for i in range(0, len(lengths), BATCH)]
    ratios = {
        "tokens_per_second_tokenization": rows[0]["tokens/s"],
        "tokens_per_second_batching": rows[1]["tokens/s"],
        "padding_share_bucketed": padding_share(lengths, order),
        "padding_share_random": padding_share(lengths, random_order),
    }
    return rows, ratios


def plot(path: str, rows: list[dict]) -> None:
    """Step time and peak bytes of AL relative to backpropagation, with the ideal as a mark."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.get("objective") not in (None, "backprop")]
    names = [f"{row['network']}\n{row['objective']}\n{row['embedding rows']}" for row in shown]
    figure = Figure(figsize=(1.6 * len(shown) + 2, 4.2), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(shown))
    axes.bar(places - 0.2, [row["time / bp"] for row in shown], 0.38, label="step time", color="#0072b2")
    axes.bar(places + 0.2, [row["peak / bp"] for row in shown], 0.38, label="peak bytes", color="#e69f00")
    axes.scatter(places - 0.2, [row["ideal"] for row in shown], marker="_", s=600, color="black", label="matmuls only")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xticks(places, names, fontsize=8)
    axes.set_ylabel("AL / backpropagation")
    axes.legend(loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.12), frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = timing_parser(__doc__, rounds=20)
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--networks", default="transformer,lstm", help="networks to time, comma-separated")
    parser.add_argument("--bf16", action="store_true", help="forward passes in bfloat16 (autocast)")
    parser.add_argument("--torch_compile", action="store_true", help="also time the transformer under torch.compile")
    args = parser.parse_args()
    set_up_output()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows: list[dict] = []
    ratios: dict[str, float] = {}

    def add(part: tuple[list[dict], dict]) -> None:
        rows.extend(part[0])
        ratios.update(part[1])
        print(table(part[0], markdown=True), flush=True)

    for name in args.networks.split(","):
        for embedding_optimizer in ("sparse_adam", "same"):
            add(compare(name, args.rounds, ["associated", "al_ce"], embedding_optimizer, args.bf16))
    if args.torch_compile:
        add(compare_compiled(args.rounds))
    add(data_side())
    for name, value in ratios.items():
        print(f"{name}: {value:.4g}")
    write_results(args.json, rows, ratios)
    if args.plot:
        plot(args.plot, rows)


if __name__ == "__main__":
    main()
