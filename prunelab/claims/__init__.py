"""What the papers claim and how each claim is tested here: one TOML file per notebook, read into plain data."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from prunelab._checks import FRACTION, Legal, check, integer, one_of, optional
from prunelab.experiments import EFFORTS, Experiment
from prunelab.methods import METHODS
from prunelab.models import NAMES
from prunelab.structure.space import Scope

__all__ = ["LEAST_SEEDS", "METRICS", "RULES", "Arm", "Claim", "Number", "Paper", "Setting", "load", "load_all"]

FOLDER = Path(__file__).parent
LEAST_SEEDS = 3  # that a verdict needs

Rule = Literal["better", "not worse"]
RULES: tuple[str, ...] = get_args(Rule)
METRICS = tuple(f"{split}_{stage}" for split in ("val", "test") for stage in ("cut", "recalibrated", "tuned"))

T = TypeVar("T")


@dataclass(frozen=True)
class Number:
    """A number that the paper itself reports.

    Attributes:
        what: network, data set and what was measured.
        value: as printed in the paper.
        unit: of the value.
        source: where it was read: table, page or abstract.
        headline: whether the verdict table shows it.
    """

    what: str
    value: float
    unit: str
    source: str
    headline: bool = False

    def __str__(self) -> str:
        return f"{self.value:g} {self.unit} ({self.what})"


@dataclass(frozen=True)
class Setting:
    """What the recorded rows were measured on: the fields of `Experiment`, and seeds 0 to seeds − 1.

    With `every_method`, each method of `prunelab.methods` that no arm uses is an arm of its own, with its defaults.
    `arms` names those that run; None: all.
    """

    dataset: str
    model: str
    scope: Scope
    macs: tuple[float, ...]
    effort: str
    seeds: int
    pretrained: str | None = None
    every_method: bool = False
    arms: tuple[str, ...] | None = None

    def matches(self, dataset: str, model: str, effort: str) -> bool:
        """Return whether rows of these belong to the recorded evidence."""
        return (dataset, model, effort) == (self.dataset, self.model, self.effort)


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: a method with its hyper-parameters, some of which may depend on network and effort."""

    label: str
    method: str
    parameters: Mapping[str, Any]
    by_model: Mapping[str, Mapping[str, Any]]
    by_effort: Mapping[str, Mapping[str, Any]]

    def parameters_for(self, model: str, effort: str) -> dict[str, Any]:
        """Return the hyper-parameters for a network at an effort, which has the last word."""
        return {**self.parameters, **self.by_model.get(model, {}), **self.by_effort.get(effort, {})}


@dataclass(frozen=True)
class Claim:
    """A sentence that the rows decide, by paired differences treatment − control over seeds; see `report.verdict`.

    Attributes:
        id: short name, unique in the paper.
        text: the sentence.
        rule: "better", or "not worse" by more than `margin`.
        treatment: the arm that the sentence praises.
        controls: the arms it is compared with.
        metric: a column of the rows, in percent.
        margin: in points; only for "not worse".
        macs: the budgets that the sentence is about, out of those of all settings; None: all that were run.
        headline: whether the paper's headline number stands beside it.
    """

    id: str
    text: str
    rule: Rule
    treatment: str
    controls: tuple[str, ...]
    metric: str = "test_tuned"
    margin: float = 0.0
    macs: tuple[float, ...] | None = None
    headline: bool = False


