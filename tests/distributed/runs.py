"""Runs of the stream that tests compare: their flags, and what they leave. `run_flags` and `alone` are fixtures."""

import hashlib
from pathlib import Path

import jobs
import pytest
from world import run_world

STEPS = 60
FLAGS = [
    f"--max_steps={STEPS}", "--max_train_samples=397", "--per_device_train_batch_size=8",
    "--gradient_accumulation_steps=2", "--max_grad_norm=0.5", "--warmup_steps=0.2", "--learning_rate=5e-3",
    "--weight_decay=0.01", "--save_steps=13", "--eval_strategy=steps", "--eval_steps=22", "--num_blocks=4",
    "--hidden_size=16", "--target_size=12", "--hidden_dropout_prob=0.2", "--embedding_dropout_prob=0.2",
    "--bridge_dropout_prob=0.2", "--threads=1", "--use_cpu", "--disable_tqdm", "--max_seq_length=24",
    "--logging_steps=5", "--placement=equal",
]  # fmt: skip
CASES = {
    "lstm_associated_state": ["--model_type=al_lstm", "--objective=associated", "--carry_state"],
    "lstm_al_ce": ["--model_type=al_lstm", "--objective=al_ce"],
    "transformer_associated": ["--model_type=al_transformer", "--num_attention_heads=2", "--objective=associated"],
    "transformer_al_ce_plateau_sparse": [
        "--model_type=al_transformer", "--num_attention_heads=2", "--objective=al_ce", "--embedding_block=false",
        "--lr_scheduler_type=reduce_lr_on_plateau", "--lr_scheduler_kwargs=patience=0,factor=0.3", "--warmup_steps=0",
        "--embedding_optimizer=sparse_adam", "--position_embedding_type=rotary", "--late_block=2", "--late_from=9",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def run_flags(tweet_files):
    """Flags of a run on real tweets: run_flags("lstm_al_ce", stages, output_dir, *more) -> argv."""

    def flags(case: str, stages: int, output_dir: Path, *more: str) -> list[str]:
        return [*tweet_files, *FLAGS, *CASES[case], f"--stages={stages}", f"--output_dir={output_dir}", *more]

    return flags


def sha256(folder: Path, step: int = STEPS) -> dict[str, str]:
    """Hashes of every file of the model, and of the weights and optimizer state at the last step."""
    last = folder / "checkpoints" / f"checkpoint-{step:08d}"
    model = [p for p in folder.iterdir() if p.is_file() and p.suffix != ".md"]
    model = [p for p in model if p.name not in ("report.json", "training_config.yaml")]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {p.name for p in model}
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in [*model, *last.glob("*.safetensors")]}


@pytest.fixture(scope="module")
def alone(run_flags, tmp_path_factory):
    """The result of one process: alone(case) -> sha256 by file."""
    found: dict[str, dict[str, str]] = {}

    def of(case: str) -> dict[str, str]:
        if case not in found:
            folder = tmp_path_factory.mktemp("alone") / "run"
            run_world(1, jobs.train, run_flags(case, 1, folder))
            found[case] = sha256(folder)
        return found[case]

    return of
