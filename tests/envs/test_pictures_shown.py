"""How many pictures of an episode a policy is shown."""

import pytest

from gflowvlm.envs.registry import make_env
from gflowvlm.shared.pictures import decode_pictures
from gflowvlm.shared.task_settings import task_settings_class


@pytest.mark.parametrize("task", ["numberline", "blackjack"])
def test_the_last_states_are_shown_the_current_one_last(task):
    settings = task_settings_class(task)
    env, single = (make_env(settings(pictures=count)) for count in (3, 1))
    seen: list[bytes] = []
    seed = 5
    for one in (env, single):
        one.reset(seed=seed)
    for _ in range(4):
        assert single.shown() == single.image_png() == env.image_png()
        seen.append(single.image_png())
        shown = [picture.tobytes() for picture in decode_pictures(env.shown())]
        assert shown == [decode_pictures(one)[0].tobytes() for one in seen[-3:]]
        action = next(action for action in env.admissible_actions if action != "[DONE]")
        for one in (env, single):
            one.step(action)
        if env.end is not None:
            break
    env.reset(seed=seed)
    assert len(decode_pictures(env.shown())) == 1


def test_a_branch_has_its_own_past():
    env = make_env(task_settings_class("numberline")(pictures=2))
    env.reset(seed=0)
    other = env.branch()
    other.step(next(action for action in other.admissible_actions if action != "[DONE]"))
    assert len(decode_pictures(other.shown())) == 2
    assert len(decode_pictures(env.shown())) == 1
