"""Episodes that a limit of tokens cuts off: a response that is too long, a prompt that leaves no room."""

import pytest

from gflowvlm.actors.groups import GroupRequest
from gflowvlm.actors.sampling import PromptTooLongError, SampleRequest, SampleResponse
from gflowvlm.envs.numberline.environment import NumberLineEnv
from gflowvlm.learner.tiny_policy import build_processor
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.trajectory import EndReason, Validity, from_arrow, to_record_batch
from tests.actors.scripted import play


@pytest.fixture(scope="module")
def inputs() -> PolicyInputs:
    return PolicyInputs("numberline-test", build_processor())


class _Limited:
    """Answers with texts in turn, the last one for ever; those marked with ✂ were cut off there by a limit.

    None stands for a prompt that leaves no room.
    """

    def __init__(self, inputs: PolicyInputs, texts: list[str | None]) -> None:
        self.inputs, self.texts = inputs, texts

    async def sample(self, request: SampleRequest) -> SampleResponse:
        text = self.texts.pop(0) if len(self.texts) > 1 else self.texts[0]
        if text is None:
            raise PromptTooLongError.of(600, 512)
        cut = text.endswith("✂")
        token_ids = self.inputs.encode_response(text.removesuffix("✂"))
        token_ids = token_ids[:-1] if cut else token_ids
        return SampleResponse(token_ids, [-0.5] * len(token_ids), self.inputs.decode(token_ids), 3, cut)


STEP = '{"thoughts": "on", "action": "+"}'


@pytest.mark.parametrize(
    ("texts", "end", "steps"),
    [
        ([STEP, '{"thoughts": "on, and ✂'], EndReason.RESPONSE_CUT, 1),
        ([STEP, STEP, '{"thoughts": "on", "action": "✂'], EndReason.RESPONSE_CUT, 2),
        (["so much to sa✂"], EndReason.RESPONSE_CUT, 0),
        ([STEP, STEP, None], EndReason.PROMPT_TOO_LONG, 2),
    ],
)
def test_a_limit_of_tokens_ends_an_episode_as_an_incomplete_trajectory_and_not_at_the_floor(
    texts: list[str | None], end: EndReason, steps: int, inputs: PolicyInputs
) -> None:
    group = play(_Limited(inputs, texts), inputs, GroupRequest(0, 4, "ood"), group_size=1)
    (trajectory,) = group.trajectories
    assert trajectory.end is end
    assert (trajectory.success, trajectory.outcome) == (False, "cut off")
    assert (len(trajectory.steps), trajectory.length, len(trajectory.images)) == (steps, steps, steps)
    assert all(step.validity is Validity.VALID for step in trajectory.steps)
    # The reward of the state where it was cut off, whatever that is: not the floor of an invalid response.
    assert trajectory.log_rewards[-1] > NumberLineEnv.log_reward_floor
    assert from_arrow(to_record_batch([trajectory])) == [trajectory]


def test_a_response_that_reaches_its_limit_behind_its_action_counts(inputs: PolicyInputs) -> None:
    (trajectory,) = play(_Limited(inputs, [STEP + "✂"]), inputs, group_size=1).trajectories
    assert not trajectory.end.by_token_limit
    assert trajectory.actions[0] == "+"


def test_a_first_prompt_without_room_fails_the_group_by_name(inputs: PolicyInputs) -> None:
    with pytest.raises(PromptTooLongError, match=r"^numberline/id/11: a prompt of 600 tokens leaves no room in"):
        play(_Limited(inputs, [None]), inputs)
