"""How many rows of each file a mix by weights has. Knows nothing about rows."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from parts.prompt_files import InputError

MOST = 10**9


def parse_weights(given: Sequence[str], paths: Sequence[Path]) -> dict[Path, Fraction]:
    """Returns the weight of each file, in the order of `paths`; empty if none is given.

    Args:
        given: "PATH=3" or "PATH=0.5" for each of the files.
        paths: The files.

    Raises:
        InputError: If a weight is no positive number, or a file has none or two.
    """
    weights: dict[Path, Fraction] = {}
    for each in given:
        name, _, amount = each.rpartition("=")
        path = Path(name)
        if path not in paths or path in weights:
            raise InputError(f"found --weights {each}, expected PATH=W once for each of --data_path; correct PATH")
        digits = amount.replace(".", "", 1)
        weight = Fraction(amount) if digits.isascii() and digits.isdigit() else Fraction(0)
        if not 0 < weight <= MOST:
            raise InputError(f"found --weights {each}, expected a number above 0 such as 3 or 0.5; correct it")
        weights[path] = weight
    missing = [str(path) for path in paths if path not in weights]
    if given and missing:
        raise InputError(f"found no weight for {missing[0]}, expected one for each of --data_path; add {missing[0]}=1")
    return {path: weights[path] for path in paths} if given else {}


def rows_by_weight(weights: Mapping[Path, Fraction], available: Mapping[Path, int], total: int | None) -> list[int]:
    """Returns how many rows of each file a mix has: its share of the total, rounded so that the sum is the total.

    Args:
        weights: Weight of each file.
        available: Rows that each file has.
        total: Rows of the mix; None for the most that the files allow.

    Raises:
        InputError: If a file has too few rows for the total.
    """
    whole = sum(weights.values())
    most = min(math.floor(available[path] * whole / weight) for path, weight in weights.items())
    rows = _shares(weights, most if total is None else total)
    for path, wanted in zip(weights, rows, strict=True):
        if wanted > available[path]:
            found = f"found {available[path]} different rows in {path}, expected {wanted} for its weight in {total}"
            raise InputError(f"{found}; at most {most} rows can be mixed: lower --rows or its weight")
    empty = [str(path) for path, count in zip(weights, rows, strict=True) if not count]
    if empty:
        raise InputError(f"found no row of {empty[0]} in a mix of {sum(rows)}, expected one at least; raise its weight")
    return rows


def _shares(weights: Mapping[Path, Fraction], total: int) -> list[int]:
    """Returns whole numbers in these proportions: what rounding down leaves goes to the largest remainders."""
    whole = sum(weights.values())
    exact = [total * weight / whole for weight in weights.values()]
    rows = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: (rows[index] - exact[index], index))
    for index in by_remainder[: total - sum(rows)]:
        rows[index] += 1
    return rows
