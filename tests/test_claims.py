"""The claims files, and the experiments that they ask for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from prunelab import claims
from prunelab.experiments import Experiment
from prunelab.methods import METHODS

GOOD = """
notebook = "77_toy"
system = "Toy"
reference = "Nobody 2020"
sentence = "a beats b"
numbers = [{ what = "error", value = 6.6, unit = "%", source = "Table 1", headline = true }]
setting = { dataset = "digits", model = "convnet-bn", scope = "conv", macs = [0.5, 0.25], effort = "smoke", seeds = 2 }
[arms.dense]
label = "dense"
method = "dense"
[arms.a]
label = "A"
method = "spp"
parameters = { t = 4, margin = 0.1 }
by_effort.smoke = { t = 1 }
[arms.b]
label = "B"
method = "l1"
[[claims]]
id = "wins"
text = "a beats b"
rule = "better"
treatment = "a"
controls = ["b"]
headline = true
"""


def read(folder: Path, text: str) -> claims.Paper:
    path = folder / "77_toy.toml"
    path.write_text(text)
    return claims.read(path)


def test_the_grid_has_every_arm_budget_and_seed_and_dense_once_a_seed(tmp_path: Path) -> None:
    paper = read(tmp_path, GOOD)
    found = paper.experiments()
    budgets = {"dense": (1.0,), "a": (0.5, 0.25), "b": (0.5, 0.25)}
    assert list(found) == [(arm, macs, seed) for arm in budgets for macs in budgets[arm] for seed in (0, 1)]
    assert found["a", 0.25, 1] == Experiment(
        "digits", "convnet-bn", "spp", (("margin", 0.1), ("t", 1)), 0.25, "conv", "smoke", 1
    )
    assert found["dense", 1.0, 0] == Experiment("digits", "convnet-bn", "dense", effort="smoke")


def test_another_setting_replaces_only_what_it_names(tmp_path: Path) -> None:
    found = read(tmp_path, GOOD).experiments(dataset="cifar10", effort="brief", seeds=1, macs=[1 / 8])
    assert list(found) == [("dense", 1.0, 0), ("a", 0.125, 0), ("b", 0.125, 0)]
    assert dict(found["a", 0.125, 0].parameters) == {"t": 4, "margin": 0.1}
    assert {(e.dataset, e.model, e.effort) for e in found.values()} == {("cifar10", "convnet-bn", "brief")}


ALSO = """
[[also]]
model = "resnet20"
macs = [0.25]
[[also]]
seeds = 3
[arms.dense]
"""


def test_further_settings_name_only_what_differs(tmp_path: Path) -> None:
    paper = read(tmp_path, GOOD.replace("[arms.dense]", ALSO))
    main, resnet, longer = paper.everywhere
    assert main == paper
    assert (resnet.arms, resnet.claims, resnet.numbers) == (paper.arms, paper.claims, paper.numbers)
    settings = [one.setting for one in paper.everywhere]
    assert [(setting.model, setting.macs, setting.effort, setting.seeds) for setting in settings] == [
        ("convnet-bn", (0.5, 0.25), "smoke", 2),
        ("resnet20", (0.25,), "smoke", 2),
        ("convnet-bn", (0.5, 0.25), "smoke", 3),
    ]
    assert resnet.experiments() == paper.experiments(model="resnet20", macs=[0.25])
    assert longer.experiments() == paper.experiments(seeds=3)
    assert [paper.seeds_on("digits", model, "smoke") for model in ("convnet-bn", "resnet20")] == [2, 2]
    assert paper.seeds_on("cifar10", "convnet-bn", "smoke") == claims.LEAST_SEEDS  # nothing is recorded there


def test_a_claim_about_some_budgets_is_put_where_they_are(tmp_path: Path) -> None:
    def settings_of_the_claim(macs: str) -> list[tuple[float, ...] | None]:
        text = GOOD.replace("[arms.dense]", ALSO).replace('treatment = "a"', f'treatment = "a"\nmacs = {macs}')
        return [claim.macs for one in read(tmp_path, text).everywhere for claim in one.claims]

    assert settings_of_the_claim("[0.5, 0.25]") == [(0.5, 0.25), (0.25,), (0.5, 0.25)]
    assert settings_of_the_claim("[0.5]") == [(0.5,), (0.5,)]  # not on the ResNet


def test_a_setting_runs_its_arms_and_what_is_claimed_of_them(tmp_path: Path) -> None:
    def claims_on_the_resnet(arms: str, controls: str) -> list[tuple[str, ...]]:
        text = GOOD.replace("[arms.dense]", ALSO).replace('controls = ["b"]', f"controls = {controls}")
        main, resnet, _ = read(tmp_path, text.replace("macs = [0.25]", f"arms = {arms}")).everywhere
        assert list(main.arms) == ["dense", "a", "b"]
        assert list(resnet.arms) == [name for name in main.arms if name in arms]
        assert {arm for arm, _, _ in resnet.experiments()} == set(resnet.arms)
        return [claim.controls for claim in resnet.claims]

    assert claims_on_the_resnet('["dense", "a"]', '["b", "dense"]') == [("dense",)]
    assert claims_on_the_resnet('["dense", "a"]', '["b"]') == []  # no control is left
    assert claims_on_the_resnet('["dense", "b"]', '["b"]') == []  # nor here the treatment


def test_hyper_parameters_depend_on_the_network_and_then_on_the_effort(tmp_path: Path) -> None:
    paper = read(
        tmp_path, GOOD.replace("by_effort.smoke", "by_model.resnet20 = { t = 7, beta = 0.1 }\nby_effort.smoke")
    )
    arm = paper.arms["a"]
    assert arm.parameters_for("convnet-bn", "brief") == {"t": 4, "margin": 0.1}
    assert arm.parameters_for("resnet20", "brief") == {"t": 7, "margin": 0.1, "beta": 0.1}
    assert arm.parameters_for("resnet20", "smoke") == {"t": 1, "margin": 0.1, "beta": 0.1}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('rule = "better"', 'rule = "best"', r"claims\.wins: rule is 'best'; legal values are better, not worse"),
        ('controls = ["b"]', 'controls = ["c"]', r"claims\.wins: controls is 'c'; legal values are dense, a, b"),
        ('controls = ["b"]', "controls = []", r"claims\.wins: controls is empty"),
        ('treatment = "a"', 'treatment = "x"', r"claims\.wins: treatment is 'x'; legal values are dense, a, b"),
        ('treatment = "a"', 'treatment = "a"\nmetric = "loss"', r"claims\.wins: metric is 'loss'"),
        (
            'treatment = "a"',
            'treatment = "a"\nmacs = [0.1]',
            r"claims\.wins: macs is 0\.1; legal values are 0\.5, 0\.25",
        ),
        ('treatment = "a"', 'treatment = "a"\nmargin = 1.0', r"claims\.wins: margin is 1\.0"),
        ('text = "a beats b"', 'txt = "a beats b"', r"claims: unknown field txt"),
        ('label = "B"\n', "", r"arms\.b: field label is missing"),
        ('method = "l1"', 'method = "l3"', r"unknown method 'l3'"),
        ("t = 4", "steps = 4", r"no parameter steps"),
        ("by_effort.smoke", "by_effort.tiny", r"arms\.a: by_effort is 'tiny'"),
        ("by_effort.smoke", "by_model.lenet", r"arms\.a: by_model is 'lenet'"),
        ("[arms.dense]", "[[also]]\nwidth = 2\n[arms.dense]", r"also: unknown field width"),
        ("[arms.dense]", "[[also]]\nmacs = [2.0]\n[arms.dense]", r"2\.0"),
        ("[arms.dense]", '[[also]]\narms = ["c"]\n[arms.dense]', r"arms is 'c'; legal values are dense, a, b"),
        ('effort = "smoke"', 'effort = "tiny"', r"effort is 'tiny'"),
        ("seeds = 2", "seed = 2", r"setting: unknown field seed"),
        ("headline = true }", "headline = true, page = 3 }", r"numbers: unknown field page"),
        ('controls = ["b"]\nheadline = true', 'controls = ["b"]', r"exactly one has headline"),
        ("77_toy", "78_toy", r"it must be the file's name, '77_toy'"),
        ("[arms.b]", "[arms.b", r"line"),
    ],
)
def test_a_malformed_file_is_named_with_its_field(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(ValueError, match=rf"77_toy\.toml: .*{message}"):
        read(tmp_path, GOOD.replace(old, new, 1))


def test_a_notebook_is_found_by_number_and_by_name() -> None:
    assert claims.load("01") == claims.load("01_spp")
    assert [paper.number for paper in claims.load_all()] == sorted(paper.number for paper in claims.load_all())
    with pytest.raises(ValueError, match=r"no claims for notebook '0': there are 01_spp, 02_filter_pruning"):
        claims.load("0")


def test_papers_on_one_setting_share_their_rows() -> None:
    spp, filters = (claims.load(number).experiments(seeds=3) for number in ("01", "02"))
    for arm, budgets in {"dense": {1.0}, "l1-filters": {0.5, 0.25, 0.125}}.items():
        cells = [cell for cell in spp if cell[0] == arm and cell in filters]
        assert {budget for _, budget, _ in cells} == budgets
        assert [spp[cell].key for cell in cells] == [filters[cell].key for cell in cells]


def test_no_two_arms_of_a_paper_are_the_same_experiment() -> None:
    for paper in claims.load_all():
        for effort in ("smoke", "brief"):
            keys = [experiment.key for experiment in paper.experiments(effort=effort).values()]
            assert len(set(keys)) == len(keys)


def test_the_showdown_runs_every_method_as_its_own_notebook_does() -> None:
    showdown = claims.load("12")
    assert {arm.method for arm in showdown.arms.values()} == set(METHODS)
    for paper in claims.load_all():
        for name in showdown.arms.keys() & paper.arms.keys():
            ours, theirs = showdown.arms[name], paper.arms[name]
            assert replace(ours, label="") == replace(theirs, label="")


def test_a_new_method_joins_the_showdown_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    before = claims.load("12")
    monkeypatch.setitem(METHODS, "brand-new", METHODS["l1"])
    after = claims.load("12")
    assert after.arms.keys() - before.arms.keys() == {"brand-new"}
    assert after.arms["brand-new"] == claims.Arm("brand-new", "brand-new", {}, {}, {})
    assert len(after.experiments()) == len(before.experiments()) + len(before.setting.macs) * before.setting.seeds
    assert "brand-new" not in claims.load("01").arms


def test_what_counts_as_the_recorded_evidence() -> None:
    paper = claims.load("01")
    assert paper.effort_on("digits") == "smoke"
    assert paper.effort_on("cifar10") == paper.setting.effort
    recorded = (paper.setting.dataset, paper.setting.model, paper.setting.effort)
    assert paper.setting.matches(*recorded)
    for i in range(3):
        assert not paper.setting.matches(*recorded[:i], "other", *recorded[i + 1 :])
