"""What a module that serves a framework says where that is missing or too old."""

import importlib
import re

NAMES = {"jax": "JAX", "torch": "PyTorch", "transformers": "transformers"}


def need(module: str, framework: str, least: str) -> None:
    """Raises ImportError, of one sentence, if `module` cannot use the `framework` that is here."""
    wanted = f"{module} needs {NAMES.get(framework, framework)} {least} or newer"
    try:
        found = importlib.import_module(framework).__version__
    except ModuleNotFoundError as error:
        if error.name != framework:
            raise
        said = f"{wanted}: pip install '{framework}>={least}'"
        raise ModuleNotFoundError(said, name=framework) from None
    if _numbers(found) < _numbers(least):
        said = f"{wanted}, found {found}: pip install -U '{framework}>={least}'"
        raise ImportError(said, name=framework)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])