@dataclass(frozen=True)
class Paper:
    """One paper: its claim in a sentence, its own numbers, and the comparison that tests it here.

    `also` has the same on further settings, each with its arms, and the claims that are about these and its budgets.
    """

    notebook: str
    system: str
    reference: str
    sentence: str
    numbers: tuple[Number, ...]
    setting: Setting
    arms: Mapping[str, Arm]
    claims: tuple[Claim, ...]
    also: tuple[Paper, ...] = ()

    @property
    def number(self) -> str:
        """The notebook's number, two digits."""
        return self.notebook[:2]

    @property
    def headline(self) -> Number | None:
        """The paper's own number that the verdict table shows."""
        return next((number for number in self.numbers if number.headline), None)

    @property
    def everywhere(self) -> tuple[Paper, ...]:
        """The paper on each of its settings, the main one first."""
        return self, *self.also

    @property
    def labels(self) -> dict[str, str]:
        """What figures and tables call each arm."""
        return {name: arm.label for name, arm in self.arms.items()}

    def effort_on(self, dataset: str) -> str:
        """Return the effort that a notebook spends when none is asked for: "smoke" on digits, else the recorded one."""
        return "smoke" if dataset.startswith("digits") else self.setting.effort

    def seeds_on(self, dataset: str, model: str, effort: str) -> int:
        """Return how many seeds a notebook runs when none is asked for: those recorded, else what a verdict needs."""
        recorded = (paper.setting for paper in self.everywhere if paper.setting.matches(dataset, model, effort))
        return next((setting.seeds for setting in recorded), LEAST_SEEDS)

    def experiments(
        self,
        *,
        dataset: str | None = None,
        model: str | None = None,
        effort: str | None = None,
        seeds: int | None = None,
        macs: Sequence[float] | None = None,
        pretrained: str | None = None,
    ) -> dict[tuple[str, float, int], Experiment]:
        """Return the experiments of every arm at every budget with every seed, by (arm, budget, seed).

        None means the recorded setting. The dense arm appears once a seed, at budget 1.

        Raises:
            ValueError: a value is not legal; the legal ones are named.
        """
        check("seeds", seeds, optional(integer(0)))
        fractions = Legal("a list of fractions in (0, 1]", lambda given: all(map(FRACTION.accepts, given)))
        check("effort", effort, optional(one_of(EFFORTS)))
        check("macs", macs, optional(fractions))
        dataset, model = dataset or self.setting.dataset, model or self.setting.model
        effort = effort or self.setting.effort
        pretrained = pretrained or self.setting.pretrained
        found = {}
        for name, arm in self.arms.items():
            dense = arm.method == "dense"
            for budget in (1.0,) if dense else macs or self.setting.macs:
                for seed in range(self.setting.seeds if seeds is None else seeds):
                    found[name, float(budget), seed] = Experiment(
                        dataset=dataset,
                        model=model,
                        method=arm.method,
                        parameters=tuple(arm.parameters_for(model, effort).items()),
                        macs=float(budget),
                        scope="all" if dense else self.setting.scope,
                        effort=effort,
                        seed=seed,
                        pretrained=pretrained,
                    )
        return found


def load_all() -> tuple[Paper, ...]:
    """Return every paper, in the order of the notebooks.

    Raises:
        ValueError: as `load`.
    """
    return tuple(read(path) for path in sorted(FOLDER.glob("*.toml")))


def load(name: str) -> Paper:
    """Return the paper of a notebook, named by its number ("01") or in full ("01_spp").

    Raises:
        ValueError: there is no such notebook, or its file is malformed; the file and the field are named.
    """
    known = {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}
    for stem, path in known.items():
        if name in (stem, stem[:2]):
            return read(path)
    raise ValueError(f"no claims for notebook {name!r}: there are {', '.join(known)}")


