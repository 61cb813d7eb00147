"""The papers' methods, one file each; a new file here joins the experiments by itself."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import fields
from typing import Any

from prunelab._checks import one_of
from prunelab.methods.base import Method, Pruned

__all__ = ["METHODS", "Method", "Pruned", "build"]


def _found() -> dict[str, type[Method]]:
    """Return every class with a `name` that the modules of this package define."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    things = [thing for module in modules for thing in vars(module).values() if isinstance(thing, type)]
    named = {getattr(thing, "name", None): thing for thing in things if thing.__module__.startswith(__name__)}
    return {name: named[name] for name in sorted(filter(None, named))}


METHODS: dict[str, type[Method]] = _found()


def build(name: str, /, **parameters: Any) -> Method:
    """Return the method of that name with the paper's hyper-parameters, but for those given.

    Raises:
        ValueError: the method or a parameter is unknown, or a parameter's value illegal; the legal ones are listed.
    """
    if not one_of(METHODS).accepts(name):
        raise ValueError(f"unknown method {name!r}: legal names are {', '.join(map(repr, METHODS))}")
    known = [field.name for field in fields(METHODS[name])]
    if unknown := sorted(set(parameters) - set(known)):
        raise ValueError(f"method {name!r} has no parameter {', '.join(unknown)}: it has {', '.join(known)}")
    return METHODS[name](**parameters)
