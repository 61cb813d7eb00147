"""Training with some units gone: what they own is zero, and stays zero."""

from __future__ import annotations

from prunelab.structure import Plan, Space
from prunelab.structure.space import multiply
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
        self._look_up(state)
        multiply(self._factors)

    def after_step(self, state: State) -> None:
        """Remove what the update brought back: momentum moves zeros."""
        if self._looked_up is not self.plan:
            self._look_up(state)
        multiply(self._factors)

    def _look_up(self, state: State) -> None:
        """Find the factors of all parameters, which takes several times as long as multiplying them in."""
        self._looked_up = self.plan
        self._factors = self.space.factors(state.net, self.space.gates(self.plan))
