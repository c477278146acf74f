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


def channels(inputs, names):
    """Raise ValueError for what is neither one of ``names`` nor a mean and a standard deviation of each channel."""
    if isinstance(inputs, dict) and set(inputs) == {"mean", "std"}:
        for part, least in (("mean", 0), ("std", 0.001)):
            values = inputs[part] if isinstance(inputs[part], list | tuple) else ()
            plain = [n for n in values if isinstance(n, int | float) and not isinstance(n, bool) and least <= n <= 1]
            if not len(plain) == len(values) == 3:
                raise ValueError(
                    f"inputs {part} {inputs[part]!r}: give three numbers from {least} to 1, for red, green and blue; "
                    "divide those in units of 0 to 255 by 255"
                )
    elif not isinstance(inputs, str) or inputs not in names:
        own = "{'mean': [r, g, b], 'std': [r, g, b]} in units of 0 to 1"
        raise ValueError(f"inputs {inputs!r}: choose {', '.join(names)} or {own}{nearest(inputs, names)}")


def nearest(value, choices):
    """For error messages: " (did you mean ...?)" if a choice is close to the value, otherwise an empty string."""
    close = difflib.get_close_matches(str(value), choices, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
