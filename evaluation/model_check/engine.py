"""Findings that need the model's weights: the actions' probabilities, and the sampler beside the learner."""

import asyncio
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from gflowvlm.actors.event_loop import EventLoopThread
from gflowvlm.actors.samplers import make_sampler
from gflowvlm.actors.sampling import PolicySampler, SampleRequest, SampleResponse
from gflowvlm.evaluation.model_check.states import ProbedState
from gflowvlm.evaluation.sampler_check import require_agreement, sampled_responses
from gflowvlm.learner.learner import Learner
from gflowvlm.learner.mismatch import Mismatch, compare
from gflowvlm.learner.model import adapter_parameters
from gflowvlm.learner.packing import ScoredStep
from gflowvlm.learner.scoring import LOG_ACT, LOG_STOP, Scorer
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.findings import Check, Status, found_and_advice
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.response import DONE_TOKEN
from gflowvlm.shared.trajectory import BASE_VERSION

SCORED_STATES = 8
"""States at which all actions are scored."""

MASS_TOLERANCE = 1e-5
"""What sums of probabilities may exceed 1 by in float32; a hundred times that in bfloat16."""

ADAPTER_SCALE = 0.02
"""Standard deviation of the matrices B of the adapter that is compared, which a run begins with at 0."""

ANSWER_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class ActionMass:
    """What the probabilities of all actions behind one chain of thought add up to.

    Attributes:
        largest: The most over the probed states.
        states: At how many it was summed.
        tolerance: What it may exceed 1 by.
    """

    largest: float
    states: int
    tolerance: float

    def check(self) -> Check:
        """Returns the finding."""
        detail = f"their probabilities sum to at most {self.largest:.6f} at {self.states} states"
        if self.largest <= 1.0 + self.tolerance:
            return Check("actions", Status.OK, detail)
        advice = "the actions do not exclude each other in its tokens: set another task.answer_format"
        return Check("actions", Status.BROKEN, detail, advice)


def largest_action_mass(
    config: RunConfig, learner: Learner, inputs: PolicyInputs, states: Sequence[ProbedState]
) -> ActionMass:
    """Sums Σ_a P_Act(a) + P(⊤) behind one demonstrated chain of thought of each of some states."""
    scorer = Scorer(learner.policy, inputs, learner.device, config.learner.token_budget)
    chosen = sorted(states, key=lambda state: -len(state.demonstrations))[:SCORED_STATES]
    steps, owners = [], []
    for number, state in enumerate(chosen):
        for action, text in state.demonstrations.items():
            ids = inputs.encode_if_possible(text)
            if ids is not None:
                layout = inputs.read(ids).layout
                steps.append(
                    ScoredStep(state.prompt, state.image, ids, layout.cot_end, layout.action_end, layout.stop_ids)
                )
                owners.append((number, action))
    scores = torch.zeros(len(steps), LOG_STOP + 1)
    with torch.no_grad():
        for batch in scorer.pack(steps):
            scores[batch.index] = scorer.score_steps(batch).stacked()[:, : LOG_STOP + 1].cpu()
    sums = [0.0] * len(chosen)
    stops = [0.0] * len(chosen)
    for (number, action), row, step in zip(owners, scores.double().exp().tolist(), steps, strict=True):
        if step.has_stop:
            stops[number] = max(stops[number], row[LOG_STOP])
        if action != DONE_TOKEN:
            sums[number] += row[LOG_ACT]
    largest = max((acts + stop for acts, stop in zip(sums, stops, strict=True)), default=math.nan)
    return ActionMass(largest, len(chosen), MASS_TOLERANCE * (1 if config.policy.dtype == "float32" else 100))


@dataclass(frozen=True)
class Agreement:
    """Sampler against learner.

    Attributes:
        base: Of the base model.
        adapted: With an adapter that changes it.
    """

    base: Mismatch
    adapted: Mismatch

    def check(self, config: RunConfig, model: str) -> Check:
        """Returns the finding."""
        name = "sampler"
        for mismatch, of in ((self.base, "the base model"), (self.adapted, "an adapter")):
            try:
                require_agreement(mismatch, config, model)
            except UserError as error:
                found, advice = found_and_advice(error)
                return Check(name, Status.BROKEN, f"with {of}, {found}", advice)
        mean, largest = (max(pick(self.base), pick(self.adapted)) for pick in (_mean, _largest))
        detail = f"agrees with the learner to {mean:.1e} nats in the mean, {largest:.1e} at most"
        return Check(name, Status.OK, f"{detail}, with an adapter, too")


def compared_with_sampler(config: RunConfig, inputs: PolicyInputs, learner: Learner) -> Agreement:
    """Starts the sampler's engine and compares it with the learner, without an adapter and with one.

    Args:
        config: The run's configuration.
        inputs: The model's processor.
        learner: The learner; its adapter is changed.

    Raises:
        UserError: The engine does not start, cannot apply the adapter, or answers none of the instances.
    """
    sampler = make_sampler(config, inputs.model, config.sampler.engine)
    with _source(sampler) as source, tempfile.TemporaryDirectory(prefix="gflowvlm-check-") as folder:
        _set_adapter(learner, None)
        base = sampled_responses(config, inputs, source)
        of_base = compare(base, learner.score(base))
        _set_adapter(learner, torch.Generator().manual_seed(config.seed))
        adapter = Path(folder) / "adapter"
        learner.save_adapter(adapter)
        version = BASE_VERSION + 1
        source.load(version, adapter)
        adapted = sampled_responses(config, inputs, source, version)
        return Agreement(of_base, compare(adapted, learner.score(adapted)))


class _Source:
    """A sampler on a loop of its own, asked from another one."""

    def __init__(self, sampler: PolicySampler, loop: EventLoopThread) -> None:
        self._sampler, self._loop = sampler, loop

    async def sample(self, request: SampleRequest) -> SampleResponse:
        """See `PolicySampler.sample`."""
        return await asyncio.to_thread(self._loop.run, self._sampler.sample(request), ANSWER_TIMEOUT_S)

    def load(self, version: int, adapter: Path) -> None:
        """See `PolicySampler.load`."""
        self._loop.run(self._sampler.load(version, adapter), ANSWER_TIMEOUT_S)


@contextmanager
def _source(sampler: PolicySampler) -> Iterator[_Source]:
    loop = EventLoopThread("model-check")

    async def stop() -> None:
        sampler.shutdown()

    try:
        yield _Source(sampler, loop)
    finally:
        try:
            loop.run(stop(), ANSWER_TIMEOUT_S)
        finally:
            loop.close()


def _set_adapter(learner: Learner, draws: torch.Generator | None) -> None:
    """Makes the adapter's matrices B random, or 0 where nothing is drawn: the base model."""
    with torch.no_grad():
        for name, parameter in adapter_parameters(learner.policy):
            if "lora_B" in name:
                drawn = torch.zeros(parameter.shape)
                parameter.copy_(drawn if draws is None else drawn.normal_(std=ADAPTER_SCALE, generator=draws))


def _mean(mismatch: Mismatch) -> float:
    return mismatch.mean


def _largest(mismatch: Mismatch) -> float:
    return mismatch.max
