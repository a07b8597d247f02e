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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load, save, save_file
from torch import nn

from ..atomic import disk_error, fsync, write_atomically
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


def block_file(k: int) -> str:
    """The name of block k's file in a checkpoint."""
    return f"block-{k:03d}.safetensors"


class CannotResume(ValueError):
    """A checkpoint that this run cannot go on from: it is damaged, or that of another run."""


class Damaged(CannotResume):
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

    Every stage writes into the folder that the first one creates, and passes on the list of its files; if not all
    processes find the main one's folder, they send it their files. Returns whether this process was the main one, so
    that the checkpoint is complete.

    Raises:
        OSError: a disk that is full or refuses, also as an exception of the library that writes; the incomplete
            checkpoint is removed.
    """
    written: list[dict[str, Any]] | None
    if transport.replica > 0:  # the first replica has the same tensors
        return False
    transport.wait_sent()  # the files of the checkpoint before
    with _folder(path.with_name(f"tmp-{path.name}"), transport) as aside:
        files = {}
        for k, block in blocks.items():
            tensors = {WEIGHT + name: tensor for name, tensor in block.state_dict().items()}
            tensors |= {OPTIMIZER + name: tensor for name, tensor in optimizers.state(k).items()}
            tensors = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
            if transport.shares_folder or transport.is_main:
                save_file(tensors, aside / block_file(k))
                fsync(aside / block_file(k))
                files[block_file(k)] = _entry(aside / block_file(k))
            else:
                content = save(tensors)
                transport.send_bytes(content, [transport.main])
                files[block_file(k)] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        written = transport.pass_on([files])
        if written is None:
            return False
        if not transport.shares_folder:
            _fetch(aside, written, transport)
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
        remove(replaced)
    return True


def _fetch(folder: Path, written: list[dict[str, Any]], transport: Alone) -> None:
    """The main process writes the files that the other stages have sent; `written`: the entries of each stage."""
    for stage, files in enumerate(written[:-1]):
        for name, entry in files.items():
            (folder / name).write_bytes(transport.receive_bytes(entry["size"], transport.first_of(stage)))
            fsync(folder / name)


@contextmanager
def _folder(aside: Path, transport: Alone) -> Iterator[Path]:
    """The folder that all stages write into: the first one creates it, empty, and then tells the others. The main
    process does if it is the only one to write."""
    try:
        creates = transport.is_first if transport.shares_folder else transport.is_main
        if creates:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        if transport.shares_folder:
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
    return [path for path in by_step(output_dir) if read_manifest(path) is not None]


def by_step(output_dir: Path) -> list[Path]:
    """All folders named as checkpoints, oldest first; a replaced one (.old) comes before its replacement."""
    found = [p for p in (output_dir / "checkpoints").glob("checkpoint-*") if NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: (p.stem, p.suffix != ".old"))


def verified(path: Path, name: str, manifest: dict[str, Any], sent: bytes | None = None) -> bytes:
    """The bytes of a file of a checkpoint, read once; or those that were `sent`."""
    try:
        found = (path / name).read_bytes() if sent is None else sent
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
        CannotResume: another version of hf_al wrote it.
    """
    manifest = _read_json(path / MANIFEST)
    if isinstance(manifest, dict) and "files" in manifest and manifest.get("format") != FORMAT:
        raise CannotResume(
            f"Expected a checkpoint of format {FORMAT}, got format {manifest.get('format')} in {path}: another version "
            "of hf_al wrote it. Resume with that version, or start anew in another output_dir."
        )
    if not _is_complete(path, manifest):
        raise Damaged(f"{path} has no manifest.json that is whole and finds all its files")
    opened: dict[str, Any] = manifest
    return opened


def load_checkpoint(path: Path, blocks: dict[int, nn.Module], optimizers: BlockOptimizers | None) -> None:
    """Loads weights, and optimizer state unless `optimizers` is None, into `blocks`; reads only their files.

    Raises:
        Damaged: a file that is missing or not as it was written; earlier blocks have already been loaded.
        CannotResume: tensors that are not those of the blocks, or another format.
    """
    manifest = open_checkpoint(path)
    for k, block in blocks.items():
        load_block(path, k, block, optimizers, manifest)


def load_block(
    path: Path,
    k: int,
    block: nn.Module,
    optimizers: BlockOptimizers | None,
    manifest: dict[str, Any],
    sent: bytes | None = None,
) -> None:
    """`load_checkpoint` for block k, from its file or from what was `sent` of it."""
    file = block_file(k)
    if optimizers is None and sent is None:
        tensors = _verified_weights(path, file, manifest)
    else:
        tensors = load(verified(path, file, manifest, sent))
    weights = {n.removeprefix(WEIGHT): t for n, t in tensors.items() if n.startswith(WEIGHT)}
    shapes = [{n: tuple(t.shape) for n, t in named.items()} for named in (block.state_dict(), weights)]
    other = difference(*shapes)
    if other:
        raise CannotResume(
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
    rows: list[dict[str, Any]] = json.loads(verified(path, HISTORY, manifest or open_checkpoint(path)))
    return rows


def remove(path: Path) -> None:
    """Renames, then deletes: a folder that is half deleted when the process dies no longer has a checkpoint's name."""
    aside = path.with_name(f"tmp-{path.name}")
    if aside.exists():
        shutil.rmtree(aside)
    path.rename(aside)
    shutil.rmtree(aside)


def differences(expected: dict[str, Any], got: dict[str, Any], words: str = "{} was {!r} and is now {!r}") -> list[str]:
    """One sentence for each key whose values differ, the architecture first; `words` are for key and values."""
    keys = sorted(dict.fromkeys([*expected, *got]), key=lambda key: key != "model_type")
    return [words.format(key, expected.get(key), got.get(key)) for key in keys if expected.get(key) != got.get(key)]
