"""What the notebooks share: the check of their parameters cell."""

from __future__ import annotations

from collections.abc import Callable, Collection, MutableMapping
from typing import Any

from prunelab._checks import FRACTION, Legal

Values = Legal | Callable[[Any], Any] | Collection[Any]

INTERACTIVE = {"In", "Out", "exit", "quit", "open", "get_ipython"}  # what IPython itself puts beside the user's names
CHECKED = "_parameters_checked"  # left in the namespace by the first check


def parameters(namespace: MutableMapping[str, Any], **legal: Values) -> None:
    """Refuse an unknown name or an illegal value; to be called with globals() right after the parameters cell.

    Called again later, when the notebook has variables of its own, it takes only names in capitals for parameters.

    Args:
        namespace: the notebook's names. Those that start with "_", modules, functions and classes are not parameters.
        legal: for each parameter, its legal values (any collection, a range), a type, what a function of the library
            takes (such as `prunelab.data.LEGAL`), or a predicate whose docstring says what is legal.

    Raises:
        ValueError: a parameter is unknown, missing, or has an illegal value; it is named, with the legal ones.
    """
    known = ", ".join(legal)
    again = CHECKED in namespace
    for name, value in namespace.items():
        if name not in legal and _is_parameter(name, value) and (name.isupper() or not again):
            raise ValueError(f"unknown parameter {name}: this notebook has {known}")
    for name, values in legal.items():
        if name not in namespace:
            raise ValueError(f"parameter {name} is missing: this notebook has {known}")
        if not _is_legal(namespace[name], values):
            raise ValueError(f"{name} = {namespace[name]!r}: {_described(values)}")
    namespace[CHECKED] = True


def fraction(value: Any) -> bool:
    """A fraction in (0, 1]."""
    return FRACTION.accepts(value)


def fractions(values: Any) -> bool:
    """A list of fractions in (0, 1], at least one."""
    return isinstance(values, list) and bool(values) and all(map(fraction, values))


def auto_or_fractions(values: Any) -> bool:
    """Either "auto" or a list of fractions in (0, 1], at least one."""
    return bool(values == "auto") or fractions(values)


def _is_parameter(name: str, value: Any) -> bool:
    """Whether a name of the notebook is its own plain value, and not an import or a definition."""
    return not (name.startswith("_") or name in INTERACTIVE or callable(value) or type(value).__name__ == "module")


def _is_legal(value: Any, legal: Values) -> bool:
    if isinstance(legal, Legal):
        return legal.accepts(value)
    if isinstance(legal, type):
        return isinstance(value, legal) and not (isinstance(value, bool) and legal is not bool)
    if callable(legal):
        try:
            return bool(legal(value))
        except (TypeError, ValueError):
            return False
    return any(type(value) is type(one) and value == one for one in legal)


def _described(legal: Values) -> str:
    if isinstance(legal, Legal):
        return f"it must be {legal.words}"
    if isinstance(legal, type):
        return f"it must be of type {legal.__name__}"
    if callable(legal):
        said = (legal.__doc__ or legal.__name__).strip().rstrip(".")
        return f"it must be {said[0].lower()}{said[1:]}"
    if isinstance(legal, range) and legal.step == 1:
        return f"it must be an integer from {legal.start} to {legal.stop - 1}"
    return f"legal values are {', '.join(map(repr, legal))}"
