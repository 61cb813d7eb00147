"""What can be removed from a network, and removing it."""

from prunelab.structure.blocks import BlockSpace
from prunelab.structure.channels import ChannelSpace
from prunelab.structure.columns import ColumnSpace
from prunelab.structure.plan import Plan
from prunelab.structure.rowcolumns import RowColumnSpace
from prunelab.structure.space import Budget, Group, Space
from prunelab.structure.tracing import UntraceableError

__all__ = [
    "BlockSpace",
    "Budget",
    "ChannelSpace",
    "ColumnSpace",
    "Group",
    "Plan",
    "RowColumnSpace",
    "Space",
    "UntraceableError",
]
