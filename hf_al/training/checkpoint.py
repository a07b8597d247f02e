"""Checkpoints by block name: safetensors and json, nothing pickled.

    checkpoints/checkpoint-00000120/block-000.safetensors   weights and optimizer tensors of block 0
                                    manifest.json           step, progress, what the run is, every file and its size

A checkpoint is written beside its place and renamed when it is whole, so that a kill at any moment leaves either the
old state or the new one. One without a manifest that finds all its files is no checkpoint.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .optim import BlockOptimizers

MANIFEST = "manifest.json"
WEIGHT, OPTIMIZER = "weight/", "optimizer/"


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` optimizer steps."""
    return output_dir / "checkpoints" / f"checkpoint-{step:08d}"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """The file holds the old text or the new one, never a part."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    _fsync(aside)
    aside.replace(path)


def save_checkpoint(
    path: Path, blocks: dict[int, nn.Module], optimizers: BlockOptimizers, manifest: dict[str, Any]
) -> None:
    """Writes weights and optimizer state of `blocks`, then the manifest, then gives the folder its name."""
    aside = path.with_name(f"tmp-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    files = {}
    for k, block in blocks.items():
        tensors = {WEIGHT + name: tensor for name, tensor in block.state_dict().items()}
        tensors |= {OPTIMIZER + name: tensor for name, tensor in optimizers.state(k).items()}
        name = f"block-{k:03d}.safetensors"
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, aside / name)
        _fsync(aside / name)
        files[name] = (aside / name).stat().st_size
    write_atomically(aside / MANIFEST, json.dumps({**manifest, "files": files}, indent=1))
    replaced = path.with_name(path.name + ".old")
    if path.exists():  # the same step again: until the new one has its name, the old one is found under another
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    aside.rename(path)
    _fsync(path.parent)
    if replaced.exists():
        _remove(replaced)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a complete checkpoint, else None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        complete = all((path / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return manifest if complete else None


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = output_dir / "checkpoints"
    return [path for path in sorted(folder.glob("checkpoint-*")) if read_manifest(path) is not None]


def find_checkpoint(name: str, output_dir: Path) -> Path | None:
    """`last` -> the newest complete checkpoint, or None where there is none; a folder -> that folder.

    Raises:
        ValueError: a folder that is not a complete checkpoint.
    """
    if name == "last":
        paths = complete_checkpoints(output_dir)
        return paths[-1] if paths else None
    path = Path(name)
    if read_manifest(path) is None:
        raise ValueError(
            f"Expected a complete checkpoint (manifest.json and its block files) in {name}, found none. "
            "Pass the folder of one, or 'last'."
        )
    return path


def load_checkpoint(path: Path, blocks: dict[int, nn.Module], optimizers: BlockOptimizers | None) -> dict[str, Any]:
    """Loads weights, and optimizer state where wanted, into `blocks`; returns the manifest.

    Raises:
        ValueError: a corrupt file, or tensors that are not the blocks' own.
    """
    manifest = read_manifest(path)
    assert manifest is not None, path
    for k, block in blocks.items():
        file = path / f"block-{k:03d}.safetensors"
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"Could not read {file}: {error}. Resume from an earlier checkpoint.") from None
        weights = {n.removeprefix(WEIGHT): t for n, t in tensors.items() if n.startswith(WEIGHT)}
        expected = {n: t.shape for n, t in block.state_dict().items()}
        if expected != {n: t.shape for n, t in weights.items()}:
            raise ValueError(f"Expected the weights of block {k} in {file}, got tensors of other names or shapes.")
        block.load_state_dict(weights)
        if optimizers is not None:
            state = {n.removeprefix(OPTIMIZER): t for n, t in tensors.items() if n.startswith(OPTIMIZER)}
            optimizers.load_state(k, state)
    return manifest


def adopt_best(resumed: Path, output_dir: Path, best_step: int | None) -> None:
    """Copies the best checkpoint of the run that `resumed` belongs to, where it is resumed into another folder.

    Raises:
        ValueError: that run no longer has it.
    """
    if best_step is None or read_manifest(checkpoint_path(output_dir, best_step)) is not None:
        return
    target = checkpoint_path(output_dir, best_step)
    best = resumed.parent / target.name
    if read_manifest(best) is None:
        raise ValueError(
            f"Expected the best checkpoint of the run, {best.name}, beside {resumed}, found none that is complete. "
            "Resume from a checkpoint that has it beside it, or start anew."
        )
    aside = target.with_name(f"tmp-{target.name}")
    shutil.copytree(best, aside, dirs_exist_ok=True)
    aside.rename(target)


def _remove(path: Path) -> None:
    """A folder that is half deleted when the process dies has no checkpoint's name any more."""
    aside = path.with_name(f"tmp-{path.name}")
    if aside.exists():
        shutil.rmtree(aside)
    path.rename(aside)
    shutil.rmtree(aside)


def rotate(output_dir: Path, keep: int, best_step: int | None) -> None:
    """Deletes all checkpoints but the newest `keep` and the best one, and what an interrupted write left."""
    for leftover in (output_dir / "checkpoints").glob("tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    spared = [path for path in complete_checkpoints(output_dir) if path.suffix != ".old"][-keep:]
    if best_step is not None:
        spared.append(checkpoint_path(output_dir, best_step))
    for path in (output_dir / "checkpoints").glob("checkpoint-*"):
        if path not in spared:
            _remove(path)


def first_difference(expected: dict[str, Any], got: dict[str, Any]) -> str | None:
    """The first key whose values differ, as a sentence; None where there is none."""
    for key in sorted(expected.keys() | got.keys()):
        if expected.get(key) != got.get(key):
            return f"{key} was {expected.get(key)!r} and is now {got.get(key)!r}"
    return None
