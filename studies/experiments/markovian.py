"""Tables 5 and 6: does it help to have the past in the prompt?"""

from collections.abc import Iterator

from gflowvlm.studies.experiments.alfworld import NO_PAST, SAMPLES
from gflowvlm.studies.experiments.description import PPO, Bars, Column, Experiment, Scale, Task, Variant, WarmStart

PROMPTS = {"Markovian": "markov", "non-Markovian": "history"}
LOSSES = {"PPO": PPO, "SubTB": ("objective.loss=subtb", "rollout.expert_on_failure=true")}
TASKS: dict[Task, str] = {"numberline": "NumberLine", "blackjack": "Blackjack", "alfworld": "ALFWorld"}

# The tiny preset plays 200 decks four times; so many sixteen times would take longer than the training.
INSTANCES: dict[Task, tuple[str, ...]] = {"blackjack": ("evaluation.instances=50",)}

PAPER = {
    "ALFWorld, PPO, Markovian": {"success": 21.7, "ood": 4.8, "div_at_16": 1.12},
    "ALFWorld, PPO, non-Markovian": {"success": 22.1, "ood": 6.1, "div_at_16": 1.11},
    "ALFWorld, SubTB, non-Markovian": {"success": 26.1, "ood": 12.3, "div_at_16": 1.40},
}

# The last stage of the shipped models' training (docs/recipe.md), with the other prompts.
TAUGHT: dict[Task, tuple[str, ...]] = {
    "numberline": ("--noise", "0.6", "--steps", "400", "--lr", "1e-3"),
    "blackjack": ("--noise", "0.8", "--steps", "500", "--lr", "1e-3"),
}


def _start(task: Task, prompt: str) -> dict[Scale, WarmStart]:
    """Returns what a policy starts from: the shipped tiny models have learned to answer prompts with the past only."""
    if prompt == "history" or task not in TAUGHT:
        return {}
    shown = ("--task", task, f"prompt={prompt}", "--model", f"{task}-tiny", "--seed", "1", "--episodes", "0")
    return {"tiny": WarmStart(f"{task}-{prompt}", (*shown, *TAUGHT[task]))}


def _variants() -> Iterator[Variant]:
    for task, title in TASKS.items():
        for method, overrides in LOSSES.items():
            for prompts, prompt in PROMPTS.items():
                name = f"{title}, {method}, {prompts}"
                settings = (*overrides, f"task.prompt={prompt}", *SAMPLES, *INSTANCES.get(task, ()))
                missing = NO_PAST if task == "alfworld" else {}
                yield Variant(name, task, settings, _start(task, prompt), PAPER.get(name, {}), missing=missing)


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
        "The shipped tiny models have learned from prompts with the past; where there is none, `gflowvlm sft` teaches "
        "them that first. Compare with the success before training.",
    ),
)
