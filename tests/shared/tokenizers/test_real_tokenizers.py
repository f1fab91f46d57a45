"""The same with tokenizers of real models, over all actions of the tasks; skipped unless `fetch.py` got them."""

import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from gflowvlm.envs.registry import make_env
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.task_settings import default_settings, task_names
from tests.shared.tokenizers.made import ACTIONS, DONE, FIELDS, THOUGHTS, inputs_of
from tests.shared.tokenizers.response_checks import check_actions, check_round_trip, in_other_tokens

FOLDER = Path(os.environ.get("GFLOWVLM_TOKENIZERS", "/nowhere"))
FAMILIES = sorted(path.name for path in FOLDER.iterdir()) if FOLDER.is_dir() else []
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FAMILIES, reason="GFLOWVLM_TOKENIZERS=DIR: see fetch.py"),
]
every_family = pytest.mark.parametrize("family", FAMILIES or ["none"])
every_tokenizer = pytest.mark.parametrize("done", DONE)
every_format = pytest.mark.parametrize("answers_as", ["json", "tags"])


@cache
def tokenizer(family: str, done: str) -> Any:
    folder = FOLDER / family
    made = AutoTokenizer.from_pretrained(folder if (folder / "tokenizer.json").exists() else folder / "models")
    added = DONE[done]
    if added is not None:
        made.add_tokens([added])
    return made


@cache
def played(answers_as: str) -> list[tuple[str, tuple[str, ...]]]:
    """Returns demonstrations of all tasks with the admissible actions in their places, the first one's first."""
    found = []
    for name in task_names():
        if name == "alfworld" and find_spec("alfworld") is None:
            continue
        env = make_env(default_settings(name).model_copy(update={"answer_format": answers_as}))
        for seed in range(6):
            env.reset(seed=seed, options={"split": ("id", "ood")[seed % 2]})
            while env.end is None:
                actions = tuple(env.admissible_actions)
                found += [(text, actions) for text in env.demonstrations(actions[0])]
                env.step(env.expert_action())
    return found


def written(inputs: PolicyInputs) -> list[tuple[str, tuple[str, ...]]]:
    render = inputs.answer_format.render
    return [
        (render(actions[0], thought, FIELDS[number % len(FIELDS)]), tuple(a for a in actions if a.strip() == a))
        for number, thought in enumerate(THOUGHTS)
        for actions in ACTIONS
    ]


@every_format
@every_tokenizer
@every_family
def test_answers_come_back_and_actions_add_up_to_one_at_most(family: str, done: str, answers_as: str) -> None:
    inputs = inputs_of(tokenizer(family, done), answers_as)
    rng = np.random.default_rng(3)
    scored = 0
    for number, (text, actions) in enumerate([*played(answers_as), *written(inputs)]):
        response = check_round_trip(inputs, text, actions[0])
        assert check_actions(inputs, response, actions) == len(actions)
        scored += len(actions)
        if number % 10 == 0:
            response = in_other_tokens(inputs, text, rng)
            assert inputs.read(response).parsed.action == actions[0]
            assert check_actions(inputs, response, actions) == len(actions)
    print(f"{family}, {done}, {answers_as}: {number + 1} chains of thought, {scored} actions")
