"""Checks shared by the configuration classes; each failure is a one-line UserError that names the key."""

from __future__ import annotations

import math

from cosmos_fast.utils.errors import UserError


def require(holds: bool, message: str) -> None:
    """Raise UserError(message) unless `holds`."""
    if not holds:
        raise UserError(message)


def require_positive(section: str, values: object, *names: str) -> None:
    """Every named attribute of `values` is a finite number above zero."""
    for name in names:
        value = getattr(values, name)
        require(math.isfinite(value) and value > 0, f"{section}.{name} is {value}: set it above 0")


def require_not_negative(section: str, values: object, *names: str) -> None:
    """Every named attribute of `values` is a finite number, zero or above."""
    for name in names:
        value = getattr(values, name)
        require(math.isfinite(value) and value >= 0, f"{section}.{name} is {value}: set it to 0 or above")


def require_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    """`value` is a whole multiple of `divisor`."""
    require(value % divisor == 0, f"{name}={value} is not a multiple of {divisor_name}={divisor}: change one of them")


def require_probability(section: str, values: object, *names: str) -> None:
    """Every named attribute (a number or a tuple of numbers) lies in [0, 1]."""
    for name in names:
        value = getattr(values, name)
        for p in value if isinstance(value, tuple) else (value,):
            require(0.0 <= p <= 1.0, f"{section}.{name} is {value}: a probability lies between 0 and 1")


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """`value` is one of `choices`."""
    require(value in choices, f"{name} is {value!r}: use one of {', '.join(choices)}")
