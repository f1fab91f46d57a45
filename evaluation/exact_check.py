"""Policies of one task and base model, measured exactly on the same instances."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from gflowvlm.actors.event_loop import EventLoopThread
from gflowvlm.actors.sampling import SampleRequest
from gflowvlm.actors.transformers_sampler import TransformersSampler
from gflowvlm.envs.registry import make_env
from gflowvlm.evaluation.action_tree import MAX_STATES, TreeState, expand_tree, tree_size
from gflowvlm.evaluation.exact import (
    LEFT_OUT,
    THOUGHT_SAMPLES,
    ActionProbabilities,
    ThoughtSampler,
    action_probabilities,
)
from gflowvlm.evaluation.exact_match import ExactMatch, exact_match, log_thought_factors, mean_match
from gflowvlm.learner.model import load_adapted
from gflowvlm.learner.scoring import Scorer
from gflowvlm.run.models import resolve_model
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.device import on_this_machine, sampler_device
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.trajectory import BASE_VERSION

SAMPLING_TIMEOUT_S = 1800.0
"""Longest that the thoughts of some states may take to be sampled."""


class ExactCheck:
    """The trees of some instances, and the base model's probabilities on all of them.

    The base model is the reference policy too, so what training aims at comes from it; `base` is its own match.

    Attributes:
        instances: How many instances.
        base: The base model's match; None where a tree is too large to be expanded.
    """

    def __init__(self, config: RunConfig, *, split: str, seed: int, instances: int, console: Console) -> None:
        """Expands the trees and scores the base model; about 15 seconds an instance with the default preset.

        Args:
            config: A run's configuration: task, base model and target.
            split: ``id`` or ``ood``.
            seed: Seed of the first instance.
            instances: Instances to expand; figures are means over them.
            console: Where progress is shown.
        """
        self.instances = instances
        self._config = config = on_this_machine(config, torch.cuda.is_available())
        self._console = console
        self.base: ExactMatch | None = None
        env = make_env(config.task)
        self._trees = []
        for instance in range(instances):
            env.reset(seed=seed + instance, options={"split": split})
            if tree_size(env) > MAX_STATES:
                return
            self._trees.append(expand_tree(env))
        self._model = resolve_model(config.policy.model)
        self._inputs = PolicyInputs.load(self._model, config.task.answer_format, config.policy)
        reference = self._probabilities(None, 0.0, "base model")
        weights = config.target.reference_weight, config.policy.cot_weight
        self._log_factors = [log_thought_factors(given, *weights) for given in reference]
        self.base = self._match(reference)

    def measure(self, adapter: Path) -> ExactMatch:
        """Returns the match of the base model with an adapter.

        Args:
            adapter: The adapter's folder.

        Raises:
            ValueError: The trees are too large (`base` is None).
        """
        if self.base is None:
            raise ValueError("the trees were not expanded")
        return self._match(self._probabilities(adapter, LEFT_OUT, f"adapter {adapter.name}"))

    def _probabilities(
        self, adapter: Path | None, left_out: float, name: str
    ) -> list[list[ActionProbabilities | None]]:
        device = torch.device(sampler_device(self._config, torch.cuda.is_available()))
        policy = load_adapted(self._model, self._config.policy.dtype, adapter, device)
        scorer = Scorer(policy, self._inputs, device, self._config.learner.token_budget)
        with (
            _thoughts(self._config, self._model, adapter) as sample_thoughts,
            Progress(console=self._console, transient=True) as progress,
        ):
            task = progress.add_task(f"following every action sequence, {name}", total=float(len(self._trees)))
            advance = partial(progress.advance, task)
            return [
                action_probabilities(tree, scorer, self._inputs, advance, left_out, sample_thoughts)
                for tree in self._trees
            ]

    def _match(self, probabilities: list[list[ActionProbabilities | None]]) -> ExactMatch:
        target, samples = self._config.target, self._config.evaluation.samples
        measured = zip(self._trees, probabilities, self._log_factors, strict=True)
        return mean_match(
            [
                exact_match(tree, given, target.reward_exponent, factors, samples, target.log_reward_floor)
                for tree, given, factors in measured
            ]
        )


@contextmanager
def _thoughts(config: RunConfig, model: str, adapter: Path | None) -> Iterator[ThoughtSampler]:
    """Yields what samples responses of the base model or of it with an adapter, at temperature 1.

    The sampler's own copy of the model is loaded once it is needed.
    """
    version = BASE_VERSION if adapter is None else BASE_VERSION + 1

    @cache
    def started() -> tuple[EventLoopThread, TransformersSampler]:
        loop, sampler = EventLoopThread("thoughts"), TransformersSampler(config, model)

        async def stop() -> None:
            sampler.shutdown()

        stack.callback(loop.close)
        stack.callback(lambda: loop.run(stop(), SAMPLING_TIMEOUT_S))
        if adapter is not None:
            loop.run(sampler.load(version, adapter), SAMPLING_TIMEOUT_S)
        return loop, sampler

    async def draw(sampler: TransformersSampler, states: Sequence[TreeState]) -> list[str]:
        length = config.policy.max_response_tokens
        requests = [
            SampleRequest(state.prompt, state.image, length, temperature=1.0, version=version, seed=seed)
            for state in states
            for seed in range(THOUGHT_SAMPLES)
        ]
        return [response.text for response in await asyncio.gather(*map(sampler.sample, requests))]

    def sample_thoughts(states: Sequence[TreeState]) -> list[list[str]]:
        loop, sampler = started()
        texts = loop.run(draw(sampler, states), SAMPLING_TIMEOUT_S)
        return [texts[i : i + THOUGHT_SAMPLES] for i in range(0, len(texts), THOUGHT_SAMPLES)]

    with ExitStack() as stack:
        yield sample_thoughts
