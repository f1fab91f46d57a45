"""Which answer format a setting names."""

from functools import lru_cache

from gflowvlm.shared.answer_formats.base import AnswerFormat
from gflowvlm.shared.answer_formats.json_answers import JsonAnswers
from gflowvlm.shared.answer_formats.own_format import OwnFormat
from gflowvlm.shared.answer_formats.tag_answers import TagAnswers
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.user_code import load_own, run_own_code

DEFAULT_FORMAT = "json"

_SHIPPED: dict[str, type[AnswerFormat]] = {DEFAULT_FORMAT: JsonAnswers, "tags": TagAnswers}


@lru_cache(maxsize=16)
def answer_format(name: str) -> AnswerFormat:
    """Returns an answer format.

    Args:
        name: ``json``, ``tags``, or ``module:Object`` for one of the user's own: a class derived from `AnswerFormat`,
            or an object of one.

    Raises:
        UserError: There is no such format, or it does not read its own answers.
    """
    if name in _SHIPPED:
        return _SHIPPED[name]()
    if ":" not in name:
        raise UserError(
            f"task.answer_format {name!r}: there is no such format; use json, tags, or module:Class of your own"
        )
    found = load_own(name, "task.answer_format")
    made = run_own_code(found, f"task.answer_format {name!r}: cannot be made") if isinstance(found, type) else found
    if not isinstance(made, AnswerFormat):
        raise UserError(
            f"task.answer_format {name!r}: is no AnswerFormat; derive it from "
            "gflowvlm.shared.answer_formats.AnswerFormat"
        )
    own = OwnFormat(name, made)
    own.check()
    return own
