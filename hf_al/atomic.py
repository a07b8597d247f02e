"""Writes that a full disk, a signal or a kill cannot leave half done: written aside, synced to disk, then renamed."""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from filelock import FileLock, Timeout

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CONFIG = "config.json"  # to transformers, a folder without it is not a model
# What a run writes under names that are not fixed, as patterns that match nothing of a user's own
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", f"model-{'[0-9]' * 5}-of-{'[0-9]' * 5}.safetensors")
# Folders of a repository; the first one as transformers' Trainer names it
LAST_CHECKPOINT, BEST_CHECKPOINT = "last-checkpoint", "best-checkpoint"
# The code that travels with a model
CODE = tuple(sorted(file.name for file in Path(__file__).with_name("modeling").glob("[!_]*.py")))
EXPORTS = f"export.{'[0-9a-f]' * 8}.tmp"


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


@contextmanager
def alone_at(path: Path) -> Iterator[None]:
    """Inside, nobody else is; the lock, a hidden file beside `path`, ends with the process, however that ends.

    Raises:
        ValueError: another process is.
    """
    file = path.absolute().with_name(f".{path.name}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(file).acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"Expected nobody else at work on {path}, found another process. Wait for it, or pass another name."
        ) from None
    with held:
        yield


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Inside, nobody else is in this folder; the lock leaves no file, and ends with the process, however that ends.
    Without effect where folders cannot be locked: on Windows, and on some network file systems.

    Raises:
        ValueError: another process is.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"Expected nobody else at work in {folder}, found another process. Wait for it, or pass another folder."
            ) from None
        except OSError:  # this file system does not do it
            pass
        yield
    finally:
        os.close(descriptor)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Writes `text`; the file holds the old text or the new one, never a part."""
    with replacing(path) as file:
        file.write(text)


@contextmanager
def replacing(path: Path, keep_part: bool = False) -> Iterator[TextIO]:
    """A text file to write, which gets the name `path` once it is complete and on the disk.

    Links are followed. If `path` is not a file (a device, a pipe, `/dev/stdout`), it is written to directly.

    Args:
        path: the name.
        keep_part: if writing stops halfway, keep the part beside it, under another name, and say so in the error.
    """
    if _is_stream(path):
        stream = path.open("a", encoding="utf-8")  # appends, in case a shell opened it with >>
        try:
            yield stream
        except BaseException:
            with suppress(OSError):  # a full disk refuses what is left in the buffer, once more
                stream.close()
            raise
        stream.close()
        return
    target = Path(os.path.realpath(path))
    stem = os.fsdecode(os.fsencode(target.name)[:200])  # a name has 255 bytes at most
    aside = target.with_name(f"{stem}.{secrets.token_hex(4)}.tmp")
    file = aside.open("x", encoding="utf-8")
    try:
        if target.exists():
            shutil.copymode(target, aside)
        yield file
        file.flush()
        os.fsync(file.fileno())
        file.close()
        aside.replace(target)
    except BaseException as error:
        with suppress(OSError):
            file.close()
        if keep_part:
            error.add_note(f"What was written so far is in {aside}.")
        else:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
        raise


def _is_stream(path: Path) -> bool:
    """Whether `path` is something that a rename must not replace.

    Raises:
        OSError: links that lead in a circle.
    """
    names = [path]
    while names[-1].is_symlink():
        if len(names) > 40:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        names.append(names[-1].parent / os.readlink(names[-1]))
    names_a_descriptor = any(os.path.realpath(name.parent).startswith("/proc/") for name in names)
    return names_a_descriptor or (path.exists() and not path.is_file())


@contextmanager
def removed_if_broken(folder: Path) -> Iterator[Path]:
    """A new, empty folder to write into. It is removed if that fails, so that a full disk is not left full."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def export(folder: Path) -> Iterator[Path]:
    """Yields a folder for a model and all its files; moves them to `folder` once all are written.

    The old config.json is removed first and the new one comes last: whenever the move stops, `folder` holds the old
    model, the new one, or nothing that could be taken for a model.
    """
    for leftover in folder.glob(EXPORTS):  # left by a process that died
        shutil.rmtree(leftover, ignore_errors=True)
    with removed_if_broken(folder / f"export.{secrets.token_hex(4)}.tmp") as aside:
        yield aside
        for path in aside.rglob("*"):
            if path.is_file():  # safetensors makes files that nobody but their owner may read
                path.chmod(aside.stat().st_mode & 0o666)
            fsync(path)
        (folder / CONFIG).unlink(missing_ok=True)
        fsync(folder)
        for stale in [path for pattern in WEIGHTS for path in folder.glob(pattern)]:  # one file is preferred to parts
            if not (aside / stale.name).exists():
                stale.unlink()
        for path in sorted(aside.iterdir(), key=lambda path: path.name == CONFIG):
            target = folder / path.name
            if path.name == CONFIG:
                fsync(folder)
            if target.is_symlink():  # its target may belong to something else
                target.unlink()
            elif target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
        aside.rmdir()
        fsync(folder)


def disk_error(error: BaseException) -> str | None:
    """Why the disk refused, in the system's words; None for an error of another kind.

    safetensors and tokenizers write in Rust and raise exceptions of their own, with the error number in the text.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    found = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(found[1])) if found else None
