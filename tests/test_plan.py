"""Plans, budgets, scores and shares: what they mean, and what they refuse."""

from __future__ import annotations

import copy
import json
import pickle
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from prunelab import models
from prunelab.structure import Budget, ChannelSpace, Plan, Space
from prunelab.structure.space import Ranking, kept_count

EXAMPLE = torch.zeros(1, 3, 32, 32)
FRACTIONS = (0.5, 0.25, 0.125)


@pytest.fixture(scope="module")
def spaces() -> dict[str, Space]:
    return {name: ChannelSpace(models.build(name, seed=0), EXAMPLE) for name in ("convnet", "vgg16", "resnet56")}


@pytest.fixture(scope="module")
def space(spaces: dict[str, Space]) -> Space:
    return spaces["convnet"]


# Shares


@pytest.mark.parametrize(
    ("size", "share", "kept"),
    [
        (320, 0.1, 32), (160, Fraction(1, 5), 32), (10, 0.7, 7), (100, 0.29, 29), (100, 0.57, 57), (64, 0.5, 32),
        (64, 1.0, 64), (64, 64, 64), (64, 1, 1), (3, 0.01, 1), (7, np.int64(3), 3), (50, np.float64(0.58), 29),
    ],
)  # fmt: skip
def test_shares_are_exact(size: int, share: float, kept: int) -> None:
    assert kept_count(size, share) == kept


@given(size=st.integers(1, 4096), parts=st.integers(1, 1000))
def test_a_share_in_decimals_is_that_fraction(size: int, parts: int) -> None:
    assert kept_count(size, parts / 1000) == kept_count(size, Fraction(parts, 1000)) == max(1, size * parts // 1000)


@pytest.mark.parametrize("share", [0, -1, 11, 0.0, -0.5, 1.5, float("nan"), float("inf"), Fraction(0), Fraction(3, 2)])
def test_impossible_shares_are_named(space: Space, share: float) -> None:
    with pytest.raises(ValueError, match=f"share {share}: "):
        kept_count(10, share)
    with pytest.raises(ValueError, match="share "):
        space.plan_for(space.scores("l1"), {"conv1": share if abs(share) <= 1.5 else 1000})


def test_shares_in_a_mapping_and_in_a_list(space: Space) -> None:
    scores = space.scores("l1")
    assert space.plan_for(scores, {"conv2": 0.25}).widths == {"conv1": 32, "conv2": 8, "conv3": 64}
    assert space.plan_for(scores, [3, 0.5, Fraction(1, 3)]).widths == {"conv1": 3, "conv2": 16, "conv3": 21}
    kept = space.plan_for(scores, {"conv2": 5}).keep["conv2"]
    assert set(kept) == set(scores["conv2"].topk(5).indices.tolist())


# Budgets


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("name", ["convnet", "vgg16", "resnet56"])
@pytest.mark.parametrize("scope", ["all", "conv"])
def test_a_budget_is_used_up_to_the_last_unit(spaces: dict[str, Space], name: str, fraction: float, scope: str) -> None:
    space = spaces[name]
    dense = space.macs(scope=scope)
    for ranking in ("layer", "global"):
        plan = space.plan_for(space.scores("l1"), Budget(fraction, scope), ranking)
        widths = np.array(list(plan.widths.values()))
        assert space.macs(plan, scope) <= fraction * dense
        assert min(widths) >= 1
        assert fraction - space.macs(plan, scope) / dense < 0.01
        more = widths + np.eye(len(widths), dtype=int)  # one group has one unit more
        assert (space.cost(more[widths < space.sizes], scope) > fraction * dense).any()


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_a_budget_leaves_multiples_up_to_the_last_step(fraction: float, ranking: Ranking) -> None:
    space = ChannelSpace(models.build("vgg11", width=0.3, seed=0), torch.zeros(1, 3, 32, 32), multiple_of=8)
    assert space.sizes.tolist() == [19, 38, 77, 77, 154, 154, 154, 154]  # none a multiple itself
    scores, dense = space.scores("random"), space.macs()
    plan = space.plan_for(scores, Budget(fraction), ranking)
    widths = space.widths(plan)
    assert ((widths % 8 == 0) | (widths == space.sizes)).all()
    assert widths.min() >= 8
    assert space.macs(plan) <= fraction * dense
    more = np.minimum(widths + 8 * np.eye(len(widths), dtype=int), space.sizes)  # one group has one step more
    assert (space.cost(more[widths < space.sizes]) > fraction * dense).all()
    for group in space.groups:
        best = scores[group.name].argsort(descending=True)[: plan.widths[group.name]]
        assert plan.keep[group.name] == tuple(sorted(best.tolist()))


def test_multiples_are_of_channels_where_a_unit_has_several() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.GroupNorm(16, 64), nn.ReLU(), nn.Conv2d(64, 32, 3), nn.Flatten(), nn.Linear(32 * 16, 2)
    )  # fmt: skip
    space = ChannelSpace(net, torch.zeros(1, 3, 8, 8), multiple_of=8)
    assert [(group.size, group.step) for group in space.groups] == [(16, 2), (32, 8)]  # 4 channels and 1 in a unit
    small = space.shrink(space.plan_for(space.scores("l1"), Budget(0.5)))
    assert isinstance(small, nn.Sequential)
    assert (small[0].out_channels % 8, small[3].out_channels % 8) == (0, 0)


