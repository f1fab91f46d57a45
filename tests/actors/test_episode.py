"""From responses to trajectories: spans, validity, ends, exploration, experts, failures."""

import asyncio
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowvlm.actors.environments import LocalEnvironment
from gflowvlm.actors.episode import ResponseSource, play_group
from gflowvlm.actors.groups import GroupRequest, index_of_group, new_group_id
from gflowvlm.actors.sampling import SampleRequest, SampleResponse, SamplerUnavailableError
from gflowvlm.actors.transformers_sampler import TransformersSampler
from gflowvlm.envs.numberline.environment import NumberLineEnv
from gflowvlm.envs.numberline.settings import NumberLineSettings
from gflowvlm.envs.registry import make_env
from gflowvlm.learner.tiny_policy import build_processor, build_tiny_policy
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.response import DONE_TOKEN
from gflowvlm.shared.trajectory import EndReason, Validity, from_arrow, to_record_batch
from tests.actors.scripted import PLAY, REQUEST, Player, Texts, play


@pytest.fixture(scope="module")
def inputs() -> PolicyInputs:
    return PolicyInputs("numberline-test", build_processor())


def numbers(seed: int = REQUEST.instance_seed, split: str = "id") -> tuple[int, int]:
    env = NumberLineEnv()
    env.reset(seed=seed, options={"split": split})
    return env.current, env.target


def test_a_perfect_player_makes_successful_trajectories(inputs: PolicyInputs) -> None:
    start, goal = numbers()
    player = Player(inputs)
    group = play(player, inputs, version=2)
    assert len(group.trajectories) == 4
    for trajectory in group.trajectories:
        assert trajectory.success
        assert trajectory.end is EndReason.DONE
        assert trajectory.outcome == str(goal)
        assert trajectory.length == abs(goal - start)
        assert trajectory.actions[-1] == DONE_TOKEN
        distances = [abs(goal - start) - t for t in range(trajectory.length + 1)]
        assert trajectory.log_rewards == pytest.approx([math.log(100 / (d + 1)) for d in distances])
        assert trajectory.group_id == group.group_id
        assert (trajectory.instance_id, trajectory.split) == ("numberline/id/11", "id")
        assert not trajectory.expert
    assert {(r.temperature, r.max_tokens, r.version, r.seed) for r in player.requests} == {(1.0, 64, 2, None)}
    assert group.env_seconds > 0
    assert group.wait_seconds > 0


def test_all_rollouts_wait_for_the_policy_at_the_same_time(inputs: PolicyInputs) -> None:
    player = Player(inputs)
    play(player, inputs, group_size=7)
    assert player.together == 7


def test_out_of_distribution_instances_are_played(inputs: PolicyInputs) -> None:
    group = play(Player(inputs), inputs, GroupRequest(0, 4, "ood"))
    assert {t.instance_id for t in group.trajectories} == {"numberline/ood/4"}
    assert int(group.trajectories[0].outcome) == numbers(4, "ood")[1] >= 10


def test_ids_are_new_with_every_attempt_and_tell_the_group(inputs: PolicyInputs) -> None:
    one, two = play(Player(inputs), inputs), play(Player(inputs), inputs)
    ids = [t.trajectory_id for t in one.trajectories + two.trajectories]
    assert len(set(ids)) == 8
    assert index_of_group(one.group_id) == index_of_group(two.group_id) == 5
    assert one.group_id != two.group_id
    assert index_of_group(new_group_id(123_456_789)) == 123_456_789
    assert index_of_group("something else") is None


def test_spans_lie_on_the_sampled_tokens(inputs: PolicyInputs) -> None:
    for trajectory in play(Player(inputs), inputs).trajectories:
        for step in trajectory.steps:
            action = inputs.decode(step.response_ids[step.cot_end : step.action_end])
            closing = "" if step.action == DONE_TOKEN else '"}'
            assert action == f'", "action": "{step.action}{closing}'
            assert inputs.decode(step.stop_ids) == f'", "action": "{DONE_TOKEN}'
            assert len(step.sampler_log_probs) == len(step.response_ids)


def test_pictures_are_stored_once(inputs: PolicyInputs) -> None:
    trajectory = play(Player(inputs), inputs).trajectories[0]
    assert len(trajectory.images) == len(set(trajectory.images))
    assert [step.image for step in trajectory.steps] == list(range(len(trajectory.steps)))
    assert all(image.startswith(b"\x89PNG") for image in trajectory.images)


class _OnePicture(NumberLineEnv):
    def image_png(self) -> bytes:
        return b"the same picture"


