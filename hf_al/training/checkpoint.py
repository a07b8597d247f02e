"""Checkpoints by block name: safetensors and json, nothing pickled.

    checkpoints/checkpoint-00000120/block-000.safetensors   weights and optimizer tensors of block 0
                                    history.json            what was logged so far
                                    manifest.json           step, progress, what the run is; size and sha256 of
                                                            every file, and its own

A checkpoint is written under another name and renamed when it is complete, so that a kill at any moment leaves either
the old state or the new one. A folder does not count as a checkpoint unless its manifest finds all its files.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load, save_file
from torch import nn

from ..atomic import disk_error, fsync, removed_if_broken, write_atomically
from ..loading import difference
from ..parallel.alone import ALONE, Alone
from .optim import BlockOptimizers

logger = logging.getLogger(__name__)

FORMAT = 3
MANIFEST, HISTORY = "manifest.json", "history.json"
WEIGHT, OPTIMIZER = "weight/", "optimizer/"
NAME = re.compile(r"checkpoint-\d{8,}(\.old)?")


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` optimizer steps."""
    return output_dir / "checkpoints" / f"checkpoint-{step:08d}"


class Damaged(ValueError):
    """A checkpoint that differs from what was written; `reason` says how."""

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(f"Expected an intact checkpoint, got damage: {reason}. Resume from an earlier checkpoint.")


def _entry(file: Path) -> dict[str, Any]:
    """The manifest's entry for a file."""
    with file.open("rb") as bytes_of_file:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(bytes_of_file, "sha256").hexdigest()}


def _own_sha256(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def save_checkpoint(
    path: Path,
    blocks: dict[int, nn.Module],
    optimizers: BlockOptimizers,
    manifest: dict[str, Any],
    history: list[dict[str, Any]],
    transport: Alone = ALONE,
) -> bool:
    """Writes weights and optimizer state of `blocks`; the main process then writes history and manifest, and gives the
    folder its name.

    Every stage writes into the folder that the first one creates, and passes on the list of its files. Returns whether
    this process was the main one, so that the checkpoint is complete.

    Raises:
        OSError: a disk that is full or refuses, also as an exception of the library that writes; the incomplete
            checkpoint is removed.
    """
    written: list[dict[str, Any]] | None
    if transport.replica > 0:  # the first replica has the same tensors
        return False
    with _folder(path.with_name(f"tmp-{path.name}"), transport) as aside:
        files = {}
        for k, block in blocks.items():
            tensors = {WEIGHT + name: tensor for name, tensor in block.state_dict().items()}
            tensors |= {OPTIMIZER + name: tensor for name, tensor in optimizers.state(k).items()}
            file = aside / f"block-{k:03d}.safetensors"
            save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, file)
            fsync(file)
            files[file.name] = _entry(file)
        written = transport.pass_on([files])
        if written is None:
            return False
        write_atomically(aside / HISTORY, json.dumps(history))
        files = {name: file for of_stage in written for name, file in of_stage.items()}
        files[HISTORY] = _entry(aside / HISTORY)
        whole = {"format": FORMAT, **manifest, "files": files}
        whole = json.loads(json.dumps(whole))  # as it will be read: keys are strings
        write_atomically(aside / MANIFEST, json.dumps({**whole, "sha256": _own_sha256(whole)}, indent=1))
        fsync(aside)
        replaced = path.with_name(path.name + ".old")
        if path.exists():  # the same step again: until the new one has its name, the old one is kept under another
            shutil.rmtree(replaced, ignore_errors=True)
            path.rename(replaced)
        aside.rename(path)
    fsync(path.parent)
    if replaced.exists():
        _remove(replaced)
    return True


@contextmanager
def _folder(aside: Path, transport: Alone) -> Iterator[Path]:
    """The folder that all stages write into: the first one creates it, empty, and then tells the others."""
    try:
        if transport.is_first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        transport.pass_on([])
        yield aside
    except BaseException as error:
        if isinstance(error, Exception):
            transport.failed(error)  # before the others miss the folder
        shutil.rmtree(aside, ignore_errors=True)
        raise


