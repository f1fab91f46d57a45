import re
from typing import Any

import pytest
from pydantic import ValidationError

from gflowvlm.envs.registry import make_env
from gflowvlm.shared.answer_formats import MALFORMED, AnswerFormat, ParsedResponse, answer_format
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.task_settings import default_settings


class Arrow(AnswerFormat):
    """Thoughts, an arrow, the action, a full stop."""

    def instruction(self, fields: Any) -> str:
        return "Think, then write => ACTION;"

    def render(self, action: str, thoughts: str, fields: Any) -> str:
        return f"{thoughts} =>{action};"

    def parse(self, text: str) -> ParsedResponse:
        match = re.search(r"\A(.*) =>([^;]*);\Z", text, re.DOTALL)
        if match is None:
            return MALFORMED
        start, end = match.span(2)
        return ParsedResponse(match[2], match[1], {}, (start, end), (start - 1, end + 1))

    def with_action(self, text: str, parsed: ParsedResponse, action: str) -> str:
        assert parsed.action_chars is not None
        return text[: parsed.action_chars[0]] + action + ";"


class Forgetful(Arrow):
    """Reads another action than it has written."""

    def parse(self, text: str) -> ParsedResponse:
        return ParsedResponse("+", "", {}, (1, 2), (0, 3))


class EndsItsProcess(Arrow):
    def __init__(self) -> None:
        raise SystemExit(3)


class RendersNothing(Arrow):
    def render(self, action: str, thoughts: str, fields: Any) -> Any:
        return None


class AsksForAField(Arrow):
    def instruction(self, fields: Any) -> str:
        return str(fields["colour"])


class ReadsNothing(Arrow):
    def parse(self, text: str) -> Any:
        return None


class ExpectsAnAnswer(Arrow):
    def parse(self, text: str) -> ParsedResponse:
        if "=>" not in text:
            raise LookupError("no\narrow")
        return super().parse(text)


class ReadsAnywhere(Arrow):
    def parse(self, text: str) -> ParsedResponse:
        parsed = super().parse(text)
        return ParsedResponse("+") if parsed.malformed else parsed


class Rewriting(Arrow):
    def with_action(self, text: str, parsed: ParsedResponse, action: str) -> str:
        return "Rather: " + super().with_action(text, parsed, action)


class ClosedByASpace(Arrow):
    """`go to cabinet 1` then begins with a whole `go `."""

    def render(self, action: str, thoughts: str, fields: Any) -> str:
        return f"{thoughts} =>{action} "

    def parse(self, text: str) -> ParsedResponse:
        return super().parse(f"{text[:-1]};" if text.endswith(" ") else text)

    def with_action(self, text: str, parsed: ParsedResponse, action: str) -> str:
        return super().with_action(text, parsed, action)[:-1] + " "


class WeighsOutside(Arrow):
    def content_chars(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text) + 1)]


class FailsLater(Arrow):
    def parse(self, text: str) -> ParsedResponse:
        if "seldom" in text:
            raise SystemExit(1)
        return super().parse(text)


class Telling(Arrow):
    """Gives the action away before it comes."""

    def render(self, action: str, thoughts: str, fields: Any) -> str:
        return f"I will do {len(action)} =>{action};"


def test_a_format_of_the_users_own_makes_prompt_and_demonstrations_of_a_task():
    settings = default_settings("numberline").model_copy(update={"answer_format": f"{__name__}:Arrow"})
    env = make_env(settings)
    env.reset(seed=1)
    assert env.prompt().splitlines()[-1] == "Think, then write => ACTION;"
    texts = env.demonstrations("+")
    assert all(text.endswith(" =>+;") for text in texts)
    assert {env.answer_format.parse(text).action for text in texts} == {"+"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("yaml", "there is no such format; use json, tags, or module:Class"),
        ("nowhere.at.all:Thing", "there is no module .nowhere."),
        (f"{__name__}:Missing", "has no Missing"),
        ("json:JSONDecoder", "is no AnswerFormat"),
        (f"{__name__}:Forgetful", "does not read its own answer"),
        (f"{__name__}:Telling", "depends on the action"),
        (f"{__name__}:EndsItsProcess", r"cannot be made \(SystemExit: 3"),
        (f"{__name__}:RendersNothing", "its render gives a NoneType and no text"),
        (f"{__name__}:AsksForAField", r"its instruction fails \(KeyError: 'colour'\)"),
        (f"{__name__}:ReadsNothing", "its parse gives a NoneType and no ParsedResponse"),
        (f"{__name__}:ExpectsAnAnswer", r"its parse fails \(LookupError: no arrow\)"),
        (f"{__name__}:ReadsAnywhere", r"its parse reads action '\+' with action_chars None"),
        (f"{__name__}:Rewriting", "its with_action changes what comes before the action"),
        (f"{__name__}:ClosedByASpace", "closed by the same character, which no action has; found ' '"),
        (f"{__name__}:WeighsOutside", "its content_chars gives"),
    ],
)
def test_a_format_that_cannot_be_used_is_one_line(name, message):
    with pytest.raises(UserError, match=message):
        answer_format(name)


def test_a_module_that_is_no_python_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a_format_with_a_mistake.py").write_text("def (:")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"a_format_with_a_mistake:Mine'.*SyntaxError"):
        answer_format("a_format_with_a_mistake:Mine")


def test_a_format_that_fails_in_the_middle_of_a_run_is_named():
    made = answer_format(f"{__name__}:FailsLater")
    assert made.parse("up =>+;").action == "+"
    with pytest.raises(UserError, match=r"FailsLater': its parse fails \(SystemExit: 1\)"):
        made.parse("seldom =>+;")


def test_a_name_that_can_be_no_format_is_refused_with_the_settings():
    with pytest.raises(ValidationError, match="answer_format"):
        type(default_settings())(answer_format="x y")


def test_the_tags_are_taught_with_what_the_task_says():
    env = make_env(default_settings("blackjack").model_copy(update={"answer_format": "tags"}))
    env.reset(seed=3)
    assert env.prompt().splitlines()[-1].startswith("Answer: <dealer>...</dealer><player>")
    parsed = env.answer_format.parse(env.demonstrations("hit")[0])
    assert parsed.action == "hit"
    assert list(parsed.fields) == ["dealer", "player", "total"]
