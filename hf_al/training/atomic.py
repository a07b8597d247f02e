"""Writes that a full disk, a signal or a kill cannot leave half done: aside, to the disk, then under the name."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CONFIG = "config.json"  # a folder without it is no model to transformers


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """The file holds the old text or the new one, never a part."""
    aside = path.with_name(path.name + ".tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        fsync(aside)
        aside.replace(path)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


@contextmanager
def removed_if_broken(folder: Path) -> Iterator[Path]:
    """A new, empty folder to write into, which is removed where that fails, so that a full disk is not left full."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def export(folder: Path) -> Iterator[Path]:
    """Yields a folder to write a model and all that belongs to it into; moves its files to `folder` when all is there.

    config.json goes first and comes last: whenever the moving stops, `folder` holds the old model, the new one, or
    nothing that could be taken for a model.
    """
    with removed_if_broken(folder / "export.tmp") as aside:
        yield aside
        for path in aside.rglob("*"):
            fsync(path)
        (folder / CONFIG).unlink(missing_ok=True)
        fsync(folder)
        for stale in folder.glob("model*.safetensors*"):  # transformers prefers one file to several parts
            if not (aside / stale.name).exists():
                stale.unlink()
        for path in sorted(aside.iterdir(), key=lambda path: path.name == CONFIG):
            target = folder / path.name
            if path.name == CONFIG:
                fsync(folder)
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
        aside.rmdir()
        fsync(folder)


def disk_error(error: BaseException) -> str | None:
    """Why the disk refused, in the system's words; None for an error of another kind.

    safetensors and tokenizers write in Rust and raise exceptions of their own, with the number in the text.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    found = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(found[1])) if found else None