def test_equal_pictures_of_several_steps_are_stored_once(inputs: PolicyInputs) -> None:
    source = Texts(inputs, ['{"thoughts": "", "action": "+"}'])
    group = asyncio.run(play_group(lambda: LocalEnvironment(_OnePicture()), source, inputs, REQUEST, PLAY))
    assert group.trajectories[0].images == [b"the same picture"]
    assert {step.image for step in group.trajectories[0].steps} == {0}


def test_the_step_limit_cuts_off(inputs: PolicyInputs) -> None:
    group = play(Texts(inputs, ['{"thoughts": "on", "action": "+"}']), inputs, task=NumberLineSettings(max_steps=3))
    for trajectory in group.trajectories:
        assert trajectory.end is EndReason.STEP_LIMIT
        assert (len(trajectory.steps), trajectory.length) == (3, 3)


HOSTILE = {
    "empty": "",
    "no json": "I think the answer is +",
    "cut off": '{"current": 3, "target": 5, "thoughts": "3 is bel',
    "action not last": '{"action": "+", "thoughts": "x"}',
    "action twice": '{"action": "+", "action": "+"}',
    "nested": '{"a": {"action": "+"}}',
    "deeply nested": '{"a": ' * 3000 + '"action": "+"}',
    "deep list": '{"a": ' + "[" * 5000 + "]" * 5000 + ', "action": "+"}',
    "huge": '{"thoughts": "' + "x" * 30_000 + '", "action": "+"}',
    "huge number": '{"current": ' + "9" * 6000 + ', "action": "+"}',
    "lone surrogate": '{"thoughts": "", "action": "\\ud800"}',
    "another key after": '{"thoughts": "", "action": "+", "more": 1}',
    "end token inside": '{"thoughts": "<end_of_utterance>", "action": "+"',
}

