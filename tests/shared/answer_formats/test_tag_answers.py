import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gflowvlm.shared.answer_formats.tag_answers import TagAnswers
from gflowvlm.shared.response import DONE_TOKEN

ANSWERS = TagAnswers()


def test_an_answer_is_read_back_with_the_actions_place():
    text = ANSWERS.render("+", "3 is below 5", {"current": 3, "target": 5})
    assert text == "<current>3</current><target>5</target><think>3 is below 5</think><action>+</action>"
    parsed = ANSWERS.parse(text)
    assert (parsed.action, parsed.thoughts, parsed.fields) == ("+", "3 is below 5", {"current": "3", "target": "5"})
    assert text[slice(*parsed.action_chars)] == "+"
    assert text[slice(*parsed.frame_chars)] == ">+<"


def test_the_prompt_shows_the_tags():
    asked = ANSWERS.instruction({"current": int})
    assert asked == "Answer: <current>...</current><think>...</think><action>...</action>"


@pytest.mark.parametrize(
    "text", ["", "+", "<action>", "<action>+", "<action>a<b</action>", "<think>+</think>", "x" * 20_001]
)
def test_what_has_no_action_in_tags_is_malformed(text):
    assert ANSWERS.parse(text).malformed


@pytest.mark.parametrize(
    ("text", "action", "thoughts"),
    [
        ("<think>\nup, as 3 < 5\n</think>\n\n<action> + </action>", "+", "up, as 3 < 5"),
        ("Well. <action>-</action> No: <think>up</think><action>+</action>.", "+", "up"),
        ("<action>\ngo to cabinet 1\n</action>", "go to cabinet 1", ""),
        ("<think>open", None, ""),
    ],
)
def test_what_an_instruct_model_writes_is_read(text, action, thoughts):
    parsed = ANSWERS.parse(text)
    assert (parsed.action, parsed.thoughts) == (action, thoughts)
    if action is not None:
        replaced = ANSWERS.with_action(text, parsed, DONE_TOKEN)
        assert ANSWERS.parse(replaced).action == DONE_TOKEN
        assert replaced.replace(DONE_TOKEN, action) == text


@given(st.text(max_size=50), st.text(max_size=50), st.text(max_size=50))
def test_whatever_is_written_is_read(action, thoughts, field):
    parsed = ANSWERS.parse(ANSWERS.render(action, thoughts, {"field": field}))
    assert (parsed.action, parsed.thoughts) == (action.strip(), thoughts.strip())
    assert parsed.fields == {"field": field.strip()}


@given(st.text("<>/actionthk &;lg", max_size=100))
def test_no_text_raises(text):
    ANSWERS.parse(text)


@pytest.mark.parametrize("text", ["<action>" * 2400, "<a>" * 6000, "<action>" + " " * 19_000, "<think>" * 2800])
def test_no_response_takes_long_to_read(text):
    started = time.process_time()
    ANSWERS.parse(text)
    assert time.process_time() - started < 1.0
