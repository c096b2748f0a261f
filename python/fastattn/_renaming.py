"""Functions whose errors name the arguments of another library's function that calls them."""

import functools
import re
from collections.abc import Callable
from typing import Any


def renaming(function: Callable[..., Any], names: dict[str, str]) -> Callable[..., Any]:
    """The function, whose errors say names[x] where it says x of an argument."""

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        try:
            return function(*args, **keywords)
        except (ValueError, TypeError, NotImplementedError) as error:
            said, renamed = _rename(str(error), names), type(error)
        raise renamed(said)

    return call


def _rename(text: str, names: dict[str, str]) -> str:
    return re.sub(r"(?<=`)\w+(?=[`[])|(?<=\bpass )\w+(?=\.)", lambda m: names.get(m[0], m[0]), text)
