"""Checks of single values, whose errors name the value, the choices and the nearest of them."""

import difflib
import numbers


def choice(field, value, choices):
    """``value`` if it is one of the choices, else a ValueError that names them and the nearest."""
    if isinstance(value, str) and value in choices:
        return value
    raise ValueError(f"{field} {value!r}: choose {', '.join(choices)}{nearest(value, choices)}")


def whole(field, value, least=0, most=2**32 - 1):
    """``value`` as an int if it is a whole number within these bounds, else a TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{field} {value!r}: give a whole number, {least} or more")
    if not least <= value <= most:
        raise ValueError(f"{field} {value!r}: choose a whole number from {least} to {most}")
    return int(value)


def divisors(count):
    """The divisors of a whole number, for error messages: "1, 2, 4"."""
    return ", ".join(str(number) for number in range(1, count + 1) if count % number == 0)


def divisor(field, value, total, words):
    """``value`` as an int if it divides the total, else a TypeError or ValueError; ``words``: what the total is."""
    if not whole(field, value) or total % value:
        raise ValueError(f"{field} {value}: choose a divisor of {words} of {total}: {divisors(total)}")
    return int(value)


def nearest(value, choices):
    """For error messages: " (did you mean ...?)" if a choice is close to the value, otherwise an empty string."""
    close = difflib.get_close_matches(str(value), choices, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
