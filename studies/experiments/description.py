"""What an experiment is: variants of a run, what is measured of them, and the paper's figures beside it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from gflowvlm.studies.experiments.sweep import Axis

Scale = Literal["tiny", "paper"]
SCALES: tuple[Scale, ...] = get_args(Scale)

Task = Literal["numberline", "blackjack", "numbersequence", "alfworld"]

PAPER = "GFlowVLM (Kang et al., CVPR 2025, arXiv 2503.06514)"
PAPER_MODEL = "LLaVA-1.6-Mistral-7B"

PPO = ("objective.loss=ppo", "rollout.expert_on_failure=false", "rollout.epsilon=0.0")
"""Overrides that make PPO of any preset: whatever else it uses to get off-policy data is left out."""

_PRESET_STEMS: Mapping[Task, str] = {"numbersequence": "sequence"}
_PRESET_ENDS: Mapping[Scale, str] = {"tiny": "tiny", "paper": "7b"}


@dataclass(frozen=True)
class WarmStart:
    """A model that is made by `gflowvlm sft` before the runs that start from it, once for an experiment.

    Attributes:
        name: Name of its folder.
        arguments: Arguments of `gflowvlm sft`, without ``--out``.
    """

    name: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """One line of an experiment's table: a preset with overrides, run with every seed.

    Attributes:
        name: What it is called in tables and pictures; different for each variant of an experiment.
        task: Its task, which with the scale fixes the preset.
        overrides: Settings that differ from the preset, ``section.key=value``.
        warm_starts: The model it starts from at a scale; the preset's where there is none.
        paper: The paper's figures, by column key.
        value: Where it stands on the x axis of a `Line`.
        missing: Why there are no runs of it at a scale; nothing where there are.
    """

    name: str
    task: Task
    overrides: tuple[str, ...] = ()
    warm_starts: Mapping[Scale, WarmStart] = field(default_factory=dict)
    paper: Mapping[str, float] = field(default_factory=dict)
    value: float | None = None
    missing: Mapping[Scale, str] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """Its name in folders and on the command line."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")

    def preset(self, scale: Scale) -> str:
        """Returns the name of its preset."""
        return f"{_PRESET_STEMS.get(self.task, self.task)}-{_PRESET_ENDS[scale]}"


@dataclass(frozen=True)
class Column:
    """One measured figure.

    Attributes:
        key: Its name in the CSV file.
        title: Its head in the table.
        figure: Name of a figure of `Evaluation`.
        split: ``id`` or ``ood``.
        temperature: Sampling temperature. At 1 the run's own final report has it; at any other the finished run
            is evaluated again, on the same instances.
        category: Kind of task, where `figure` is by kind.
        before: Whether it is of the policy before training.
        percent: Whether it is a share that is shown in percent.
    """

    key: str
    title: str
    figure: str = "success"
    split: str = "id"
    temperature: float = 1.0
    category: str | None = None
    before: bool = False
    percent: bool = True


@dataclass(frozen=True)
class Bars:
    """A picture with a group of bars for each column: one bar a variant, the paper's figure as a mark on it.

    Attributes:
        columns: Keys of the columns.
    """

    columns: tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """A picture of columns over the variants' values.

    Attributes:
        columns: Keys of the columns.
        axis: Title of the x axis.
    """

    columns: tuple[str, ...]
    axis: str


@dataclass(frozen=True)
class Experiment:
    """A whole experiment.

    Attributes:
        name: Its name on the command line.
        title: One line: what is asked.
        source: Where it stands in the paper.
        variants: The lines of its table.
        columns: The figures in them.
        picture: What is drawn beside the training curves.
        axis: What the training curves are drawn over.
        notes: What a reader of the table has to know.
    """

    name: str
    title: str
    source: str
    variants: tuple[Variant, ...]
    columns: tuple[Column, ...]
    picture: Bars | Line
    axis: Axis = "step"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        slugs = [variant.slug for variant in self.variants]
        keys = {column.key for column in self.columns}
        if len(set(slugs)) < len(slugs) or len(keys) < len(self.columns):
            raise ValueError(f"experiment {self.name}: variants and columns must have different names")
        used = {*self.picture.columns, *(key for variant in self.variants for key in variant.paper)}
        if not used <= keys:
            raise ValueError(f"experiment {self.name}: no column {', '.join(sorted(used - keys))}")