@contextmanager
def writing(what: str, output_dir: Path) -> Iterator[None]:
    """Turns the error of a disk that refuses a write into one message for the user.

    Raises:
        OSError: what could not be written, why, and from which step the run can continue.
    """
    try:
        yield
    except Exception as error:  # the libraries that write raise exceptions of their own
        reason = disk_error(error)
        if reason is None:
            raise
        kept = complete_checkpoints(output_dir)
        step = read_manifest(kept[-1])["progress"]["step"] if kept else 0  # type: ignore[index]
        raise OSError(
            f"Could not write {what} to {output_dir}: {reason}. Make room there, or make it writable; then "
            f"--resume_from_checkpoint last continues from step {step}."
        ) from None


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a complete checkpoint, else None. Looks at the sizes of the other files, not into them."""
    manifest = _read_json(path / MANIFEST)
    return manifest if _is_complete(path, manifest) else None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _is_complete(path: Path, manifest: Any) -> bool:
    try:
        sizes = all((path / name).stat().st_size == file["size"] for name, file in manifest["files"].items())
        return sizes and manifest["sha256"] == _own_sha256(manifest)
    except (OSError, KeyError, AttributeError, TypeError):
        return False


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return [path for path in _by_step(output_dir) if read_manifest(path) is not None]


def _by_step(output_dir: Path) -> list[Path]:
    """All folders named as checkpoints, oldest first; a replaced one (.old) comes before its replacement."""
    found = [p for p in (output_dir / "checkpoints").glob("checkpoint-*") if NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: (p.stem, p.suffix != ".old"))


def candidates(name: str, output_dir: Path) -> list[Path]:
    """Where a run may continue, best first. `last`: all folders named as checkpoints; a folder: that folder.

    Raises:
        ValueError: a folder that is not a complete checkpoint.
    """
    if name != "last":
        try:
            open_checkpoint(Path(name))
        except Damaged:
            raise ValueError(
                f"Expected a complete checkpoint (manifest.json and its block files) in {name}, found none. "
                "Pass the folder of one, or 'last'."
            ) from None
        return [Path(name)]
    found = list(reversed(_by_step(output_dir)))
    for i, path in enumerate(found):
        if path.suffix == ".old" and not path.with_suffix("").exists():  # its replacement was never completed
            found[i] = path.rename(path.with_suffix(""))
    return found


def first_intact(paths: list[Path], fault: Callable[[Path], str | None]) -> Path | None:
    """The first of the candidates without a fault; None if there are no candidates.

    Args:
        paths: from `candidates`.
        fault: returns what is wrong with one, or None.

    Raises:
        ValueError: all of them are damaged.
    """
    found = None
    for path in paths:
        found = fault(path)
        if found is None:
            return path
        logger.warning("Skipping a damaged checkpoint: %s.", found)
    if found is not None:
        raise ValueError(
            f"Expected an intact checkpoint, got damaged ones only: {found}. Pass the folder of another "
            "one, or start in another output_dir."
        )
    return None


def _verified(path: Path, name: str, manifest: dict[str, Any]) -> bytes:
    """The bytes of a file of a checkpoint, read once."""
    try:
        found = (path / name).read_bytes()
    except OSError as error:
        raise Damaged(f"{path / name} cannot be read ({error.strerror})") from None
    if hashlib.sha256(found).hexdigest() != manifest["files"][name]["sha256"]:
        raise Damaged(f"{path / name} does not hold the bytes that were written (sha256)")
    return found


def _verified_weights(path: Path, name: str, manifest: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights in a file of a checkpoint, and never its optimizer state: two thirds of the file."""
    try:
        if _entry(path / name)["sha256"] != manifest["files"][name]["sha256"]:
            raise Damaged(f"{path / name} does not hold the bytes that were written (sha256)")
        with safe_open(path / name, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if key.startswith(WEIGHT)}  # noqa: SIM118
    except OSError as error:
        raise Damaged(f"{path / name} cannot be read ({error.strerror})") from None