ODD_BUT_READABLE = {
    "unknown action": ('{"thoughts": "", "action": "jump"}', "jump"),
    "empty action": ('{"thoughts": "", "action": ""}', ""),
    "unicode action": ('{"thoughts": "", "action": "左へ🚀"}', "左へ🚀"),
    "null character": ('{"thoughts": "", "action": "\u0000"}', None),
    "long action": ('{"thoughts": "", "action": "' + "+" * 5000 + '"}', "+" * 5000),
    "space around": ('{"thoughts": "", "action": " + "}', " + "),
    "special token": ('{"thoughts": "", "action": "<image>"}', "<image>"),
    "escaped action": ('{"thoughts": "", "action": "\\u002b1"}', "+1"),
    "text after": ('{"thoughts": "", "action": "jump"} and more', "jump"),
    "two objects": ('{"action": "+"}{"action": "jump"}', "jump"),
    "a number": ('{"thoughts": "", "action": 7}', "7"),
    "done inside": ('{"thoughts": "", "action": "[DONE][DONE]"}', "[DONE][DONE]"),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_malformed_response_ends_the_episode_at_the_floor(text: str, inputs: PolicyInputs) -> None:
    group = play(Texts(inputs, ['{"thoughts": "", "action": "+"}', text]), inputs, group_size=1)
    (trajectory,) = group.trajectories
    assert trajectory.end is EndReason.INVALID
    assert not trajectory.success
    assert trajectory.log_rewards[-1] == 0.0
    assert len(trajectory.log_rewards) == len(trajectory.steps) + 1 == 3
    last = trajectory.steps[-1]
    assert (last.action, last.validity) == (None, Validity.MALFORMED)
    assert last.cot_end == last.action_end == len(last.response_ids)
    assert from_arrow(to_record_batch([trajectory])) == [trajectory]


@pytest.mark.parametrize(("text", "action"), ODD_BUT_READABLE.values(), ids=ODD_BUT_READABLE.keys())
def test_an_inadmissible_action_ends_the_episode_at_the_floor(
    text: str, action: str | None, inputs: PolicyInputs
) -> None:
    (trajectory,) = play(Texts(inputs, [text]), inputs, group_size=1).trajectories
    assert trajectory.end is EndReason.INVALID
    assert trajectory.log_rewards[-1] == 0.0
    assert trajectory.outcome == "invalid"
    (step,) = trajectory.steps
    assert step.action == action
    assert step.validity is (Validity.MALFORMED if action is None else Validity.INADMISSIBLE)
    assert step.response_text == text
    assert from_arrow(to_record_batch([trajectory])) == [trajectory]


@settings(max_examples=60, deadline=None)
@given(token_ids=st.lists(st.integers(0, 300), min_size=1, max_size=40))
def test_no_sampled_tokens_make_an_episode_raise(token_ids: list[int]) -> None:
    inputs = PolicyInputs("numberline-test", _PROCESSOR)

    class Raw:
        async def sample(self, request: SampleRequest) -> SampleResponse:
            return SampleResponse(token_ids, [-1.0] * len(token_ids), inputs.decode(token_ids), 0)

    (trajectory,) = play(Raw(), inputs, group_size=1, epsilon=0.5).trajectories
    assert trajectory.steps[-1].response_ids[: len(token_ids)] == token_ids
    assert to_record_batch([trajectory]).num_rows == 1


_PROCESSOR = build_processor()


# Exploration


def test_exploration_keeps_the_thoughts_and_forces_the_action(inputs: PolicyInputs) -> None:
    text = '{"current": 1, "target": 3, "thoughts": "1 is below 3", "action": "[DONE]"}'
    group = play(Texts(inputs, [text]), inputs, group_size=40, epsilon=1.0)
    firsts = [trajectory.steps[0] for trajectory in group.trajectories]
    assert {step.action for step in firsts} == {"+", "-", DONE_TOKEN}
    sampled = inputs.encode_response(text)
    for step in firsts:
        assert step.validity is Validity.VALID
        # Exactly what a demonstration of that action would be, its thoughts the sampled tokens.
        assert step.response_ids == inputs.encode_response(text.replace(DONE_TOKEN, str(step.action)))
        assert step.response_ids[: step.cot_end] == sampled[: step.cot_end]
        assert step.sampler_log_probs[: step.cot_end] == [-0.25] * step.cot_end
        assert all(math.isnan(p) for p in step.sampler_log_probs[step.cot_end :])
        action = inputs.decode(step.response_ids[step.cot_end : step.action_end])
        assert action.removesuffix('"}') == f'", "action": "{step.action}'
        assert step.policy_version == 3


def test_exploration_happens_with_probability_epsilon_and_is_repeatable(inputs: PolicyInputs) -> None:
    def forced(seed: int) -> list[list[bool]]:
        group = play(Player(inputs), inputs, group_size=60, epsilon=0.25, seed=seed)
        return [[math.isnan(s.sampler_log_probs[-1]) for s in t.steps] for t in group.trajectories]

    steps = [flag for flags in forced(0) for flag in flags]
    assert abs(sum(steps) / len(steps) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / len(steps))
    assert forced(0) == forced(0) != forced(1)


def test_without_epsilon_every_token_was_sampled(inputs: PolicyInputs) -> None:
    group = play(Player(inputs), inputs)
    assert not any(math.isnan(p) for t in group.trajectories for s in t.steps for p in s.sampler_log_probs)


def test_exploration_keeps_sampled_thoughts_that_are_not_the_tokenizers_own_tokens(inputs: PolicyInputs) -> None:
    def by_character(text: str) -> list[int]:
        ids = [i for character in text for i in inputs.tokenizer.encode(character, add_special_tokens=False)]
        return [*ids, inputs.end_id]

    source = Texts(inputs, ['{"thoughts": "below", "action": "+"}'], tokenise=by_character)
    group = play(source, inputs, group_size=20, epsilon=1.0)
    firsts = [trajectory.steps[0] for trajectory in group.trajectories]
    assert {step.action for step in firsts} == {"+", "-", DONE_TOKEN}
    kept = len(by_character('{"thoughts": "below", "action": ')) - 1
    for step in firsts:
        assert step.cot_end == kept
        assert step.response_ids[:kept] == by_character('{"thoughts": "below", "action": ')[:-1]
        assert step.response_text == f'{{"thoughts": "below", "action": "{step.action}"}}'
        assert step.sampler_log_probs[:kept] == [-0.25] * kept
        assert math.isnan(step.sampler_log_probs[kept])


def test_a_response_whose_action_no_tokens_can_replace_stays_and_is_counted(inputs: PolicyInputs) -> None:
    class Rigid(PolicyInputs):
        def with_action(self, token_ids: Sequence[int], action: str) -> list[int] | None:
            return None

    rigid = Rigid(inputs.model, inputs.processor)
    source = Texts(rigid, ['{"thoughts": "below", "action": "+"}'])
    group = play(source, rigid, group_size=3, epsilon=1.0, task=NumberLineSettings(max_steps=2))
    assert group.unexplored == 6
    assert all(t.actions == ("+", "+") for t in group.trajectories)
    assert play(source, inputs, group_size=3, epsilon=1.0).unexplored == 0


def test_a_malformed_response_is_not_explored_away(inputs: PolicyInputs) -> None:
    group = play(Texts(inputs, ["nonsense"]), inputs, epsilon=1.0)
    assert {t.end for t in group.trajectories} == {EndReason.INVALID}


# Experts


def test_the_expert_joins_a_group_in_which_all_failed(inputs: PolicyInputs) -> None:
    group = play(Texts(inputs, ["nonsense"]), inputs, expert_on_failure=True)
    *failed, expert = group.trajectories
    assert len(failed) == 4
    assert not any(t.success or t.expert for t in failed)
    assert expert.expert
    assert expert.success
    assert (expert.group_id, expert.instance_id) == (failed[0].group_id, failed[0].instance_id)
    assert expert.images[0] == failed[0].images[0]
    start, goal = numbers()
    assert expert.length == abs(goal - start)
    for step in expert.steps:
        assert step.policy_version == -1
        assert step.validity is Validity.VALID
        assert all(math.isnan(p) for p in step.sampler_log_probs)
        assert step.response_ids == inputs.encode_response(step.response_text)
        assert json.loads(step.response_text)["action"] == step.action
    assert len({t.trajectory_id for t in group.trajectories}) == 5


def test_one_success_is_enough_to_do_without_the_expert(inputs: PolicyInputs) -> None:
    group = play(Player(inputs), inputs, expert_on_failure=True)
    assert [t.expert for t in group.trajectories] == [False] * 4


def test_where_the_expert_plays_the_policy_is_not_asked(inputs: PolicyInputs) -> None:
    policy = Texts(inputs, ["nonsense"])
    group = play(policy, inputs, group_size=3, expert_plays=True)
    assert policy.requests == []
    assert [t.expert for t in group.trajectories] == [True] * 3
    assert all(t.success and t.end is EndReason.DONE for t in group.trajectories)
    assert len({t.trajectory_id for t in group.trajectories}) == 3
    worded = {tuple(step.response_text for step in t.steps) for t in group.trajectories}
    assert len(worded) > 1


def test_the_expert_stays_out_unless_asked_for(inputs: PolicyInputs) -> None:
    assert len(play(Texts(inputs, ["nonsense"]), inputs).trajectories) == 4


# Failures and repeatability


class _FailsOnce:
    """Answers all but one request, which fails; counts the rollouts that went on regardless."""

    def __init__(self, source: ResponseSource) -> None:
        self.source = source
        self.asked = 0
        self.answered = 0

    async def sample(self, request: SampleRequest) -> SampleResponse:
        self.asked += 1
        if self.asked == 3:
            raise SamplerUnavailableError("the replica died")
        await asyncio.sleep(0.02)
        self.answered += 1
        return await self.source.sample(request)


def test_a_response_that_cannot_be_had_fails_the_group_and_stops_its_rollouts(inputs: PolicyInputs) -> None:
    source = _FailsOnce(Texts(inputs, ["nonsense"]))

    async def scenario() -> None:
        with pytest.raises(SamplerUnavailableError, match="the replica died"):
            await play_group(lambda: LocalEnvironment(make_env(NumberLineSettings())), source, inputs, REQUEST, PLAY)
        await asyncio.sleep(0.05)

    asyncio.run(scenario())
    assert source.answered == 0


def test_sampling_seeds_are_repeatable_and_all_different(inputs: PolicyInputs) -> None:
    def seeds(sampling_seed: int) -> list[int | None]:
        player = Player(inputs)
        play(player, inputs, sampling_seed=sampling_seed)
        return sorted(r.seed for r in player.requests if r.seed is not None)

    assert len(set(seeds(1))) == len(seeds(1)) >= 8
    assert seeds(1) == seeds(1) != seeds(2)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_policy(tmp_path_factory.mktemp("model"), seed=0)


def test_a_real_sampler_with_random_weights_plays(model_dir: Path) -> None:
    sampler = TransformersSampler(RunConfig(), str(model_dir))
    inputs = PolicyInputs.load(str(model_dir))
    try:
        group = play(sampler, inputs, max_tokens=12)
    finally:
        sampler.shutdown()
    for trajectory in group.trajectories:
        # Random weights write nonsense that nearly always goes on and on.
        assert trajectory.end in (EndReason.RESPONSE_CUT, EndReason.INVALID)
        assert len(trajectory.steps) == (trajectory.end is EndReason.INVALID)
        assert all(p <= 0 for step in trajectory.steps for p in step.sampler_log_probs)
    assert any(t.end is EndReason.RESPONSE_CUT for t in group.trajectories)
