"""The trajectories as the page's script reads them: plain values, every picture once."""

import base64
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gflowvlm.envs.registry import make_env
from gflowvlm.run.models import resolve_model
from gflowvlm.shared.answer_formats import AnswerFormat, answer_format
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.pictures import newest_picture
from gflowvlm.shared.trajectory import Step, Trajectory
from gflowvlm.studies.report.tree import Targets, sampled_tree

PICTURE_CHARS = 12_000_000
"""Room for pictures in a page, characters of their data URIs; those of later trajectories are left out."""

_PAGES = (b"II*\x00", b"MM\x00*")
"""How a value of several pictures begins: a TIFF."""

_SIGNATURES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}


@dataclass
class Pictures:
    """Data URIs, each once.

    Attributes:
        uris: The data URIs.
        left_out: Different pictures that found no room.
    """

    uris: list[str] = field(default_factory=list)
    left_out: int = 0
    _numbers: dict[bytes, int | None] = field(default_factory=dict)
    _chars: int = 0

    def number(self, image: bytes) -> int | None:
        """Returns the picture's place in `uris`; None when it is no picture or found no room."""
        if image not in self._numbers:
            self._numbers[image] = self._add(image)
        return self._numbers[image]

    def _add(self, shown: bytes) -> int | None:
        image = newest_picture(shown) if shown.startswith(_PAGES) else shown
        kind = next((kind for start, kind in _SIGNATURES.items() if image.startswith(start)), None)
        if kind is None:
            return None
        uri = f"data:{kind};base64,{base64.b64encode(image).decode()}"
        if self._chars + len(uri) > PICTURE_CHARS:
            self.left_out += 1
            return None
        self._chars += len(uri)
        self.uris.append(uri)
        return len(self.uris) - 1


def trajectory_data(
    trajectories: Sequence[Trajectory], config: RunConfig, pictures: Pictures, instance: str | None
) -> dict[str, Any]:
    """Returns what the script of the page shows.

    Args:
        trajectories: The trajectories that are shown.
        config: The run's configuration.
        pictures: Takes the pictures.
        instance: The instance whose tree is opened first; by default the newest of those played most often.

    Returns:
        ``trajectories``, ``pieces`` (pairs of token id and text, empty without a tokenizer), ``trees``,
        ``instance`` and ``cot_weight``.
    """
    by_instance: dict[str, list[Trajectory]] = defaultdict(list)
    for trajectory in trajectories:
        by_instance[trajectory.instance_id].append(trajectory)
    known = config.task.exact_target
    targets = Targets(make_env(config.task), config.target.reward_exponent) if known else None
    trees = []
    for played in by_instance.values():
        first = played[0]
        target = None
        if targets is not None and first.task == config.task.name:
            target = targets.of(first.instance_seed, first.split)
        trees.append(sampled_tree(played, target))
    answers = answer_format(config.task.answer_format)
    newest_first = list(reversed(by_instance))
    return {
        "trajectories": [_plain(trajectory, pictures, answers) for trajectory in trajectories],
        "pieces": _pieces(config.policy.model, trajectories),
        "trees": trees,
        "instance": instance or max(newest_first, key=lambda name: len(by_instance[name]), default=None),
        "cot_weight": config.policy.cot_weight,
    }


def _plain(trajectory: Trajectory, pictures: Pictures, answers: AnswerFormat) -> dict[str, Any]:
    numbers = [pictures.number(image) for image in trajectory.images]
    return {
        "id": trajectory.trajectory_id,
        "group": trajectory.group_id,
        "instance": trajectory.instance_id,
        "task": trajectory.task,
        "split": trajectory.split,
        "success": trajectory.success,
        "expert": trajectory.expert,
        "end": trajectory.end.value,
        "outcome": trajectory.outcome,
        "log_rewards": [_rounded(value) for value in trajectory.log_rewards],
        "rewards": [_rounded(value) for value in trajectory.original_rewards],
        "steps": [
            _plain_step(step, previous, numbers, answers)
            for previous, step in zip(["", *(s.prompt for s in trajectory.steps)], trajectory.steps, strict=False)
        ],
    }


def _plain_step(
    step: Step, previous_prompt: str, numbers: Sequence[int | None], answers: AnswerFormat
) -> dict[str, Any]:
    return {
        "prompt": new_lines(previous_prompt, step.prompt),
        "picture": numbers[step.image],
        "response": step.response_text,
        # A response that cannot be read is all chain of thought, as its tokens are.
        "thoughts": step.response_text if step.action is None else answers.parse(step.response_text).thoughts,
        "ids": step.response_ids,
        "cot_end": step.cot_end,
        "action_end": step.action_end,
        "log_probs": [_rounded(value) for value in step.sampler_log_probs],
        "version": step.policy_version,
        "action": step.action,
        "validity": step.validity.value,
    }


def new_lines(previous: str, text: str) -> tuple[int, str]:
    """Returns how much of a text repeats the beginning of the previous one, and the rest.

    A prompt with a history repeats the one before: written out, 35 steps would be mostly repetition. Only whole lines
    are taken over, so that a search through the rests finds whatever stands in one line.

    Returns:
        The length taken over, in UTF-16 units as a script counts them, and the rest.
    """
    low, high = 0, min(len(previous), len(text))
    while low < high:
        middle = (low + high + 1) // 2
        if previous[:middle] == text[:middle]:
            low = middle
        else:
            high = middle - 1
    kept = text[: text.rfind("\n", 0, low) + 1]
    return len(kept.encode("utf-16-le")) // 2, text[len(kept) :]


def _pieces(model: str, trajectories: Sequence[Trajectory]) -> list[tuple[int, str]]:
    """Returns the text of every token that occurs; nothing where the model's tokenizer is not in its folder."""
    file = Path(resolve_model(model)) / "tokenizer.json"
    if not file.is_file():
        return []
    tokenizer = Tokenizer.from_file(str(file))
    ids = sorted({token for t in trajectories for step in t.steps for token in step.response_ids})
    return [(token, tokenizer.decode([token], skip_special_tokens=False)) for token in ids]


def _rounded(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None
