"""Steps packed by length into micro-batches of a bounded number of padded tokens."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.trajectory import Step, Trajectory


@dataclass(frozen=True)
class ScoredStep:
    """One response to score.

    Attributes:
        prompt: The task's prompt, before the chat template.
        image: The encoded image.
        response_ids: The exact response tokens.
        cot_end: Tokens ``[0, cot_end)`` are chain of thought.
        action_end: Tokens ``[cot_end, action_end)`` are the action; empty when malformed.
        stop_ids: The tokens of the stop action behind ``response_ids[:cot_end]``; empty where it is not scored.
    """

    prompt: str
    image: bytes
    response_ids: Sequence[int]
    cot_end: int
    action_end: int
    stop_ids: Sequence[int] = ()


@dataclass
class MicroBatch:
    """Steps that are scored together.

    Attributes:
        index: Where the steps stand in the list that was packed; empty for a filler (`Scorer.in_step`).
        steps: The steps.
        states: A step of each state that is passed through the model, for its prompt and image.
        state_of: For every step, where its state stands in `states`.
        encoded: Model inputs of the states' prompts and images, made at the first use (the processor is called
            once, however many passes follow).
    """

    index: list[int]
    steps: list[ScoredStep]
    states: list[ScoredStep]
    state_of: list[int]
    encoded: dict[str, Tensor] | None = field(default=None, repr=False)

    @property
    def is_filler(self) -> bool:
        """Whether it is passed only because other ranks pass one, and its scores mean nothing."""
        return len(self.index) == 0


def steps_of(trajectories: Iterable[Trajectory]) -> list[ScoredStep]:
    """Returns the steps of all trajectories, one after the other."""
    return [scored_step(t, step) for t in trajectories for step in t.steps]


def scored_step(trajectory: Trajectory, step: Step) -> ScoredStep:
    """Returns what is needed to score a step of a trajectory."""
    image = trajectory.images[step.image]
    return ScoredStep(step.prompt, image, step.response_ids, step.cot_end, step.action_end, step.stop_ids)


class Packer:
    """Packs steps into micro-batches.

    Args:
        inputs: The policy's processor.
        token_budget: Most padded tokens in a micro-batch; a single longer step is a micro-batch of its own.
        shares_prompts: Whether responses to one prompt and image have them in common: they then count once.
    """

    def __init__(self, inputs: PolicyInputs, token_budget: int, *, shares_prompts: bool) -> None:
        self._inputs = inputs
        self._budget = token_budget
        self._shares_prompts = shares_prompts
        self._image_tokens: dict[tuple[int, int], int] = {}

    def pack(self, steps: Sequence[ScoredStep]) -> list[MicroBatch]:
        """Returns the steps in micro-batches: similar lengths together, the longest first."""
        states = self._states(steps)
        different = list(dict.fromkeys(states))
        length_of = dict(zip(different, self._prompt_lengths([steps[i] for i in different]), strict=True))
        prompts = [length_of[state] for state in states]
        responses = [max(1, len(step.response_ids)) for step in steps]
        longest = dict.fromkeys(states, 0)
        for i, state in enumerate(states):
            longest[state] = max(longest[state], prompts[i] + responses[i])
        order = sorted(range(len(steps)), key=lambda i: (longest[states[i]], states[i], responses[i], i), reverse=True)
        groups: list[list[int]] = []
        inside: set[int] = set()
        widest_prompt = widest_response = 0
        for i in order:
            prompt, response = max(widest_prompt, prompts[i]), max(widest_response, responses[i])
            more = states[i] not in inside
            padded = (len(inside) + more) * prompt + (len(groups[-1]) + 1) * response if groups else 0
            if groups and padded <= self._budget:
                groups[-1].append(i)
                inside.add(states[i])
                widest_prompt, widest_response = prompt, response
            else:
                groups.append([i])
                inside = {states[i]}
                widest_prompt, widest_response = prompts[i], responses[i]
        return [_micro_batch(group, steps, states) for group in groups]

    def _states(self, steps: Sequence[ScoredStep]) -> list[int]:
        """Returns, for every step, the first step of its state; each its own where prompts are not shared."""
        if not self._shares_prompts:
            return list(range(len(steps)))
        first: dict[tuple[str, bytes], int] = {}
        return [first.setdefault((step.prompt, step.image), i) for i, step in enumerate(steps)]

    def _prompt_lengths(self, steps: Sequence[ScoredStep]) -> list[int]:
        """Returns the prompts' lengths in tokens, without processing every image.

        The placeholder of an image expands to a number of tokens that depends on its size only; it is
        measured once per size. (A processor for which that were wrong would only make a micro-batch larger.)
        """
        if len(steps) == 0:
            return []
        texts = [self._inputs.render(step.prompt) for step in steps]
        lengths = [len(ids) for ids in self._inputs.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        for i, step in enumerate(steps):
            size = image_size(step.image)
            if size not in self._image_tokens:
                full = self._inputs.encode([step.prompt], [step.image])["input_ids"].shape[1]
                self._image_tokens[size] = int(full) - lengths[i]
            lengths[i] += self._image_tokens[size]
        return lengths


def image_size(image: bytes) -> tuple[int, int]:
    """Returns width and height of an encoded image, pixels, without decoding it."""
    with Image.open(io.BytesIO(image)) as opened:
        return opened.size


def _micro_batch(group: list[int], steps: Sequence[ScoredStep], states: Sequence[int]) -> MicroBatch:
    place: dict[int, int] = {}
    state_of = [place.setdefault(states[i], len(place)) for i in group]
    return MicroBatch(group, [steps[i] for i in group], [steps[state] for state in place], state_of)
