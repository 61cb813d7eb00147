"""What can be removed from a network, and removing it."""

from prunelab.structure.blocks import BlockSpace
from prunelab.structure.channels import ChannelSpace
from prunelab.structure.columns import ColumnSpace
from prunelab.structure.graph import UntraceableError
from prunelab.structure.plan import Plan
from prunelab.structure.rowcolumns import RowColumnSpace
from prunelab.structure.space import Budget, Group, Space

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
