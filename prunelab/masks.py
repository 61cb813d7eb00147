"""Training with some units gone: what they own is zero, and stays zero."""

from __future__ import annotations

from prunelab.structure import Plan, Space
from prunelab.training import Hook, State


class Masks(Hook):
    """Keep at zero, throughout a training, what a plan removes.

    Attributes:
        plan: may be replaced by another at any time.
    """

    def __init__(self, space: Space, plan: Plan) -> None:
        self.space, self.plan = space, plan

    def start(self, state: State) -> None:
        """Remove it."""
        self.space.apply_gates(state.net, self.space.gates(self.plan))

    def after_step(self, state: State) -> None:
        """Remove what the update brought back: momentum moves zeros."""
        self.space.apply_gates(state.net, self.space.gates(self.plan))
