import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gflowvlm.shared.answer_formats.json_answers import JsonAnswers
from gflowvlm.shared.response import DONE_TOKEN
from tests.shared.json_answers import format_response, parse_response

ANSWERS = JsonAnswers()


def test_a_formatted_response_is_read_back_with_the_actions_place():
    text = format_response("+", "3 is below 5", {"current": 3, "target": 5})
    parsed = parse_response(text)
    assert (parsed.action, parsed.thoughts, parsed.fields) == ("+", "3 is below 5", {"current": 3, "target": 5})
    assert text[slice(*parsed.action_chars)] == "+"
    assert text[slice(*parsed.frame_chars)] == '"+"'


def test_the_prompt_shows_the_object_with_nothing_filled_in():
    asked = ANSWERS.instruction({"current": int, "hand": str})
    assert asked == 'Answer: {"current": , "hand": "", "thoughts": "", "action": ""}'


def test_the_stop_action_is_read_like_any_other():
    assert parse_response(format_response(DONE_TOKEN, "equal")).action == DONE_TOKEN


@pytest.mark.parametrize(
    "text",
    [
        "",
        "+",
        "{}",
        '{"action": "+", "thoughts": "later"}',
        '{"thoughts": "unclosed, "action": "+"}',
        '{"action": "-", "action": "+"}',
        '{"action": {"action": "+"}}',
        '{"action": true}',
        '{"action": null}',
        '{"action": ["+"]}',
        '{"action": NaN}',
        '{"action": "\\ud800"}',
        '{"a": ' + "[" * 5000 + "]" * 5000 + ', "action": "+"}',
        '{"x": ' * 5000 + '{"action": "+"}' + "}" * 5000,
        '{"thoughts": "' + "x" * 30_000 + '", "action": "+"}',
        "\ud800\ud801",
        "<image>" * 50,
    ],
)
def test_anything_but_the_documented_format_is_malformed(text):
    assert parse_response(text).malformed


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ('Sure! {"thoughts": "up", "action": "+"} I hope that helps.', "+"),
        ('```json\n{\n  "thoughts": "up",\n  "action": "+"\n}\n```', "+"),
        ('[{"action": "+"}]', "+"),
        ('{"action": "-"} no, rather {"thoughts": "up", "action": "+"}', "+"),
        ('If {x} is below {y}: {"action": "+"}', "+"),
        ('{"place": {"name": "desk", "number": 1}, "action": "+"}', "+"),
        ('{"action": 5}', "5"),
        ('{"action": -2.5 }', "-2.5"),
        ('{"action": "say \\"hi\\""}', 'say "hi"'),
        ('{"action": "\\u00fcber"}', "über"),
        ('{"thoughts": "so \\"action\\": \\"-\\"}", "action": "+"}', "+"),
    ],
)
def test_text_around_numbers_and_escapes_are_read(text, action):
    parsed = parse_response(text)
    assert parsed.action == action
    start, end = parsed.action_chars
    assert json.loads(f'"{text[start:end]}"') == action
    assert parsed.frame_chars == (start - 1, end + 1)
    replaced = ANSWERS.with_action(text, parsed, 'a "b" 1')
    again = parse_response(replaced)
    assert (again.action, again.thoughts, again.fields) == ('a "b" 1', parsed.thoughts, parsed.fields)
    assert replaced[: start - 1] == text[: start - 1]


@given(st.text(max_size=200))
def test_no_text_raises(text):
    parse_response(text)
    parse_response('{"thoughts": ' + json.dumps(text) + ', "action": "+"}')


@given(st.text(max_size=50), st.text(max_size=50))
def test_whatever_is_written_is_read(action, thoughts):
    parsed = parse_response(format_response(action, thoughts, {"n": 3}))
    assert (parsed.action, parsed.thoughts, parsed.fields) == (action, thoughts, {"n": 3})


def test_thoughts_that_look_like_an_action_are_not_taken_for_it():
    text = format_response("-", 'so "action": "+"}')
    assert parse_response(text).action == "-"


SLOW = ['{"a":' * 3900, '{"' * 9900, '{"action":"' * 1800, '"action": "\\' * 1500, "[" * 19_000 + '{"action": "+"}']


@pytest.mark.parametrize("text", SLOW, ids=["objects", "braces", "actions", "escapes", "lists"])
def test_no_response_takes_long_to_read(text):
    started = time.process_time()
    parse_response(text)
    assert time.process_time() - started < 1.0
