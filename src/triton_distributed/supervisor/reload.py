"""Which Python files of a program have changed, and whether they can be compiled."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
import warnings
from collections.abc import AsyncIterator, Iterable
from pathlib import Path


def check_available() -> None:
    """Check that files can be watched.

    Raises:
        ImportError: the package that watches them is missing.
    """
    if importlib.util.find_spec("watchfiles") is None:
        raise ImportError("watching files needs watchfiles: pip install 'triton-distributed[cli]'")


def folder_of(module: str | None) -> Path:
    """The folder of a program.

    Args:
        module: the module that has the handlers, which is not imported here; None for the program of this process.
    """
    if module is None:
        main = sys.modules["__main__"]
        spec = getattr(main, "__spec__", None)
        if spec is not None and spec.parent:  # `python -m package.module`
            module = spec.parent
        else:
            file = getattr(main, "__file__", None)
            return Path(file).resolve().parent if file else Path.cwd()
    top = module.partition(".")[0]
    for parent in [os.getcwd(), *sys.path]:
        if os.path.isdir(package := os.path.join(parent, top)) and not os.path.isfile(f"{package}.py"):
            return Path(package).resolve()
        if os.path.isfile(f"{package}.py"):
            return Path(parent or ".").resolve()
    return Path.cwd()  # The replicas say that there is no such module.


async def changes(folder: Path, stop: asyncio.Event) -> AsyncIterator[list[Path]]:
    """Yield the Python files that were written, added or removed, until `stop` is set.

    Changes that follow each other within 50 ms come together. Left out are hidden folders of tools, such as `.git` and
    `.venv`, any other virtual environment, and `__pycache__`.

    Raises:
        OSError: the folder cannot be watched.
    """
    import watchfiles

    try:
        async for found in watchfiles.awatch(folder, watch_filter=watchfiles.PythonFilter(), stop_event=stop):
            files = sorted({Path(name) for _, name in found})
            if files := [each for each in files if "site-packages" not in each.parts]:
                yield files
    except RuntimeError as error:  # The library's own errors are of this kind.
        raise OSError(str(error)) from error


def broken(files: Iterable[Path]) -> dict[Path, str]:
    """The files that cannot be compiled, each with its first error. A file that is gone is not broken."""
    found = {}
    for file in files:
        if file.suffix != ".py":
            continue
        try:
            source = file.read_bytes()
        except OSError:
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                compile(source, file, "exec", dont_inherit=True)
        except SyntaxError as error:
            found[file] = f"line {error.lineno}: {error.msg}" if error.lineno else str(error.msg)
        except (ValueError, RecursionError, MemoryError) as error:  # e.g. null bytes
            found[file] = str(error) or type(error).__name__
    return found


def named(files: Iterable[Path]) -> str:
    """Files as one short text, relative to the current directory."""
    names = [os.path.relpath(each) for each in files]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
