"""Shares such as top-1, and what is lost of them."""


def subtract(one: float, other: float) -> float:
    """Return `one - other` without its rounding error, so that 0.91 - 0.90 is not over a limit of 0.01."""
    return round(float(one) - float(other), 9)