def read(path: Path) -> Paper:
    """Read and check one file.

    Raises:
        ValueError: the file is malformed; the file and the field are named.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        table["numbers"] = tuple(_make(Number, n, "numbers") for n in table.get("numbers", ()))
        main = table.get("setting", {})
        table["setting"] = _make(Setting, main, "setting")
        others = [_make(Setting, main | other, "also") for other in table.pop("also", ())]
        arms = {name: _arm(arm, f"arms.{name}") for name, arm in table.get("arms", {}).items()}
        used = {arm.method for arm in arms.values()}
        rest = [name for name in METHODS if name not in used] if table["setting"].every_method else []
        table["arms"] = arms | {name: _arm({"label": name, "method": name}, f"arms.{name}") for name in rest}
        table["claims"] = tuple(_make(Claim, claim, "claims") for claim in table.get("claims", ()))
        paper = _make(Paper, table, "the file")
        _check(paper, others, path)
        paper = replace(_on(paper, paper.setting), also=tuple(_on(paper, other) for other in others))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return paper


def _arm(table: dict[str, Any], where: str) -> Arm:
    return _make(Arm, {"parameters": {}, "by_model": {}, "by_effort": {}, **table}, where)


def _make(kind: type[T], table: dict[str, Any], where: str) -> T:
    """Build a dataclass from a table that must have exactly its fields; lists become tuples."""
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := [name for name in table if name not in known]:
        raise ValueError(f"{where}: unknown field {', '.join(unknown)}; there are {', '.join(known)}")
    if missing := [name for name, field in known.items() if field.default is MISSING and name not in table]:
        raise ValueError(f"{where}: field {', '.join(missing)} is missing")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in table.items()})


def _on(paper: Paper, setting: Setting) -> Paper:
    """Return a paper on one setting, with its arms and the claims that are about them, and check its experiments."""
    arms = {name: arm for name, arm in paper.arms.items() if setting.arms is None or name in setting.arms}
    found = replace(paper, setting=setting, arms=arms, claims=tuple(_about(paper.claims, setting, arms)))
    found.experiments()
    return found


def _about(claims: Sequence[Claim], setting: Setting, arms: Collection[str]) -> Iterator[Claim]:
    """Yield the claims about some arms and the budgets of a setting, each with those of its own that are there."""
    for claim in claims:
        controls = tuple(control for control in claim.controls if control in arms)
        macs = claim.macs and tuple(budget for budget in claim.macs if budget in setting.macs)
        if claim.treatment in arms and controls and macs != ():
            yield replace(claim, controls=controls, macs=macs)


def _check(paper: Paper, others: Sequence[Setting], path: Path) -> None:
    """Check what one field says about another."""
    budgets = [budget for setting in (paper.setting, *others) for budget in setting.macs]
    ids = [claim.id for claim in paper.claims]
    for setting in (paper.setting, *others):
        if strange := [name for name in setting.arms or () if name not in paper.arms]:
            raise ValueError(f"setting: arms is {strange[0]!r}; legal values are {', '.join(paper.arms)}")
    for claim in paper.claims:
        for field, value, legal in (
            ("rule", claim.rule, RULES),
            ("metric", claim.metric, METRICS),
            ("treatment", claim.treatment, tuple(paper.arms)),
            *(("controls", control, tuple(paper.arms)) for control in claim.controls),
            *(("macs", budget, budgets) for budget in claim.macs or ()),
        ):
            if value not in legal:
                options = ", ".join(map(str, legal))
                raise ValueError(f"claims.{claim.id}: {field} is {value!r}; legal values are {options}")
        if not claim.controls:
            raise ValueError(f"claims.{claim.id}: controls is empty; a claim needs something to be compared with")
        if claim.margin < 0 or (claim.margin > 0) != (claim.rule == "not worse"):
            raise ValueError(f"claims.{claim.id}: margin is {claim.margin}; it is > 0 with 'not worse', else absent")
    for name, arm in paper.arms.items():
        for field, given, known in (("by_effort", arm.by_effort, EFFORTS), ("by_model", arm.by_model, NAMES)):
            if strange := sorted(set(given) - set(known)):
                raise ValueError(f"arms.{name}: {field} is {strange[0]!r}; legal values are {', '.join(known)}")
    if paper.notebook != path.stem:
        raise ValueError(f"notebook is {paper.notebook!r}; it must be the file's name, {path.stem!r}")
    if len(set(ids)) < len(ids) or sum(claim.headline for claim in paper.claims) != 1:
        raise ValueError("claims: ids must differ, and exactly one has headline = true")
    if sum(number.headline for number in paper.numbers) > 1:
        raise ValueError("numbers: at most one has headline = true")
