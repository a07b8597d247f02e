"""The checkpoints in a run's folder: where the run can continue, and which of them are kept.

If other processes do not find that folder, the main process sends them the files of their blocks.
"""

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..atomic import BEST_CHECKPOINT, fsync, removed_if_broken
from ..parallel.alone import Alone
from ..parallel.placement import Placement
from .checkpoint import (
    CannotResume,
    Damaged,
    block_file,
    by_step,
    checkpoint_path,
    complete_checkpoints,
    load_block,
    open_checkpoint,
    read_manifest,
    remove,
    verified,
)
from .optim import BlockOptimizers

logger = logging.getLogger(__name__)


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
    found = list(reversed(by_step(output_dir)))
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
        CannotResume: all of them are damaged.
    """
    found = None
    for path in paths:
        found = fault(path)
        if found is None:
            return path
        logger.warning("Skipping a damaged checkpoint: %s.", found)
    if found is not None:
        raise CannotResume(
            f"Expected an intact checkpoint, got damaged ones only: {found}. Pass the folder of another "
            "one, or start in another output_dir."
        )
    return None


def manifest_of(path: Path, transport: Alone) -> dict[str, Any]:
    """The manifest of a checkpoint as the main process finds it, in every process.

    Raises:
        Damaged: it is not complete; in every process.
        ValueError: see `open_checkpoint`.
    """

    def look() -> list[Any]:
        try:
            return [open_checkpoint(path), None]
        except Damaged as damage:
            return [{}, damage.reason]

    manifest: dict[str, Any]
    manifest, damage = transport.tell(look)
    if damage:
        raise Damaged(damage)
    return manifest


def load_blocks(
    path: Path,
    manifest: dict[str, Any],
    blocks: dict[int, Any],
    optimizers: BlockOptimizers | None,
    placement: Placement,
    transport: Alone,
) -> Iterator[int]:
    """`load_checkpoint` in every process, block by block. If not all find their files, the main process sends them.

    Yields:
        The number of each block that was loaded.

    Raises:
        Damaged, CannotResume: see `load_checkpoint`.
    """
    sizes = {name: file["size"] for name, file in manifest["files"].items()}
    here = all(_size(path / block_file(k)) == sizes[block_file(k)] for k in blocks)
    if transport.shares_folder and all(transport.gather(here)):
        for k, block in blocks.items():
            load_block(path, k, block, optimizers, manifest)
            yield k
        return
    transport.connect_all()
    if transport.is_main:
        for process in range(transport.main):
            for name in map(block_file, placement.blocks(process // transport.replicas)):
                transport.send_bytes(_read(path / name, sizes[name]), [process])
                transport.wait_sent()
    damage = None
    for k, block in blocks.items():
        sent = None if transport.is_main else transport.receive_bytes(sizes[block_file(k)], transport.main)
        try:
            if damage is None:
                load_block(path, k, block, optimizers, manifest, sent)
                yield k
        except Damaged as found:
            damage = found  # the main process sends the rest, too
    if damage is not None:
        raise damage


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else -1


def _read(file: Path, size: int) -> bytes:
    """The file as it is: the receiver knows its checksum. Zeros if it cannot be read."""
    try:
        return file.read_bytes()[:size].ljust(size, b"\0")
    except OSError:
        return bytes(size)


def adopt_best(resumed: Path, output_dir: Path, best_step: int | None) -> None:
    """Checks, while another checkpoint can still be chosen, that the best checkpoint of the run of `resumed` is intact.
    Copies it if the run continues in another folder. On the Hub, the two have names of their own.

    Raises:
        CannotResume: that run no longer has it; or the other folder holds another run, which would be replaced.
    """
    if not resumed.absolute().is_relative_to(output_dir.absolute()):
        mine = open_checkpoint(resumed)["identity"]
        if any(open_checkpoint(path)["identity"] != mine for path in complete_checkpoints(output_dir)):
            raise CannotResume(
                f"Expected an output_dir without another run than that of {resumed}, got {output_dir}, which holds "
                "one. Pass another --output_dir."
            )
    if best_step is None:
        return
    target = checkpoint_path(output_dir, best_step)
    beside = resumed.parent / target.name
    known = (beside, resumed, resumed.parent / BEST_CHECKPOINT, target)
    best = next((path for path in known if _step(path) == best_step), beside)
    try:
        manifest = open_checkpoint(best)
        for name in manifest["files"] if best != resumed else ():
            verified(best, name, manifest)
    except Damaged as damage:
        raise CannotResume(
            f"Expected the best checkpoint of the run, {best.name} (on the Hub {BEST_CHECKPOINT}), beside {resumed}, "
            f"found none that is intact ({damage.reason}). Resume from a checkpoint that has it beside it, or start "
            "anew."
        ) from None
    if best == target:
        return
    with removed_if_broken(target.with_name(f"tmp-{target.name}")) as aside:
        shutil.copytree(best, aside, dirs_exist_ok=True)
        for file in [*aside.iterdir(), aside]:
            fsync(file)
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)
    fsync(target.parent)


def _step(path: Path) -> int | None:
    """The step of a checkpoint; None if it is incomplete."""
    manifest = read_manifest(path)
    step: int | None = manifest["progress"]["step"] if manifest is not None else None
    return step


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
    for path in reversed(by_step(output_dir)):
        if path not in spared:
            remove(path)