def open_checkpoint(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        Damaged: it is not complete.
        ValueError: another version of hf_al wrote it.
    """
    manifest = _read_json(path / MANIFEST)
    if isinstance(manifest, dict) and "files" in manifest and manifest.get("format") != FORMAT:
        raise ValueError(
            f"Expected a checkpoint of format {FORMAT}, got format {manifest.get('format')} in {path}: another version "
            "of hf_al wrote it. Resume with that version, or start anew in another output_dir."
        )
    if not _is_complete(path, manifest):
        raise Damaged(f"{path} has no manifest.json that is whole and finds all its files")
    opened: dict[str, Any] = manifest
    return opened


def load_checkpoint(
    path: Path,
    blocks: dict[int, nn.Module],
    optimizers: BlockOptimizers | None,
    manifest: dict[str, Any] | None = None,
) -> None:
    """Loads weights, and optimizer state unless `optimizers` is None, into `blocks`; reads only their files.

    Raises:
        Damaged: a file that is missing or not as it was written; earlier blocks have already been loaded.
        ValueError: tensors that are not those of the blocks, or another format.
    """
    manifest = manifest or open_checkpoint(path)
    for k, block in blocks.items():
        file = f"block-{k:03d}.safetensors"
        if optimizers is None:
            tensors = _verified_weights(path, file, manifest)
        else:
            tensors = load(_verified(path, file, manifest))
        weights = {n.removeprefix(WEIGHT): t for n, t in tensors.items() if n.startswith(WEIGHT)}
        shapes = [{n: tuple(t.shape) for n, t in named.items()} for named in (block.state_dict(), weights)]
        other = difference(*shapes)
        if other:
            raise ValueError(
                f"Expected the weights of block {k} in {path / file}, got another model's: {other}. Resume with the "
                "model values of that run."
            )
        block.load_state_dict(weights)
        if optimizers is not None:
            state = {n.removeprefix(OPTIMIZER): t for n, t in tensors.items() if n.startswith(OPTIMIZER)}
            optimizers.load_state(k, state)


def read_history(path: Path, manifest: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """What the run had logged at a checkpoint.

    Raises:
        Damaged: the file is not as it was written.
    """
    rows: list[dict[str, Any]] = json.loads(_verified(path, HISTORY, manifest or open_checkpoint(path)))
    return rows


def adopt_best(resumed: Path, output_dir: Path, best_step: int | None) -> None:
    """Checks, while another checkpoint can still be chosen, that the best checkpoint of the run of `resumed` is intact.
    Copies it if the run continues in another folder.

    Raises:
        ValueError: that run no longer has it.
    """
    if best_step is None:
        return
    target = checkpoint_path(output_dir, best_step)
    best = target if read_manifest(target) is not None else resumed.parent / target.name
    try:
        manifest = open_checkpoint(best)
        for name in manifest["files"] if best != resumed else ():
            _verified(best, name, manifest)
    except Damaged as damage:
        raise ValueError(
            f"Expected the best checkpoint of the run, {best.name}, beside {resumed}, found none that is intact "
            f"({damage.reason}). Resume from a checkpoint that has it beside it, or start anew."
        ) from None
    if best == target:
        return
    with removed_if_broken(target.with_name(f"tmp-{target.name}")) as aside:
        shutil.copytree(best, aside, dirs_exist_ok=True)
        for file in [*aside.iterdir(), aside]:
            fsync(file)
        aside.rename(target)
    fsync(target.parent)


def _remove(path: Path) -> None:
    """Renames, then deletes: a folder that is half deleted when the process dies no longer has a checkpoint's name."""
    aside = path.with_name(f"tmp-{path.name}")
    if aside.exists():
        shutil.rmtree(aside)
    path.rename(aside)
    shutil.rmtree(aside)


def clear_leftovers(folder: Path, step: int | None = None) -> None:
    """Deletes leftovers of interrupted writes and deletions up to `step`; the first stage may be writing later ones."""
    for leftover in folder.glob("tmp-*"):
        if step is None or leftover.name <= f"tmp-checkpoint-{step:08d}.old":
            shutil.rmtree(leftover, ignore_errors=True)


def rotate(output_dir: Path, keep: int, best_step: int | None, step: int | None = None) -> None:
    """Deletes all checkpoints but the newest `keep` and the best one, and leftovers of interrupted writes.

    Args:
        output_dir: the run's folder.
        keep: how many of the newest to keep.
        best_step: the step of the best one.
        step: the run's current step. Later checkpoints date from before the run was resumed from an earlier step: they
            are deleted first, because `last` would find them.
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


def differences(expected: dict[str, Any], got: dict[str, Any]) -> list[str]:
    """One sentence for each key whose values differ, the architecture first."""
    keys = sorted(dict.fromkeys([*expected, *got]), key=lambda key: key != "model_type")
    return [
        f"{key} was {expected.get(key)!r} and is now {got.get(key)!r}"
        for key in keys
        if expected.get(key) != got.get(key)
    ]
