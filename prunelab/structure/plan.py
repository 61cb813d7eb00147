"""What to keep of a network, as plain data."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import index
from pathlib import Path

from prunelab._checks import Legal, check, check_fields, instance, integer
from prunelab._files import write_atomically


@dataclass(frozen=True)
class Plan:
    """The units that stay: what every method produces, and all that is needed to cut the same network again.

    Attributes:
        space: what the units are: "channels", "columns", "rows+columns" or "blocks".
        sizes: units per group before the cut.
        keep: sorted indices of the units that stay, in [0, size); at least one per group, but a group of a single unit
            may be gone as a whole where its space allows it.
    """

    space: str
    sizes: Mapping[str, int]
    keep: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        groups = instance(Mapping, "a mapping with an entry for every group")
        check_fields(self, "plan", space=instance(str, "the name of a space"), sizes=groups, keep=groups)
        object.__setattr__(self, "keep", {name: indices(name, kept) for name, kept in self.keep.items()})
        if set(self.sizes) != set(self.keep):
            odd = sorted(set(self.sizes) ^ set(self.keep), key=str)
            raise ValueError(f"plan: sizes and keep must have the same groups: {odd} appear on one side only")
        for name, size in self.sizes.items():
            check(f"plan, group {name!r}: size", size, integer(1))
            kept = self.keep[name]
            if not _units_of(size).accepts(kept):
                raise ValueError(f"plan, group {name!r}: {_units_of(size).words}; got {kept}")

    @cached_property
    def widths(self) -> dict[str, int]:
        """Units kept per group."""
        return {name: len(kept) for name, kept in self.keep.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, whole or not at all."""
        content = {"space": self.space, "sizes": dict(self.sizes), "keep": {k: list(v) for k, v in self.keep.items()}}
        write_atomically(path, json.dumps(content, indent=1).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a saved plan.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a plan; it is named, with what is wrong.
        """
        try:
            content = json.loads(Path(path).read_text())
            sizes = {name: index(size) for name, size in content["sizes"].items()}
            return cls(str(content["space"]), sizes, content["keep"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is not a saved plan: {type(error).__name__}: {error}") from None

    def __repr__(self) -> str:
        """Show the widths, not the indices."""
        widths = ", ".join(f"{name}: {len(kept)}/{self.sizes[name]}" for name, kept in self.keep.items())
        return f"Plan({self.space}; {widths})"


def indices(group: str, kept: Iterable[int]) -> tuple[int, ...]:
    """Return what is kept of a group as plain integers, whatever kind of whole number they were given as.

    Raises:
        ValueError: they are something else.
    """
    try:
        return tuple(map(index, kept))
    except TypeError:
        raise ValueError(f"plan, group {group!r}: kept indices must be a list of whole numbers; got {kept!r}") from None


def _units_of(size: int) -> Legal:
    """What a plan may keep of a group: sorted indices, and some where there are several."""
    return Legal(
        f"kept indices must be sorted, distinct, at least one, in [0, {size})",
        lambda kept: list(kept) == sorted(set(kept).intersection(range(size))) and (kept or size == 1),
    )
