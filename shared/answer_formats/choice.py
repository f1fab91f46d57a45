"""Which answer format a setting names."""

import importlib
from functools import lru_cache
from typing import Any

from gflowvlm.shared.answer_formats.base import AnswerFormat
from gflowvlm.shared.answer_formats.json_answers import JsonAnswers
from gflowvlm.shared.answer_formats.own_format import OwnFormat, run_own_code
from gflowvlm.shared.answer_formats.tag_answers import TagAnswers
from gflowvlm.shared.errors import UserError

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
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise UserError(
            f"task.answer_format {name!r}: there is no such format; use json, tags, or module:Class of your own"
        )
    try:
        made = run_own_code(_imported, "", module, attribute)
    except UserError as error:
        raise UserError(
            f"task.answer_format {name!r}: cannot be imported{error}; its module must be on PYTHONPATH on every "
            "machine of the run"
        ) from error
    if not isinstance(made, AnswerFormat):
        raise UserError(
            f"task.answer_format {name!r}: is no AnswerFormat; derive it from "
            "gflowvlm.shared.answer_formats.AnswerFormat"
        )
    own = OwnFormat(name, made)
    own.check()
    return own


def _imported(module: str, attribute: str) -> Any:
    found = getattr(importlib.import_module(module), attribute)
    return found() if isinstance(found, type) else found
