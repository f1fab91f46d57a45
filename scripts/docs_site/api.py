"""The page of the Python interface, made from the docstrings of what `gflowvlm` shows."""

import inspect
import re
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import gflowvlm
from gflowvlm.api.policy import Response, StepScore, TrajectoryScore
from gflowvlm.learner.losses import LossOutput
from gflowvlm.shared.trajectory import Step

INTRODUCTION = """\
# Python interface

<!-- Made from the code by `make reference`; a test compares. -->

What `import gflowvlm` gives. [The tour](python.md) shows it at work. In the examples `path` is the folder of a finished
run and `folder` that of a new one; a test runs all of them. `gflowvlm.__version__` is the release.
"""

ORDER = ("Run", "train", "load_config", "Policy", "Trajectories", "Trajectory", "losses", "RunConfig", "UserError")
"""The public names in the page's order."""

BELONGING: dict[str, tuple[type, ...]] = {
    "Policy": (Response, TrajectoryScore, StepScore),
    "Trajectory": (Step,),
    "losses": (LossOutput,),
}
"""Classes that are met through a name, after it."""

_SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Example):")
_TITLES = {"Args": "Arguments", "Attributes": "Attributes", "Raises": "Raises"}
_ITEM = re.compile(r"(\w+): (.*)")
_PAGE = re.compile(r"(?<![\w/`])docs/([\w-]+\.md)")
_LONG_SIGNATURE = 100


def api_page() -> str:
    """Returns the page in Markdown."""
    parts = [INTRODUCTION]
    for name in ORDER:
        parts += _entry(f"gflowvlm.{name}", getattr(gflowvlm, name), level=2)
        if name == "losses":
            parts.append(_losses())
        for belonging in BELONGING.get(name, ()):
            parts += _entry(belonging.__name__, belonging, level=3)
    return "\n".join(parts)


def _entry(title: str, thing: Any, level: int) -> Iterator[str]:
    """Yields the parts of a name's section, and of its methods'."""
    yield f"{'#' * level} {title}\n"
    if inspect.isclass(thing):
        ours = thing.__module__.startswith("gflowvlm.api")
        made = ours and "__init__" in vars(thing) and title == "gflowvlm.Run"
        if made:
            yield _signature(title, thing.__init__, skip_first=True)
        yield markdown(inspect.getdoc(thing) or "")
        if made:
            yield markdown(inspect.getdoc(thing.__init__) or "")
        if ours:
            yield from _members(title, thing, level)
    else:
        if isinstance(thing, FunctionType):
            yield _signature(title, thing)
        yield markdown(inspect.getdoc(thing) or "")


def _members(title: str, thing: type, level: int) -> Iterator[str]:
    shown = {name: member for name, member in vars(thing).items() if not name.startswith("_")}
    properties = [(name, member) for name, member in shown.items() if isinstance(member, property)]
    if properties:
        rows = [f"- `{name}`: {' '.join(_linked(inspect.getdoc(member) or '').split())}" for name, member in properties]
        yield "\n".join(["Properties:\n", *rows]) + "\n"
    for name, member in shown.items():
        if isinstance(member, FunctionType):
            # The class's short name: with the whole one no heading would fit a phone.
            called = f"{title.rpartition('.')[2]}.{name}"
            yield f"{'#' * (level + 1)} {called}\n"
            yield _signature(called, member, skip_first=True)
            yield markdown(inspect.getdoc(member) or "")


def _signature(title: str, function: Any, skip_first: bool = False) -> str:
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())[1 if skip_first else 0 :]
    returns = signature.return_annotation
    constructed = returns in (None, "None") and function.__name__ == "__init__"
    plain = signature.replace(
        parameters=[p.replace(annotation=inspect.Parameter.empty) for p in parameters],
        return_annotation=inspect.Signature.empty,
    )
    arrow = "" if constructed or returns is inspect.Signature.empty else f" -> {returns}"
    line = f"{title}{plain}{arrow}"
    if len(line) > _LONG_SIGNATURE:
        inner = str(plain)[1:-1].split(", ")
        line = "\n".join([f"{title}(", *(f"    {part}," for part in inner), f"){arrow}"])
    return f"```python\n{line}\n```\n"


def _losses() -> str:
    rows = ["| loss | what it is |", "|---|---|"]
    for name, loss in gflowvlm.losses.LOSSES.items():
        rows.append(f"| `losses.{name}` | {_cell((inspect.getdoc(loss) or '').partition(chr(10))[0])} |")
    common = inspect.getdoc(gflowvlm.losses.var_tb) or ""
    arguments = common[common.index("Args:") :].partition("\nReturns:")[0]
    says = (
        "`tb` also takes `log_z`, the `flow_*` and `fl_*` losses `log_flow`, the `*subtb` losses `subtb_lambda`; "
        "`help(gflowvlm.losses.tb)` has each one's formula and shapes."
    )
    return "\n".join([*rows, "", says, "", markdown(arguments.rstrip())])


def markdown(text: str) -> str:
    """Returns a docstring of Google's style as Markdown: lists of what has names, blocks of examples."""
    parts: list[str] = []
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if _SECTION.fullmatch(line)), len(lines))
    parts.append(_prose("\n".join(lines[:start])))
    while start < len(lines):
        end = next((i for i in range(start + 1, len(lines)) if _SECTION.fullmatch(lines[i])), len(lines))
        kind = lines[start].removesuffix(":")
        inner = inspect.cleandoc("\n".join(lines[start + 1 : end])) if lines[start + 1 : end] else ""
        parts.append(_example(inner) if kind == "Example" else _named(kind, inner))
        start = end
    return "\n".join(part for part in parts if part)


def _named(kind: str, text: str) -> str:
    if kind == "Returns":
        return f"Returns: {_prose(text)}"
    items: list[tuple[str, str]] = []
    for line in text.splitlines():
        match = _ITEM.fullmatch(line)
        if match is not None and not line.startswith(" "):
            items.append((match[1], match[2]))
        elif items:
            items[-1] = (items[-1][0], f"{items[-1][1]} {line.strip()}".strip())
    rows = [f"- `{name}`: {' '.join(_linked(says).split())}" for name, says in items]
    return "\n".join([f"{_TITLES[kind]}:\n", *rows]) + "\n"


def _example(text: str) -> str:
    blocks = []
    for block in re.split(r"\n\n+", text):
        prose, prompt, code = block.partition(">>>")
        if prose.strip():
            blocks.append(_prose(prose))
        if prompt:
            shown = re.sub(r" +# doctest: .*", "", prompt + code)
            blocks.append(f"```pycon\n{shown}\n```\n")
    return "\n".join(blocks)


def _prose(text: str) -> str:
    return f"{_linked(text).strip()}\n" if text.strip() else ""


def _linked(text: str) -> str:
    return _PAGE.sub(r"[\1](\1)", re.sub(r"``(.+?)``", r"`\1`", text))


def _cell(text: str) -> str:
    return " ".join(_linked(text).split()).replace("|", "\\|")
