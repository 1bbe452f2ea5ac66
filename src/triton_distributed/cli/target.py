"""`module:object` on the command line, and how it is resolved to the function that serves requests."""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any

from triton_distributed.api.declarations import Declaration, declaration_of, declared_in
from triton_distributed.cli.failure import USAGE, Failure, one_line
from triton_distributed.config import variable
from triton_distributed.observe.log_format import line_of
from triton_distributed.system.first_process import Ended


class Target:
    """The location of handlers: a module, and a dotted path to an object in it.

    Args:
        text: `module:object`, or `module` for all functions in it that `@trd.serve` has declared; both parts may be
            dotted.

    Raises:
        Failure: the text does not have that form.
    """

    def __init__(self, text: str) -> None:
        module, mark, path = text.partition(":")
        parts = [*module.split("."), *(path.split(".") if mark else ())]
        if not all(part.isidentifier() for part in parts) or module.endswith(".py"):
            known = module.removesuffix(".py").replace(os.sep, ".").strip(".")
            path = path.replace(":", ".")
            guess = (f"{known}:{path}" if path else known) if known else "worker:generate"
            raise Failure(f"{text!r} is neither module nor module:object, e.g. {guess}", USAGE)
        self.text = text
        self.module = module
        self.path = path.split(".") if mark else []

    def load(self) -> ModuleType:
        """Import the module. The current directory is searched first.

        Raises:
            Failure: there is no such module, or the import failed and its traceback was printed.
        """
        folder = os.getcwd()
        if sys.path[:1] != [folder]:
            sys.path.insert(0, folder)
        try:
            return importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{self.module}.".startswith(f"{error.name}."):
                parent = error.name.rpartition(".")[0]
                no_package = parent in sys.modules and not hasattr(sys.modules[parent], "__path__")
                why = f": {parent!r} is not a package" if no_package else f" in {folder} or on Python's path"
                raise Failure(f"there is no module {error.name!r}{why}") from error
            raise _raised(f"importing {self.module!r}", error) from error
        except Ended:  # A signal ends this process; the module did not exit by itself.
            raise
        except (Exception, SystemExit) as error:
            raise _raised(f"importing {self.module!r}", error) from error

    def declared(self, module: ModuleType) -> list[tuple[Callable[..., Any], Declaration]]:
        """Return the handlers that `@trd.serve` has declared: in the module, or in the class or object that is named.

        A class is instantiated without arguments. The list is empty if no handler is declared.

        Raises:
            Failure: there is no such object, or the class could not be instantiated.
        """
        if not self.path:
            found = declared_in(vars(module))
        else:
            target = self._find(module)
            if declaration_of(target) is not None:
                found = [target]
            elif not declared_in(dict(inspect.getmembers_static(target))):
                found = []
            else:
                owner = _instance(target, self.text) if isinstance(target, type) else target
                found = [
                    getattr(owner, name) for name, each in inspect.getmembers_static(owner) if declaration_of(each)
                ]
        return [(each, known) for each in found if (known := declaration_of(each)) is not None]

    def owners(self, module: ModuleType) -> list[str]:
        """The classes of the module that have declared methods, each as a target of the command line."""
        return [
            f"{self.module}:{name}"
            for name, each in vars(module).items()
            if isinstance(each, type) and declared_in(dict(inspect.getmembers_static(each)))
        ]

    def handler(self, module: ModuleType) -> Callable[..., Any]:
        """Return the function to serve.

        A class is instantiated without arguments if it is the object itself, or if the path continues to one of its
        instance methods. If the object is not a function, its `generate` method serves; without one, the object itself
        serves if it is callable.

        Raises:
            Failure: there is no such object, it cannot be called, or the class could not be instantiated.
        """
        found = self._find(module)
        way = self.text
        made = isinstance(found, type)
        if made:
            found = _instance(found, way)
        if not inspect.isroutine(found) and callable(method := getattr(found, "generate", None)):
            return method  # type: ignore[no-any-return]
        if not callable(found):
            what = "has neither generate nor __call__" if made else f"cannot be called: {_what(found)}"
            raise Failure(f"{way} {what}")
        return found  # type: ignore[no-any-return]

    def _find(self, module: ModuleType) -> Any:
        """The object that the path names."""
        found: Any = module
        way = self.module + ":"
        for name in self.path:
            if isinstance(found, type) and inspect.isfunction(inspect.getattr_static(found, name, None)):
                found = _instance(found, way)
            try:
                found = getattr(found, name)
            except AttributeError:
                close = difflib.get_close_matches(name, dir(found), 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise Failure(f"{way.rstrip(':')} has no {name!r}{hint}") from None
            way += name if way.endswith(":") else f".{name}"
        return found


def _instance(kind: type, way: str) -> Any:
    try:
        inspect.signature(kind).bind()
    except TypeError as error:
        raise Failure(f"{way} cannot be made without arguments: {error}; serve an instance of it instead") from None
    except ValueError:
        pass  # A builtin may have no signature.
    try:
        return kind()
    except Ended:
        raise
    except (Exception, SystemExit) as error:
        raise _raised(f"{way}()", error) from error


def _what(found: object) -> str:
    return f"it is a {'module' if isinstance(found, ModuleType) else type(found).__name__}"


def _raised(what: str, error: BaseException) -> Failure:
    """Print the traceback of the user's own code, which one line cannot show, and return the failure."""
    trace = error.__traceback__
    while trace is not None and _is_not_theirs(trace):
        trace = trace.tb_next
    text = "".join(traceback.format_exception(type(error), error, trace)).rstrip("\n")
    print(line_of(variable("TRD_LOG_FORMAT"), text, logging.ERROR), file=sys.stderr)
    return Failure(f"{what} failed: {one_line(f'{type(error).__name__}: {error}')}")


def _is_not_theirs(trace: TracebackType) -> bool:
    file = trace.tb_frame.f_code.co_filename
    return file in (__file__, importlib.__file__) or file.startswith("<frozen importlib")