def test_a_group_of_fewer_than_a_multiple_stays_whole() -> None:
    space = ChannelSpace(models.build("convnet", seed=0), torch.zeros(1, 3, 32, 32), multiple_of=33)
    plan = space.plan_for(space.scores("l1"), Budget(0.9))
    assert plan.widths == {"conv1": 32, "conv2": 32, "conv3": 33}
    with pytest.raises(ValueError, match=r"cannot be met: .* keeps 0\.8"):
        space.plan_for(space.scores("l1"), Budget(0.5))


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("name", ["convnet", "vgg16", "resnet56"])
def test_layer_ranking_cuts_all_groups_alike(spaces: dict[str, Space], name: str, fraction: float) -> None:
    space = spaces[name]
    plan = space.plan_for(space.scores("l1"), Budget(fraction))
    removed = 1 - space.widths(plan) / space.sizes
    # To the unit that a fraction is rounded by, and the one that a group may get back.
    assert removed.max() <= (removed + 2 / space.sizes).min() + 1e-12


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_global_ranking_removes_the_lowest_scores(spaces: dict[str, Space], fraction: float) -> None:
    space = spaces["resnet56"]
    scores = space.scores("random")
    plan = space.plan_for(scores, Budget(fraction), "global")
    kept = {group.name: scores[group.name][list(plan.keep[group.name])] for group in space.groups}
    gone = {
        group.name: scores[group.name][[i for i in range(group.size) if i not in plan.keep[group.name]]]
        for group in space.groups
    }
    highest = max(float(score.max()) for score in gone.values() if len(score))
    for group in space.groups:
        assert kept[group.name].max() == scores[group.name].max()
        assert not len(gone[group.name]) or gone[group.name].max() < kept[group.name].min()
        others = kept[group.name].sort().values[:-1]  # the best unit always stays, and one may be given back
        assert (others < highest).sum() <= 1


def test_the_whole_budget_removes_nothing(space: Space) -> None:
    for ranking in ("layer", "global"):
        plan = space.plan_for(space.scores("l1"), Budget(1.0), ranking)
        assert plan.widths == plan.sizes


def test_the_least_budget_leaves_one_unit_each(space: Space) -> None:
    least = space.macs({group.name: 1 for group in space.groups}) / space.macs()
    plan = space.plan_for(space.scores("l1"), Budget(least * (1 + 1e-9)))
    assert set(plan.widths.values()) == {1}
    with pytest.raises(ValueError, match=rf"budget macs=.* cannot be met: .* keeps {least:.4f} of the MACs"):
        space.plan_for(space.scores("l1"), Budget(least * 0.999))


def test_units_of_infinite_score_stay(space: Space) -> None:
    scores = {**space.scores("l1"), "conv1": torch.full((32,), torch.inf)}
    for ranking in ("layer", "global"):
        assert space.plan_for(scores, Budget(0.5), ranking).widths["conv1"] == 32


# Bad input


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan"), float("inf")])
def test_budgets_are_fractions(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"budget macs=.*: the fraction of MACs to keep must be in \(0, 1\]"):
        Budget(fraction)


