"""Checkpoints by block name: safetensors and json, nothing pickled.

    checkpoints/checkpoint-00000120/block-000.safetensors   weights and optimizer tensors of block 0
                                    manifest.json           step, progress, what the run is; size and sha256 of
                                                            every file, and its own

A checkpoint is written beside its place and renamed when it is whole, so that a kill at any moment leaves either the
old state or the new one. One without a manifest that finds all its files is no checkpoint.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from ..loading import difference, read_header
from ..parallel.transport import ALONE, Alone
from .atomic import disk_error, fsync, removed_if_broken
from .atomic import write_atomically as write_atomically
from .optim import BlockOptimizers

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
WEIGHT, OPTIMIZER = "weight/", "optimizer/"


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` optimizer steps."""
    return output_dir / "checkpoints" / f"checkpoint-{step:08d}"


def _sha256(file: Path) -> str:
    with file.open("rb") as bytes_of_file:
        return hashlib.file_digest(bytes_of_file, "sha256").hexdigest()


def _own_sha256(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def save_checkpoint(
    path: Path,
    blocks: dict[int, nn.Module],
    optimizers: BlockOptimizers,
    manifest: dict[str, Any],
    transport: Alone = ALONE,
) -> bool:
    """Writes weights and optimizer state of `blocks`; the last stage then the manifest, and gives the folder its name.

    Every stage writes into the folder that the first one makes; what it wrote goes forward. Returns whether this stage
    was the last, so that the checkpoint is there.

    Raises:
        OSError: a disk that is full or refuses, also as an exception of the library that writes; nothing is left of
            what was begun.
    """
    written: list[dict[str, Any]] | None
    with _folder(path.with_name(f"tmp-{path.name}"), transport) as aside:
        files = {}
        for k, block in blocks.items():
            tensors = {WEIGHT + name: tensor for name, tensor in block.state_dict().items()}
            tensors |= {OPTIMIZER + name: tensor for name, tensor in optimizers.state(k).items()}
            file = aside / f"block-{k:03d}.safetensors"
            save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, file)
            fsync(file)
            files[file.name] = {"size": file.stat().st_size, "sha256": _sha256(file)}
        written = transport.pass_on([files])
        if written is None:
            return False
        files = {name: file for of_stage in written for name, file in of_stage.items()}
        whole = json.loads(json.dumps({**manifest, "files": files}))  # as it will be read: keys are strings
        write_atomically(aside / MANIFEST, json.dumps({**whole, "sha256": _own_sha256(whole)}, indent=1))
        fsync(aside)
        replaced = path.with_name(path.name + ".old")
        if path.exists():  # the same step again: until the new one has its name, the old one is found under another
            shutil.rmtree(replaced, ignore_errors=True)
            path.rename(replaced)
        aside.rename(path)
    fsync(path.parent)
    if replaced.exists():
        _remove(replaced)
    return True


@contextmanager
def _folder(aside: Path, transport: Alone) -> Iterator[Path]:
    """The folder that all stages write into: the first one makes it, empty, and then tells the others."""
    try:
        if transport.is_first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        transport.pass_on([])
        yield aside
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


