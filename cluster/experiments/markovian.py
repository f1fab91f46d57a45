"""Tables 5 and 6: does it help to have the past in the prompt?"""

from collections.abc import Iterator

from cluster.experiments.description import PPO, Bars, Column, Experiment, Task, Variant

PROMPTS = {"Markovian": "markov", "non-Markovian": "history"}
LOSSES = {"PPO": PPO, "SubTB": ("objective.loss=subtb", "rollout.expert_on_failure=true")}
TASKS: dict[Task, str] = {"numberline": "NumberLine", "blackjack": "Blackjack", "alfworld": "ALFWorld"}

PAPER = {
    "ALFWorld, PPO, Markovian": {"success": 21.7, "ood": 4.8, "div_at_16": 1.12},
    "ALFWorld, PPO, non-Markovian": {"success": 22.1, "ood": 6.1, "div_at_16": 1.11},
    "ALFWorld, SubTB, non-Markovian": {"success": 26.1, "ood": 12.3, "div_at_16": 1.40},
}


def _variants() -> Iterator[Variant]:
    for task, title in TASKS.items():
        for method, overrides in LOSSES.items():
            for prompts, setting in PROMPTS.items():
                name = f"{title}, {method}, {prompts}"
                settings = (*overrides, f"task.prompt={setting}", "evaluation.samples=16")
                yield Variant(name, task, settings, paper=PAPER.get(name, {}))


MARKOVIAN = Experiment(
    name="markovian",
    title="prompts with and without the past, PPO and SubTB, on three tasks",
    source="Tables 5 and 6",
    variants=tuple(_variants()),
    columns=(
        Column("start", "success before training", before=True),
        Column("success", "success"),
        Column("ood", "out-of-distribution success", split="ood"),
        Column("div_at_16", "Div@16", "div_at_n", percent=False),
    ),
    picture=Bars(("success", "ood")),
    notes=(
        "The paper's figures are ALFWorld's, from its Table 4.",
        "The tiny models learned their answers from prompts with the past; compare with the success before training.",
    ),
)