def with_scores(space: Space, **changed: Tensor) -> dict[str, Tensor]:
    return {**space.scores("l1"), **changed}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda s: ChannelSpace(s.net, s.example, multiple_of=0),
            "multiple_of is 0; it must be an integer >= 1",
        ),
        (lambda s: Budget(0.5, "linear"), "scope is 'linear'; it must be one of 'all', 'conv'"),
        (lambda s: s.macs(scope="linear"), "scope is 'linear'; it must be one of 'all', 'conv'"),
        (lambda s: s.scores("l3"), "unknown criterion 'l3': legal names are 'l1'"),
        (lambda s: s.scores(lambda space: {}), r"scores of group 'conv1' must have shape \(32,\), got nothing"),
        (
            lambda s: s.plan_for(s.scores("l1"), Budget(0.5), "best"),
            "ranking is 'best'; it must be one of 'layer', 'global'",
        ),
        (lambda s: s.plan_for(s.scores("l1"), {"conv1": 8}, "best"), "ranking is 'best'; it must be one of"),
        (
            lambda s: s.plan_for(s.scores("l1"), [0.5, 0.5]),
            "2 shares for 3 groups: give one each for conv1, conv2, conv3",
        ),
        (lambda s: s.plan_for(s.scores("l1"), {"conv7": 0.5}), r"unknown groups \['conv7'\]: this network has conv1"),
        (lambda s: s.plan({"conv7": [0]}), r"unknown groups \['conv7'\]"),
        (lambda s: s.macs({"conv7": 1}), r"unknown groups \['conv7'\]"),
        (lambda s: s.macs({"conv1": -3}), r"group 'conv1': width is -3; it must be a whole number in \[0, 32\]"),
        (lambda s: s.macs({"conv1": 33}), r"group 'conv1': width is 33"),
        (lambda s: s.parameters({"conv1": 1.5}), r"group 'conv1': width is 1\.5"),
        (
            lambda s: s.plan({"conv1": [1.5]}),
            r"group 'conv1': kept indices must be a list of whole numbers; got \[1\.5\]",
        ),
        (lambda s: s.plan({"conv1": "12"}), r"group 'conv1': .* got '12'"),
        (lambda s: s.plan({"conv1": None}), r"group 'conv1': .* got None"),
        (lambda s: s.plan({"conv1": []}), "group 'conv1': kept indices must be sorted, distinct, at least one"),
        (lambda s: s.plan({"conv1": [32]}), r"group 'conv1': .* in \[0, 32\); got \(32,\)"),
        (lambda s: s.plan({"conv1": [-1]}), "group 'conv1'"),
        (lambda s: s.plan({"conv1": [1, 1]}), "group 'conv1'"),
        (
            lambda s: s.plan_for(with_scores(s, conv2=torch.full((32,), torch.nan)), Budget(0.5)),
            "scores of group 'conv2' contain NaN",
        ),
        (
            lambda s: s.plan_for(with_scores(s, conv2=torch.ones(32, 1)), Budget(0.5)),
            r"scores of group 'conv2' must have shape \(32,\), got \(32, 1\)",
        ),
    ],
)
def test_bad_input_is_named(space: Space, call: Callable[[Space], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(space)


def test_a_plan_of_another_network_does_not_fit(spaces: dict[str, Space]) -> None:
    plan = spaces["vgg16"].plan({})
    for use in (spaces["convnet"].mask, spaces["convnet"].shrink, spaces["convnet"].macs, spaces["convnet"].gates):
        with pytest.raises(ValueError, match=r"does not fit this network, which has channels {conv1: 32, conv2: 32"):
            use(plan)


# Files

PLANS = st.dictionaries(
    st.text(min_size=1, max_size=8),
    st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=1))),
    max_size=5,
).map(
    lambda groups: Plan(
        "channels", {k: n for k, (n, _) in groups.items()}, {k: tuple(sorted(v)) for k, (_, v) in groups.items()}
    )
)


def test_indices_of_any_kind_are_one_plan(tmp_path: Path) -> None:
    plain = Plan("channels", {"a": 3}, {"a": (0, 2)})
    for kept in ([0, 2], np.array([0, 2]), torch.tensor([0, 2]), (np.int64(0), 2)):
        plan = Plan("channels", {"a": 3}, {"a": kept})  # type: ignore[dict-item]
        assert plan == plain
        plan.save(tmp_path / "plan")
        assert Plan.load(tmp_path / "plan") == plain


@given(plan=PLANS)
def test_a_saved_plan_comes_back(plan: Plan) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        for _ in range(2):  # over an old file too
            plan.save(path)
        assert Plan.load(path) == plan
        assert list(Plan.load(path).keep) == list(plan.keep)
        assert [entry.name for entry in Path(folder).iterdir()] == ["plan.json"]


def test_plans_can_be_sent_to_other_processes(space: Space) -> None:
    plan = space.plan({"conv1": [0, 2]})
    assert pickle.loads(pickle.dumps(plan)) == copy.deepcopy(plan) == plan
    assert repr(plan) == "Plan(channels; conv1: 2/32, conv2: 32/32, conv3: 64/64)"


GOOD = {"space": "channels", "sizes": {"a": 4}, "keep": {"a": [0, 2]}}


@pytest.mark.parametrize(
    "content",
    [
        "", json.dumps(GOOD)[:-9], "[]", "7", json.dumps({"space": "channels"}),
        json.dumps(GOOD | {"keep": {"a": [2, 0]}}),
        json.dumps(GOOD | {"keep": {"a": [1, 1]}}), json.dumps(GOOD | {"keep": {"a": [4]}}),
        json.dumps(GOOD | {"keep": {"a": [-1]}}), json.dumps(GOOD | {"keep": {"a": []}}),
        json.dumps(GOOD | {"keep": {"a": [0.5]}}), json.dumps(GOOD | {"keep": {"a": ["0"]}}),
        json.dumps(GOOD | {"keep": {"b": [0]}}), json.dumps(GOOD | {"sizes": {"a": "4"}}), "\x00\xff",
    ],
)  # fmt: skip
def test_a_damaged_plan_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"plan\.json is not a saved plan") as caught:
        Plan.load(path)
    assert caught.value.__suppress_context__


def test_a_missing_plan_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"plan\.json"):
        Plan.load(tmp_path / "plan.json")
