"""ALFWorld's lexicon: it covers every prompt without history and every response."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gflowvlm.envs.household import lexicon
from gflowvlm.envs.household.environment import AlfworldEnv
from gflowvlm.envs.household.tasks import TaskType
from gflowvlm.learner.tiny_policy import build_lexicon_tokenizer
from gflowvlm.shared.response import DONE_TOKEN
from tests.shared.json_answers import parse_response


@pytest.fixture(scope="module")
def tokenizer(games_root: object) -> Any:
    return build_lexicon_tokenizer(lexicon.lexicon())


@pytest.mark.parametrize("task_type", TaskType)
def test_the_experts_prompts_and_responses_have_a_token_for_every_word(
    make_env: Callable[..., AlfworldEnv], tokenizer: Any, task_type: TaskType
) -> None:
    env = make_env(task_types=[task_type.value], prompt="markov")
    rng = np.random.default_rng(0)
    for seed in range(2):
        env.reset(seed=seed)
        while env.end is None:
            action = env.expert_action()
            response = env.demonstration(action, rng)
            for text in (f"\n{env.prompt()}", response):
                ids = tokenizer.encode(text)
                assert tokenizer.decode(ids) == text
                words = {tokenizer.decode([i]).strip() for i in ids} - {",", "."}
                # A single character is a byte: a word that fell apart. Numbers stand alone.
                assert [word for word in words if len(word) < 2 and not word.isdigit()] == []
            assert parse_response(response).action == action
            env.step(action)


def test_a_command_is_few_tokens_and_the_same_name_is_always_the_same_token(tokenizer: Any) -> None:
    def pieces(text: str) -> list[str]:
        return [tokenizer.decode([i]) for i in tokenizer.encode(text)]

    assert pieces("take mug 1 from diningtable 2") == ["take ", "mug", " 1", " from ", "diningtable", " 2"]
    assert pieces(", move mug 1 to shelf 12") == [", move ", "mug", " 1", " to ", "shelf", " 1", "2"]
    assert pieces("look, ") == ["look", ", "]
    assert pieces(f"put a mug in cart{DONE_TOKEN}") == ["put a ", "mug", " in ", "cart", DONE_TOKEN]
