"""Checks of static arguments. Each message: function, argument, expected, got."""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from jax_ep._src.base.errors import ConfigError
from jax_ep._src.base.options import Option

_Choice = TypeVar("_Choice", bound=Option)


class StaticChecks:
    """The checks of one public function. Their errors begin with its name."""

    def __init__(self, op: str):
        self.op = op

    def choice(
        self, kind: type[_Choice], value: Any, *, name: str, also: Sequence[str] = ()
    ) -> _Choice:
        """Returns the option that an argument names; `also` lists words that the caller handles."""
        for option in kind:
            if isinstance(value, str) and option == value:
                return option
        words = ", ".join(map(repr, (*also, *map(str, kind))))
        raise ConfigError(f"{self.op}: {name} must be one of {words}, got {value!r}")

    def integer(self, value: Any, *, minimum: int, name: str) -> int:
        """Returns a static integer."""
        is_index = hasattr(value, "__index__") and not isinstance(value, (bool, jax.Array))
        if not is_index:
            raise ConfigError(f"{self.op}: {name} must be a static integer, got {value!r}")
        number = int(value)
        if number < minimum:
            raise ConfigError(f"{self.op}: {name} must be at least {minimum}, got {number}")
        return number

    def positive_number(self, value: Any, *, name: str, or_zero: bool = False) -> float:
        """Returns a static, finite number of Python or NumPy; `or_zero` allows zero."""
        number = to_number(value)
        is_in_range = 0 < number < math.inf or (or_zero and number == 0)
        if not is_in_range:
            kind = "number of at least 0" if or_zero else "positive number"
            raise ConfigError(f"{self.op}: {name} must be a static {kind}, got {value!r}")
        return number


def to_number(value: Any) -> float:
    """Returns a static number of Python or NumPy as a float; NaN for anything else.

    An int that is too large for a float gives NaN, too.
    """
    is_number = isinstance(value, (int, float, np.integer, np.floating))
    if not is_number or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # an int that is too large
        return math.nan


def alternatives(names: Sequence[str]) -> str:
    """Joins names as in "bfloat16, float16 or float32"."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
