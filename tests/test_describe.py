"""What a space says of itself, in a table and in a figure."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from prunelab import models, plots
from prunelab.structure import Budget, ChannelSpace, ColumnSpace, RowColumnSpace


class Residual(nn.Module):
    """A stem, one residual branch with batch norm, and a classifier; 8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = Branch()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)).mean((2, 3)))


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x += self.conv2(self.bn(self.conv1(x)).relu())
        return x


class Separable(nn.Module):
    """A depthwise convolution between two pointwise ones, with a scale per channel; 4x4 images."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 5, 3, padding=1, groups=5)
        self.scale, self.c = nn.Parameter(torch.ones(5, 1, 1)), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)) * self.scale)


class Normed(nn.Module):
    """A block that one group norm keeps whole, beside two convolutions that can lose channels; 4x4 images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 6, 1), NormedBranch()
        self.last = nn.Conv2d(6, 5, 1)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.block(self.stem(x))).mean((2, 3)))


class NormedBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.norm = nn.Conv2d(6, 7, 1), nn.Conv2d(7, 6, 1), nn.GroupNorm(1, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv2(self.conv1(x))) * x.mean(1, keepdim=True)


def residual() -> ChannelSpace:
    return ChannelSpace(Residual(), torch.zeros(1, 3, 8, 8))


def test_a_residual_network() -> None:
    space = residual()
    expected = pd.DataFrame(
        {
            "group": ["stem", "block.conv1"],
            "size": [4, 6],
            "written_by": ["stem, block.conv2", "block.conv1"],
            "through": ["", "block.bn"],
            "read_by": ["block.conv1, head", "block.conv2"],
            "tied_by": ["add at block", ""],
            # stem and conv2 write a channel of the stream, conv1 and the classifier read it
            "macs_per_unit": [64 * (3 * 9 + 6 + 6 * 9) + 2, 64 * (4 * 9 + 4)],
        }
    )
    pd.testing.assert_frame_equal(space.describe(), expected)
    found = space.describe(space.plan({"block.conv1": [1, 2, 5]}))
    pd.testing.assert_frame_equal(found[expected.columns], expected)
    assert found[["kept", "removed"]].values.tolist() == [[4, 0], [3, 3]]
    assert found.removed_units.tolist() == [[], [0, 3, 4]]


def test_a_depthwise_network() -> None:
    (row,) = ChannelSpace(Separable(), torch.zeros(1, 3, 4, 4)).describe().to_dict("records")
    assert row == {
        "group": "a",
        "size": 5,
        "written_by": "a",
        "through": "b, scale",
        "read_by": "c",
        "tied_by": "depthwise convolution at b; mul of a parameter",
        "macs_per_unit": 16 * (3 + 9 + 2),
    }


def test_layers_that_stay_whole_say_what_pins_them() -> None:
    """The sum ties the stem to what the group norm pins."""
    space = ChannelSpace(Normed(), torch.zeros(1, 3, 4, 4))
    why = "GroupNorm at block.norm; mean over channels at block"
    assert space.whole == {"stem": why, "block.conv2": why, "head": "the network's output"}
    assert space.describe().written_by.tolist() == ["block.conv1", "last"]


def test_an_unmet_budget_says_where_to_look() -> None:
    space = ChannelSpace(Normed(), torch.zeros(1, 3, 4, 4))
    with pytest.raises(
        ValueError, match=r"cannot be met: .* of the MACs \(all\); `whole` says which layers can lose nothing$"
    ):
        space.plan_for(space.scores("l1"), Budget(0.01))
    columns = ColumnSpace(Residual(), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"cannot be met: .* of the MACs \(all\)$"):
        columns.plan_for(columns.scores("l1"), Budget(0.01))


def test_columns_have_no_neighbours() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(36, 2))
    space = ColumnSpace(net, torch.zeros(1, 1, 4, 4))
    (row,) = space.describe(space.plan({"0": [0, 3]})).to_dict("records")
    assert row == {"group": "0", "size": 4, "macs_per_unit": 36, "kept": 2, "removed": 2, "removed_units": [1, 2]}


def test_filters_beside_columns_have_theirs() -> None:
    rows, both = residual(), RowColumnSpace(Residual(), torch.zeros(1, 3, 8, 8))
    where = ["group", "size", "written_by", "through", "read_by", "tied_by"]
    filters, columns = both.describe()[where].iloc[:2], both.describe()[where].iloc[2:]
    pd.testing.assert_frame_equal(filters, rows.describe()[where])
    assert columns.group.tolist() == ["stem columns", "block.conv1 columns", "block.conv2 columns"]
    assert (columns[where[2:]] == "").all(axis=None)


def test_macs_per_unit_are_what_a_plan_without_it_saves() -> None:
    space = ChannelSpace(models.build("resnet20", width=0.25, seed=0), torch.zeros(1, 3, 32, 32))
    for row in space.describe().to_dict("records"):
        plan = space.plan({row["group"]: range(row["size"] - 1)}) if row["size"] > 1 else None
        assert plan is None or row["macs_per_unit"] == space.macs() - space.macs(plan)


def test_a_plan_of_another_network_is_refused() -> None:
    other = ChannelSpace(Separable(), torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="does not fit this network"):
        residual().describe(other.plan({}))


def test_places_count_channels_on_both_sides() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(18, 3), nn.Linear(3, 2))
    places = ChannelSpace(net, torch.zeros(1, 1, 4, 4)).places()
    assert [(p.layer, p.role, p.channels.tolist()) for p in places] == [
        ("0", "writes", [2, 0]),
        ("2", "reads", [18, 0]),
        ("2", "writes", [0, 3]),
        ("3", "reads", [0, 3]),
    ]


def test_the_figure_shows_what_is_kept_where() -> None:
    space = residual()
    ax = plots.coupling(space, space.plan({"block.conv1": [1, 2, 5]}))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["stem", "block.conv1", "block.conv2", "head"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["add", ""]
    cells = {(*text.get_position(), text.get_text()) for text in ax.texts}
    assert cells == {(0, 0, "4"), (0, 1, "4"), (1, 1, "3"), (1, 2, "3"), (0, 2, "4"), (0, 3, "4")}
    filled = [patch.get_width() for patch in ax.patches if patch.get_linewidth() == 0 and patch.get_height() == 0.8]
    assert sorted(filled) == [0.43, 0.43, 0.86, 0.86, 0.86, 0.86]
    plt.close(ax.figure)
