"""Steps packed by length into micro-batches of a bounded number of padded tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from gflowvlm.shared.pictures import picture_sizes
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
        stop_ids: Tokens of the stop action behind ``response_ids[:cot_end]``; empty where it cannot be scored.
    """

    prompt: str
    image: bytes
    response_ids: Sequence[int]
    cot_end: int
    action_end: int
    stop_ids: Sequence[int] = ()

    @property
    def has_stop(self) -> bool:
        """Whether there is a place where stopping can be scored."""
        return self.cot_end < self.action_end and len(self.stop_ids) > 0

    @property
    def stop_column(self) -> int | None:
        """Which of the response's own columns predicts the stop's last token.

        None where the response does not hold the tokens before it, so that the stop has to be passed on its own.
        """
        column = self.cot_end + len(self.stop_ids) - 1
        inside = self.has_stop and column < len(self.response_ids)
        if inside and [*self.response_ids[self.cot_end : column]] == [*self.stop_ids[:-1]]:
            return column
        return None


@dataclass(frozen=True)
class StopContinuation:
    """A chain of thought with the stop behind it, where no response of the state shares the stop's first tokens.

    Attributes:
        ids: The chain of thought's and the stop's tokens.
        start: ``ids[start:]`` are the stop.
    """

    ids: tuple[int, ...]
    start: int


@dataclass
class MicroBatch:
    """Steps that are scored together.

    What is passed behind the states are rows: the steps' responses, and then `stops`.

    Attributes:
        index: Where the steps stand in the list that was packed; empty for a filler (`Scorer.in_step`).
        steps: The steps.
        states: A step of each state that is passed through the model, for its prompt and image.
        state_of: For every row, where its state stands in `states`.
        stops: Stops that are passed on their own.
        stop_of: For every step, where its stop stands in `stops`, or None.
        encoded: Model inputs of the states' prompts and images, made at the first use (the processor is called
            once, however many passes follow).
    """

    index: list[int]
    steps: list[ScoredStep]
    states: list[ScoredStep]
    state_of: list[int]
    stops: list[StopContinuation] = field(default_factory=list)
    stop_of: list[int | None] = field(default_factory=list)
    encoded: dict[str, Tensor] | None = field(default=None, repr=False)

    @property
    def is_filler(self) -> bool:
        """Whether it is passed only because other ranks pass one, and its scores mean nothing."""
        return len(self.index) == 0

    @property
    def is_shared(self) -> bool:
        """Whether rows have states in common; otherwise every row has its own, in the same order."""
        return len(self.states) < len(self.steps) + len(self.stops)


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
        with_stops: Whether every step's stop is to be scored, so that those that need a row of their own get it.
    """

    def __init__(
        self, inputs: PolicyInputs, token_budget: int, *, shares_prompts: bool, with_stops: bool = True
    ) -> None:
        self._inputs = inputs
        self._budget = token_budget
        self._shares_prompts = shares_prompts
        self._with_stops = with_stops
        self._image_tokens: dict[tuple[tuple[int, int], ...], int] = {}

    def pack(self, steps: Sequence[ScoredStep]) -> list[MicroBatch]:
        """Returns the steps in micro-batches: similar lengths together, the longest first."""
        states = self._states(steps)
        different = list(dict.fromkeys(states))
        length_of = dict(zip(different, self._prompt_lengths([steps[i] for i in different]), strict=True))
        prompts = [length_of[state] for state in states]
        stops = [self._own_stop(step) for step in steps]
        widths = [
            max(1, len(step.response_ids), 0 if stop is None else len(stop.ids))
            for step, stop in zip(steps, stops, strict=True)
        ]
        longest = dict.fromkeys(states, 0)
        for i, state in enumerate(states):
            longest[state] = max(longest[state], prompts[i] + widths[i])
        order = sorted(range(len(steps)), key=lambda i: (longest[states[i]], states[i], widths[i], i), reverse=True)
        groups: list[_Group] = []
        for i in order:
            candidate = _Row(i, states[i], stops[i], prompts[i], widths[i])
            if not groups or groups[-1].tokens_with(candidate, self._shares_prompts) > self._budget:
                groups.append(_Group())
            groups[-1].add(candidate)
        return [self._micro_batch(group, steps, states, stops) for group in groups]

    def _own_stop(self, step: ScoredStep) -> StopContinuation | None:
        if not self._with_stops or not step.has_stop or step.stop_column is not None:
            return None
        return StopContinuation((*step.response_ids[: step.cot_end], *step.stop_ids), step.cot_end)

    def _micro_batch(
        self,
        group: _Group,
        steps: Sequence[ScoredStep],
        states: Sequence[int],
        own_stops: Sequence[StopContinuation | None],
    ) -> MicroBatch:
        place: dict[int, int] = {}
        state_of = [place.setdefault(states[i], len(place)) for i in group.index]
        passed = [steps[state] for state in place]
        stops: dict[tuple[int, StopContinuation], int] = {}
        stop_of: list[int | None] = []
        for i in group.index:
            stop = own_stops[i]
            stop_of.append(None if stop is None else stops.setdefault((states[i], stop), len(stops)))
        for state, _ in stops:
            if self._shares_prompts:
                state_of.append(place[state])
            else:
                state_of.append(len(passed))
                passed.append(steps[state])
        chosen = [steps[i] for i in group.index]
        return MicroBatch(group.index, chosen, passed, state_of, [stop for _, stop in stops], stop_of)

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
        sizes = [picture_sizes(step.image) for step in steps]
        texts = [self._inputs.render(step.prompt, len(size)) for step, size in zip(steps, sizes, strict=True)]
        tokens = self._inputs.tokenizer(texts, add_special_tokens=self._inputs.adds_beginning)["input_ids"]
        lengths = [len(ids) for ids in tokens]
        for i, (step, size) in enumerate(zip(steps, sizes, strict=True)):
            if size not in self._image_tokens:
                full = self._inputs.encode([step.prompt], [step.image])["input_ids"].shape[1]
                self._image_tokens[size] = int(full) - lengths[i]
            lengths[i] += self._image_tokens[size]
        return lengths


@dataclass(frozen=True)
class _Row:
    """A step as it is packed: which it is, its state, its stop's own row, and widths in tokens."""

    number: int
    state: int
    stop: StopContinuation | None
    prompt: int
    response: int


@dataclass
class _Group:
    """Steps of a micro-batch that is being filled."""

    index: list[int] = field(default_factory=list)
    states: set[int] = field(default_factory=set)
    stops: set[tuple[int, StopContinuation]] = field(default_factory=set)
    prompt: int = 0
    response: int = 0

    def tokens_with(self, row: _Row, shares_prompts: bool) -> int:
        """Returns the padded tokens with one step more."""
        rows = len(self.index) + 1 + len(self.stops | _stops(row))
        passed = len(self.states | {row.state}) if shares_prompts else rows
        return passed * max(self.prompt, row.prompt) + rows * max(self.response, row.response)

    def add(self, row: _Row) -> None:
        """Takes the step."""
        self.index.append(row.number)
        self.states.add(row.state)
        self.stops |= _stops(row)
        self.prompt, self.response = max(self.prompt, row.prompt), max(self.response, row.response)


def _stops(row: _Row) -> set[tuple[int, StopContinuation]]:
    return set() if row.stop is None else {(row.state, row.stop)}
