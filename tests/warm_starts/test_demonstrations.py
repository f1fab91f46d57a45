"""Demonstrations: reproducible, noisy as asked, true in what they state, apart from all other instances."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gflowvlm.envs.blackjack.settings import BlackjackSettings
from gflowvlm.envs.numberline.settings import NumberLineSettings
from gflowvlm.envs.numbersequence.settings import NumberSequenceSettings
from gflowvlm.envs.registry import make_env
from gflowvlm.learner.sft import SftExample
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.response import DONE_TOKEN
from gflowvlm.shared.task_settings import TaskSettings
from gflowvlm.warm_starts.demonstrations import (
    Demonstrations,
    RecordedExamples,
    RepeatedExamples,
    instance_sources,
    reading_source,
)
from tests.actors.made_demonstrations import make_set
from tests.shared.json_answers import parse_response

SETTINGS = NumberLineSettings()


def batches(
    count: int, noise: float = 0.5, with_done: bool = True, ood: bool = False, seed: int = 0, detours: float = 0.0
) -> list[SftExample]:
    source = Demonstrations(instance_sources(SETTINGS, ood), noise, with_done, seed, detours=detours)
    return [example for step in range(count) for example in source.batch(step, 32)]


def expert_share(examples: list[SftExample]) -> float:
    right = 0
    for example in examples:
        response = parse_response(example.response)
        current, target = response.fields["current"], response.fields["target"]
        right += response.action == {-1: "+", 0: "[DONE]", 1: "-"}[int(np.sign(current - target))]
    return right / len(examples)


def test_a_step_has_the_same_examples_at_every_call_and_in_any_order() -> None:
    source = Demonstrations(instance_sources(SETTINGS, True), 0.5, True, seed=3)
    late, early = source.batch(40, 8), source.batch(2, 8)
    again = Demonstrations(instance_sources(SETTINGS, True), 0.5, True, seed=3)
    assert again.batch(2, 8) == early
    assert again.batch(40, 8) == late
    assert Demonstrations(instance_sources(SETTINGS, True), 0.5, True, seed=4).batch(2, 8) != early


def test_on_detours_the_expert_shows_what_to_do_where_it_would_not_have_gone() -> None:
    def turned(examples: list[SftExample]) -> float:
        pasts = [{action for action in "+-" if f": {action}\n" in example.prompt} for example in examples]
        return sum(past == {"+", "-"} for past in pasts) / len(pasts)

    straight, detoured = batches(20, noise=0.0), batches(20, noise=0.0, detours=0.5)
    assert expert_share(straight) == expert_share(detoured) == 1.0
    assert turned(straight) == 0.0
    assert turned(detoured) > 0.1


def test_steps_have_different_examples() -> None:
    examples = batches(20)
    assert len({example.image for example in examples}) > 0.95 * len(examples)


@pytest.mark.parametrize(("noise", "expected"), [(0.0, 1.0), (0.5, 0.5 + 0.5 / 3), (1.0, 1 / 3)])
def test_noise_is_the_share_of_random_actions(noise: float, expected: float) -> None:
    assert expert_share(batches(40, noise)) == pytest.approx(expected, abs=0.05)


def test_without_done_the_stop_action_is_never_shown() -> None:
    actions = Counter(parse_response(e.response).action for e in batches(10, with_done=False))
    assert set(actions) == {"+", "-"}


def test_in_distribution_alone_shows_only_its_numbers() -> None:
    numbers = {parse_response(e.response).fields["current"] for e in batches(10)}
    assert numbers == set(range(SETTINGS.n_max + 1))


def test_out_of_distribution_numbers_are_all_shown() -> None:
    numbers = {parse_response(e.response).fields["current"] for e in batches(60, ood=True)}
    assert numbers >= set(range(SETTINGS.ood_high + 1))


def test_states_in_the_midst_of_episodes_are_shown() -> None:
    assert sum("State 1" in e.prompt for e in batches(4)) > 32


def test_the_reading_stage_leaves_the_prompt_out_and_then_ends() -> None:
    reading = reading_source(SETTINGS, True)
    source = Demonstrations(instance_sources(SETTINGS, True), 0.5, True, 0, reading, reading_steps=32)
    reading = [example for step in range(32) for example in source.batch(step, 8)]
    assert all(example.prompt == "" for example in reading)
    fields = [parse_response(example.response).fields for example in reading]
    assert np.mean([abs(f["current"] - f["target"]) > SETTINGS.ood_max_distance for f in fields]) > 0.5
    assert all(example.prompt != "" for example in source.batch(32, 8))


@pytest.mark.parametrize("settings", [BlackjackSettings(), NumberSequenceSettings(continuation=2)])
@pytest.mark.parametrize("ood", [False, True])
def test_other_tasks_are_demonstrated_too(settings: TaskSettings, ood: bool) -> None:
    reading = reading_source(settings, ood)
    source = Demonstrations(instance_sources(settings, ood), 0.5, True, 0, reading, reading_steps=16)
    reading, played = source.batch(0, 16), [e for step in range(16, 24) for e in source.batch(step, 16)]
    assert all(example.prompt == "" for example in reading)
    for example in played:
        actions = next(line for line in example.prompt.split("\n") if line.startswith("Actions: ")).split()[1:]
        assert parse_response(example.response).action in actions
    assert any(parse_response(e.response).action == "[DONE]" for e in played)
    assert sum("State 1" in e.prompt for e in played) > 16


def test_repeated_examples_are_those_of_the_first_steps_in_another_order_each_time() -> None:
    fresh = batches(3)
    source = RepeatedExamples(Demonstrations(instance_sources(SETTINGS, False), 0.5, True, seed=0), 3)
    rounds = [[e for step in range(first, first + 3) for e in source.batch(step, 32)] for first in (0, 3, 6)]
    assert rounds[0] == fresh
    for later in rounds[1:]:
        assert later != fresh
        assert Counter(map(repr, later)) == Counter(map(repr, fresh))
    assert rounds[1] != rounds[2]
    again = RepeatedExamples(Demonstrations(instance_sources(SETTINGS, False), 0.5, True, seed=0), 3)
    assert again.batch(7, 32) == source.batch(7, 32)


def test_examples_that_teach_reading_are_not_repeated() -> None:
    reading = reading_source(SETTINGS, True)
    played = Demonstrations(instance_sources(SETTINGS, False), 0.5, True, seed=0, reading=reading, reading_steps=16)
    assert played.reading_steps == 16
    source = RepeatedExamples(played, 18, played.reading_steps)
    assert all(e.prompt == "" for step in range(16) for e in source.batch(step, 8))
    fresh = Counter(repr(e) for step in (16, 17) for e in source.batch(step, 8))
    for first in (18, 20):
        assert Counter(repr(e) for step in (first, first + 1) for e in source.batch(step, 8)) == fresh


def test_a_detour_is_never_the_demonstrated_action() -> None:
    played = Demonstrations(instance_sources(SETTINGS, False), 0.0, True, seed=0, detours=1.0)
    environment = make_env(SETTINGS)
    rng = np.random.default_rng(0)
    for seed in range(20):
        environment.reset(seed=seed)
        actions = [action for action in environment.admissible_actions if action != DONE_TOKEN]
        for action in actions:
            assert played._played(environment, action, rng) != action


def test_recorded_examples_are_those_of_the_set_in_another_order_in_each_pass(tmp_path: Path) -> None:
    trajectories = list(make_set(tmp_path).trajectories())
    source = RecordedExamples(trajectories, with_done=True, seed=0)
    steps = [(t.images[step.image], step) for t in trajectories for step in t.steps]
    wanted = Counter(repr(SftExample(step.prompt, image, step.response_text)) for image, step in steps)
    passes = [source.batch(number, len(steps)) for number in range(3)]
    assert all(Counter(map(repr, examples)) == wanted for examples in passes)
    assert passes[0] != passes[1] != passes[2]
    # Batches of another size are cut from the same row of examples, over the end of a pass too.
    row = [example for examples in passes for example in examples]
    assert [e for number in range(3) for e in source.batch(number, len(steps) - 1)] == row[:-3]
    again = RecordedExamples(trajectories, with_done=True, seed=0)
    assert again.batch(2, len(steps)) == passes[2]
    assert RecordedExamples(trajectories, with_done=True, seed=1).batch(0, len(steps)) != passes[0]


def test_a_batch_may_be_larger_than_the_set(tmp_path: Path) -> None:
    source = RecordedExamples(make_set(tmp_path, trajectories=1).trajectories(), with_done=True, seed=0)
    assert len(source.batch(3, 64)) == 64


def test_recorded_responses_that_stop_can_be_left_out(tmp_path: Path) -> None:
    trajectories = list(make_set(tmp_path).trajectories())
    source = RecordedExamples(trajectories, with_done=False, seed=0)
    shown = source.batch(0, sum(t.length for t in trajectories))
    assert "[DONE]" not in {parse_response(example.response).action for example in shown}
    at_the_target = [
        replace(t, steps=t.steps[-1:], log_rewards=t.log_rewards[-1:], original_rewards=t.original_rewards[-1:])
        for t in trajectories
    ]
    with pytest.raises(UserError, match="no response in them is to be learned"):
        RecordedExamples(at_the_target, with_done=False, seed=0)
