"""Refusing bad input before any work is done: one error that names the input, its value and what is legal."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from types import UnionType
from typing import Any, NamedTuple

from torch import Tensor, nn

LONGEST = 200  # characters of a value that a message shows: a network prints hundreds of lines


class Legal(NamedTuple):
    """What an input may be: in words that follow "it must be", and as a test, which may raise for another kind."""

    words: str
    test: Callable[[Any], Any]

    def accepts(self, value: object) -> bool:
        """Return whether a value, of whatever kind, is legal."""
        try:
            return bool(self.test(value))
        except (TypeError, ValueError, AttributeError, OverflowError, RuntimeError):  # as "a" < 1, or 10**400, or bool
            return False  # of a tensor, do


def instance(wanted: type | UnionType, words: str) -> Legal:
    """Instances of a class."""
    return Legal(words, lambda value: isinstance(value, wanted))


def real(words: str, test: Callable[[float], Any]) -> Legal:
    """Real numbers that pass a test; True and False are none."""
    return Legal(words, lambda value: isinstance(value, Real) and not isinstance(value, bool) and test(float(value)))


def within(interval: str) -> Legal:
    """Numbers of an interval, such as "(0, 1]", which is without 0 and with 1."""
    low, high = map(float, interval[1:-1].split(","))
    above = operator.ge if interval.startswith("[") else operator.gt
    below = operator.le if interval.endswith("]") else operator.lt
    return real(f"in {interval}", lambda value: above(value, low) and below(value, high))


def integer(least: int) -> Legal:
    """Integers, at least so much; True and False are none."""
    words = f"an integer >= {least}"
    return Legal(words, lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least)


def one_of(names: Iterable[str]) -> Legal:
    """Some texts."""
    legal = tuple(names)
    return Legal(f"one of {', '.join(map(repr, legal))}", lambda value: isinstance(value, str) and value in legal)


def optional(legal: Legal) -> Legal:
    """None too."""
    return Legal(f"{legal.words}, or None", lambda value: value is None or legal.accepts(value))


POSITIVE = real("a finite number > 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = real("a finite number >= 0", lambda value: 0 <= value < math.inf)
FRACTION = within("(0, 1]")
FLAG = instance(bool, "True or False")
NETWORK = instance(nn.Module, "a torch.nn.Module")
TENSOR = instance(Tensor, "a torch.Tensor")


def check(name: str, value: object, legal: Legal) -> None:
    """Raise ValueError unless a value is legal."""
    if not legal.accepts(value):
        shown = repr(value)
        shown = shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}..."
        raise ValueError(f"{name} is {shown}; it must be {legal.words}")


def check_fields(settings: object, name: str, /, **legal: Legal) -> None:
    """Check fields in the order given, so that what is legal for one may depend on those before it.

    Raises ValueError for the first field that is not legal.

    Args:
        settings: what has the fields.
        name: what its user calls it.
        legal: the legal values of each field.
    """
    for field, values in legal.items():
        check(f"{name}: {field}", getattr(settings, field), values)


def check_trainable(name: str, weights: Iterable[Tensor]) -> None:
    """Raise ValueError if a weight that a method has to train is frozen."""
    if not all(weight.requires_grad for weight in weights):
        raise ValueError(f"{name}: a layer that it prunes is frozen; each needs a weight with requires_grad=True")


def gradient(name: str, weight: Tensor) -> Tensor:
    """Return the gradient of a weight that a method prunes; ValueError if there is none."""
    if weight.grad is None:
        raise ValueError(f"{name}: a layer that it prunes has no gradient: the loss does not depend on it")
    return weight.grad


def check_shares(name: str, shares: object, legal: Legal) -> None:
    """Check a mapping {group: share}, or None; ValueError names it, or the group."""
    of_groups = Legal(
        "a mapping {group: share}",
        lambda given: isinstance(given, Mapping) and all(isinstance(group, str) for group in given),
    )
    check(name, shares, optional(of_groups))
    if isinstance(shares, Mapping):
        for group, share in shares.items():
            check(f"{name}[{group!r}]", share, legal)