@contextmanager
def writing(what: str, output_dir: Path) -> Iterator[None]:
    """Turns the error of a disk that refuses a write into one message for the user.

    Raises:
        OSError: what could not be written, why, and where the run can go on.
    """
    try:
        yield
    except Exception as error:  # the libraries that write have exceptions of their own
        reason = disk_error(error)
        if reason is None:
            raise
        kept = complete_checkpoints(output_dir)
        step = read_manifest(kept[-1])["progress"]["step"] if kept else 0  # type: ignore[index]
        raise OSError(
            f"Could not write {what} to {output_dir}: {reason}. Make room there, or make it writable; then "
            f"--resume_from_checkpoint last goes on from step {step}."
        ) from None


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a complete checkpoint, else None. Looks at the sizes of the other files, not into them."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        complete = all((path / name).stat().st_size == file["size"] for name, file in manifest["files"].items())
        complete = complete and manifest["sha256"] == _own_sha256(manifest)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return manifest if complete else None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, down to the last bit; None where it is intact."""
    manifest = read_manifest(path)
    if manifest is None:
        return f"{path} has no manifest.json that is whole and finds all its files"
    for name, file in manifest["files"].items():
        try:
            if _sha256(path / name) != file["sha256"]:
                return f"{path / name} does not hold the bytes that were written (sha256)"
        except OSError as error:
            return f"{path / name} cannot be read ({error.strerror})"
    return None


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return [path for path in _by_step(output_dir) if read_manifest(path) is not None]


def _by_step(output_dir: Path) -> list[Path]:
    """All that is named as a checkpoint, oldest first; before that of the same step what it was to replace."""
    return sorted((output_dir / "checkpoints").glob("checkpoint-*"), key=lambda p: (p.stem, p.suffix != ".old"))


def find_checkpoint(name: str, output_dir: Path) -> Path | None:
    """`last` -> the newest intact checkpoint, or None where none was ever written; a folder -> that folder.

    Raises:
        ValueError: a folder that is not a complete checkpoint, or `last` where every checkpoint is damaged.
    """
    if name != "last":
        if read_manifest(Path(name)) is None:
            raise ValueError(
                f"Expected a complete checkpoint (manifest.json and its block files) in {name}, found none. "
                "Pass the folder of one, or 'last'."
            )
        return Path(name)
    found = None
    for path in reversed(_by_step(output_dir)):
        found = damage(path)
        if found is None:
            lonely = path.suffix == ".old" and not path.with_suffix("").exists()  # its replacement never came
            return path.rename(path.with_suffix("")) if lonely else path
        logger.warning("A damaged checkpoint is passed over: %s.", found)
    if found is not None:
        raise ValueError(f"Expected an intact checkpoint, got damaged ones only: {found}. Start in another output_dir.")
    return None


def load_checkpoint(path: Path, blocks: dict[int, nn.Module], optimizers: BlockOptimizers | None) -> dict[str, Any]:
    """Loads weights, and optimizer state where wanted, into `blocks`; returns the manifest.

    Raises:
        ValueError: a damaged file, or tensors that are not the blocks' own; `blocks` are as they were.
    """
    found = damage(path)
    if found is not None:
        raise ValueError(f"Expected an intact checkpoint, got damage: {found}. Resume from an earlier checkpoint.")
    for k, block in blocks.items():
        file = path / f"block-{k:03d}.safetensors"
        saved = {n.removeprefix(WEIGHT): shape for n, shape in read_header(file).items() if n.startswith(WEIGHT)}
        other = difference({n: tuple(t.shape) for n, t in block.state_dict().items()}, saved)
        if other:
            raise ValueError(
                f"Expected the weights of block {k} in {file}, got another model's: {other}. Resume with the model "
                "values of that run."
            )
    for k, block in blocks.items():
        tensors = load_file(path / f"block-{k:03d}.safetensors")
        block.load_state_dict({n.removeprefix(WEIGHT): t for n, t in tensors.items() if n.startswith(WEIGHT)})
        if optimizers is not None:
            state = {n.removeprefix(OPTIMIZER): t for n, t in tensors.items() if n.startswith(OPTIMIZER)}
            optimizers.load_state(k, state)
    manifest = read_manifest(path)
    assert manifest is not None
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
    with removed_if_broken(target.with_name(f"tmp-{target.name}")) as aside:
        shutil.copytree(best, aside, dirs_exist_ok=True)
        for file in [*aside.iterdir(), aside]:
            fsync(file)
        aside.rename(target)
    fsync(target.parent)


def _remove(path: Path) -> None:
    """A folder that is half deleted when the process dies has no checkpoint's name any more."""
    aside = path.with_name(f"tmp-{path.name}")
    if aside.exists():
        shutil.rmtree(aside)
    path.rename(aside)
    shutil.rmtree(aside)


def clear_leftovers(folder: Path, step: int | None = None) -> None:
    """Deletes what an interrupted write or deletion left; of later steps than `step`, the first stage is at it now."""
    for leftover in folder.glob("tmp-*"):
        if step is None or leftover.name <= f"tmp-checkpoint-{step:08d}.old":
            shutil.rmtree(leftover, ignore_errors=True)


def rotate(output_dir: Path, keep: int, best_step: int | None, step: int | None = None) -> None:
    """Deletes all checkpoints but the newest `keep` and the best one, and what an interrupted write left.

    Args:
        output_dir: the run's folder.
        keep: how many of the newest are kept.
        best_step: the step of the best one.
        step: the run's present step. Later checkpoints are of a run that went another way, before it was resumed from
            an earlier step: they go first, or `last` would find them.
    """
    clear_leftovers(output_dir / "checkpoints", step)
    spared = [path for path in complete_checkpoints(output_dir) if path.suffix != ".old"]
    if step is not None:
        spared = [path for path in spared if path <= checkpoint_path(output_dir, step)]
    spared = spared[-keep:]
    if best_step is not None:
        spared.append(checkpoint_path(output_dir, best_step))
    for path in reversed(_by_step(output_dir)):
        if path not in spared:
            _remove(path)


def first_difference(expected: dict[str, Any], got: dict[str, Any]) -> str | None:
    """The first key whose values differ, as a sentence, the architecture before all; None where there is none."""
    for key in sorted(expected.keys() | got.keys(), key=lambda key: (key != "model_type", key)):
        if expected.get(key) != got.get(key):
            return f"{key} was {expected.get(key)!r} and is now {got.get(key)!r}"
    return None
