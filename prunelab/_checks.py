"""Refusing bad settings before any work is done."""

from __future__ import annotations


def check_fields(settings: object, name: str, *rules: tuple[str, str, bool]) -> None:
    """Raise ValueError for the first field that breaks its rule, naming the field, its value and what is legal.

    Args:
        settings: what has the fields.
        name: what its user calls it.
        rules: a field's name, its legal values in words, and whether it has one of them.
    """
    for field, legal, valid in rules:
        if not valid:
            raise ValueError(f"{name}: {field} is {getattr(settings, field)!r}; it must be {legal}")


def is_count(value: object, least: int) -> bool:
    """Return whether a value is an integer, and at least so much."""
    return isinstance(value, int) and value >= least
