"""Modules of a user's own, imported for what they add to the tables of objectives and architectures."""

import importlib
import importlib.util
import sys
from pathlib import Path

import yaml

from .values import names_in


def import_own(names: str | None) -> None:
    """Imports modules by name, from the working folder, too, or by file: `my_blocks`, or `here/my_blocks.py`.

    Args:
        names: comma-separated; nothing happens if None.

    Raises:
        ValueError: a module that is not there, or that fails when it is imported.
    """
    for name in names_in(names):
        if _is_imported(name):
            continue
        try:
            _import(name)
        except Exception as error:  # of any kind: it is the user's code
            raise ValueError(
                f"Could not import {name}: {type(error).__name__}: {error}. Pass --import the name of a module, or its "
                "file."
            ) from error


def _is_imported(name: str) -> bool:
    """Whether that module, or that file or a copy of it, was imported before.

    Raises:
        ValueError: a file whose module would take the place of another one.
    """
    if not name.endswith(".py"):
        return name in sys.modules
    other = sys.modules.get(Path(name).stem)
    if other is None:
        return False
    where = getattr(other, "__file__", None)
    files = [Path(path) for path in (name, where) if path is not None and Path(path).is_file()]
    if len(files) < 2 or files[0].read_bytes() != files[1].read_bytes():
        raise ValueError(
            f"Expected a file whose module is not there yet, got {name}: {Path(name).stem} is {where or 'of Python'}. "
            "Rename the file."
        )
    return True


def _import(name: str) -> None:
    if name.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module.__name__]
            raise
        return
    sys.path.insert(0, str(Path.cwd()))
    try:
        importlib.import_module(name)
    finally:
        sys.path.remove(str(Path.cwd()))


def hint(folder: Path) -> str:
    """What to pass, if the run in `folder` had imported modules; else nothing."""
    try:
        names = yaml.safe_load((folder / "training_config.yaml").read_text(encoding="utf-8"))["import_module"]
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        return ""
    return f" It was trained with a module of its own: pass --import {names}." if names else ""


def named_in(argv: list[str]) -> list[str]:
    """The values of --import on a command line."""
    found = []
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag in ("--import", "--import_module"):
            found += [value] if equals else argv[i + 1 : i + 2]
    return found
