"""Training and evaluation mode, put back the way they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_kept(net: nn.Module) -> Iterator[None]:
    """Give every module its own mode back at the end."""
    modes = [(module, module.training) for module in net.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Put a network in evaluation mode for a while."""
    with modes_kept(net):
        net.eval()
        yield
