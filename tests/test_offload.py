"""--offload: the same bits as with everything in memory, and never more than two blocks in memory."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import in_own_mounts

import hf_al
from hf_al.training.offload import Offload
from hf_al.training.optim import BlockOptimizers

SMALL = {"num_blocks": 3, "hidden_size": 16, "target_size": 12}


def run(data, folder: Path, model_type: str, encoder: Path, **values) -> bytes:
    """The weights after a few steps with an evaluation in between."""
    model = {"num_blocks": 3} if model_type == "al_encoder" else {**SMALL}
    args = hf_al.TrainingArguments(**{
        "output_dir": str(folder), "model_type": model_type, "model": model, "max_steps": 6, "eval_strategy": "steps",
        "eval_steps": 3, "threads": 1, "use_cpu": True, "disable_tqdm": True, "plots": False,
        "encoder": str(encoder) if model_type == "al_encoder" else None, **values,
    })  # fmt: skip
    hf_al.train(args, data)
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("model_type", "values"),
    [
        ("al_lstm", {"embedding_optimizer": "sparse_adam"}),
        ("al_transformer", {"gradient_accumulation_steps": 2, "bf16": True}),
        ("al_encoder", {"frozen_blocks": 1, "optim": "adafactor"}),
    ],
)
def test_offloaded_blocks_end_as_the_same_bits(model_type, values, few_tweets, encoder_folder, tmp_path):
    plain, offloaded = (
        run(few_tweets, tmp_path / str(offload), model_type, encoder_folder, offload=offload, **values)
        for offload in (False, True)
    )
    assert plain == offloaded


def test_a_run_resumes_with_and_without_offload(few_tweets, encoder_folder, tmp_path):
    def go(name: str, **values) -> bytes:
        return run(few_tweets, tmp_path / name, "al_lstm", encoder_folder, lr_scheduler_type="constant", **values)

    whole = go("whole")
    for name, first in (("on", False), ("off", True)):
        go(name, offload=first, max_steps=3)
        assert go(name, offload=not first, resume_from_checkpoint="last") == whole


def resident_bytes() -> int:
    """Of mapped files without a name."""
    total, counted = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):
            counted = line.endswith("(deleted)")
        elif counted and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


def test_only_the_block_that_computes_and_the_next_one_are_in_memory(make_model, tmp_path):
    def optimizers_of(model) -> BlockOptimizers:
        args = hf_al.TrainingArguments(output_dir="unused")
        return BlockOptimizers(dict(enumerate(model.model.blocks)), model.config.units, args, 10)

    def update(block, optimizers: BlockOptimizers, step: int) -> None:
        for parameter in block.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizers.update(range(block.index, block.index + 1), step)

    model = make_model("al_lstm", num_blocks=8, hidden_size=256, embedding_block=False)
    expected = copy.deepcopy(model)
    blocks, optimizers, plain = dict(enumerate(model.model.blocks)), optimizers_of(model), optimizers_of(expected)
    offload = Offload(blocks, optimizers, torch.device("cpu"), tmp_path)
    largest = 3 * max(sum(p.nbytes for p in block.parameters()) for block in blocks.values())  # two moments
    before, seen = resident_bytes(), []
    for step in range(2):
        for block in offload.visit(blocks.values()):
            update(block, optimizers, step)
            update(expected.model.blocks[block.index], plain, step)
            seen.append(resident_bytes() - before)
    assert 0 < max(seen) <= 2 * largest
    assert resident_bytes() == before
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert all(torch.equal(t, plain.state(k)[n]) for k in blocks for n, t in optimizers.state(k).items())
    assert list(tmp_path.iterdir()) == []


def test_blocks_that_need_each_others_gradients_are_not_offloaded(few_tweets, tmp_path):
    args = hf_al.TrainingArguments(
        output_dir=str(tmp_path / "out"), model={**SMALL, "objective": "backprop"}, offload=True, use_cpu=True
    )
    with pytest.raises(ValueError, match="Expected a local objective with --offload, got backprop"):
        hf_al.train(args, few_tweets)
    assert not (tmp_path / "out").exists()


FULL_DISK = """
import subprocess, sys, torch
from pathlib import Path
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", sys.argv[1]], check=True)
from hf_al.training.offload import MappedFile
try:
    MappedFile(Path(sys.argv[1])).go([torch.zeros(2**20)], changed=True)
except OSError as error:
    print(error)
"""


def test_a_disk_without_room_is_an_error_and_not_a_crash(tmp_path):
    """A small tmpfs."""
    argv = [*in_own_mounts(tmp_path), sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=50)
    said = f"Expected 4 MiB in {tmp_path} for --offload: No space left on device. Make room there, or make it writable."
    assert done.stdout.strip() == said, done.stderr
