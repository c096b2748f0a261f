"""What a module that serves a framework says where that is missing or too old."""

import importlib
import re


def need(module: str, framework: str, least: str) -> None:
    """Raises ImportError, of one sentence, if `module` cannot use the `framework` that is here."""
    wanted = f"{module} needs {framework} {least} or newer: pip install '{framework}>={least}'"
    try:
        found = importlib.import_module(framework)
    except ModuleNotFoundError as error:
        if error.name != framework:
            raise
        raise ModuleNotFoundError(wanted, name=framework) from None
    version = found.__version__
    if _numbers(version) < _numbers(least):
        raise ImportError(f"{wanted}, got {version}", name=framework)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])
