"""The whole check of a model: its findings, one after the other, and its figures."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from gflowvlm.evaluation.memory_plan import Memory, MemoryPlan, memory_plan
from gflowvlm.evaluation.model_check import inputs as of_inputs
from gflowvlm.evaluation.model_check import network
from gflowvlm.evaluation.model_check.engine import compared_with_sampler, largest_action_mass
from gflowvlm.evaluation.model_check.states import ProbedState, probed_states
from gflowvlm.learner.learner import Learner
from gflowvlm.learner.objectives import make_objective
from gflowvlm.run.models import resolve_model
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.findings import Check, Status, found_and_advice
from gflowvlm.shared.policy_inputs import PolicyInputs

WHOLE, QUICK = (4, 30.0), (1, 5.0)
"""Instances of each split that are played, and seconds after which none is begun: for a whole check and a quick one."""

OTHER_ENGINE = "sampler.engine=transformers"

Say = Callable[[str], None]
"""Is told what is looked at next."""


@dataclass
class ModelReport:
    """What a check found.

    Attributes:
        checks: The findings, in order.
        action_mass_max: The largest Σ_a P_Act + P(⊤) over the probed states; None where it was not measured.
        round_trip: Share of the demonstrated answers that come back from their tokens.
        mismatch_mean: Mean difference of a token between sampler and learner, nats, of the base model.
        mismatch_max: The largest.
        mismatch_mean_adapter: The mean with an adapter that changes the policy.
        mismatch_max_adapter: The largest with it.
        memory: The memory plan.
        settings: What a run of the default settings has to set for this model, as ``KEY=VALUE``.
    """

    checks: list[Check] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    action_mass_max: float | None = None
    round_trip: float | None = None
    mismatch_mean: float | None = None
    mismatch_max: float | None = None
    mismatch_mean_adapter: float | None = None
    mismatch_max_adapter: float | None = None
    memory: MemoryPlan | None = None

    @property
    def broken(self) -> list[Check]:
        """The findings for which the model cannot be trained."""
        return [check for check in self.checks if check.status is Status.BROKEN]

    @property
    def problems(self) -> list[str]:
        """One line for each of them but what the memory plan says itself, and why there is no plan."""
        shown = [check for check in self.broken if self.memory is None or check.name != network.MEMORY]
        if not shown and self.memory is None:
            shown = [check for check in self.checks if check.name == network.MEMORY]
        return ["; ".join(filter(None, (check.detail, check.advice))) for check in shown]

    @property
    def trainable(self) -> bool:
        """Whether nothing speaks against training it."""
        return not self.broken

    def as_json(self) -> dict[str, Any]:
        """Returns the report as plain values."""
        plan = self.memory
        return {
            "trainable": self.trainable,
            "checks": [{**asdict(check), "status": check.status.value} for check in self.checks],
            "action_mass_max": self.action_mass_max,
            "round_trip": self.round_trip,
            "mismatch_mean": self.mismatch_mean,
            "mismatch_max": self.mismatch_max,
            "mismatch_mean_adapter": self.mismatch_mean_adapter,
            "mismatch_max_adapter": self.mismatch_max_adapter,
            "settings": self.settings,
            "memory_plan": None if plan is None else plan.as_json(),
        }


def check_model(config: RunConfig, memory: Memory, say: Say, *, whole: bool, implied: bool = False) -> ModelReport:
    """Looks at everything that makes a model trainable by a run's configuration, or not.

    Args:
        config: The run's configuration; its paths are absolute.
        memory: What memory there is.
        say: Is told what is looked at.
        whole: Whether weights are loaded and the sampler's engine is started, too.
        implied: Whether nobody has chosen the configuration: what does not fit it is then no fault of the model's.

    Returns:
        The findings up to the first without which no later one can be had.
    """
    report = ModelReport()
    checking = _Checking(config, memory, say, report, whole, implied)
    report.checks.extend(checking.findings())
    return report


def require_trainable(config: RunConfig, memory: Memory) -> None:
    """Makes sure, before a run, of all that can be known without weights and engine.

    Args:
        config: The run's configuration; its paths are absolute.
        memory: What memory there is.

    Raises:
        UserError: The first finding for which the run could not train.
    """
    report = check_model(config, memory, lambda what: None, whole=False)
    for check in report.broken:
        raise UserError("; ".join(filter(None, (check.detail, check.advice))))


class _Checking:
    """One check, under way."""

    def __init__(
        self, config: RunConfig, memory: Memory, say: Say, report: ModelReport, whole: bool, implied: bool
    ) -> None:
        self._config, self._memory, self._say, self._report = config, memory, say, report
        self._whole, self._implied = whole, implied

    def findings(self) -> Iterator[Check]:
        """Yields the findings; their figures go to the report."""
        config = self._config
        self._say("the processor")
        try:
            inputs = PolicyInputs.load(resolve_model(config.policy.model), config.task.answer_format, config.policy)
        except UserError as error:
            yield Check("processor", Status.BROKEN, *found_and_advice(error))
            return
        yield Check("processor", Status.OK, f"{type(inputs.processor).__name__}, {type(inputs.tokenizer).__name__}")
        yield network.check_architecture(inputs.model)
        self._say("the task's prompts and answers")
        try:
            states = probed_states(config, *(WHOLE if self._whole else QUICK))
        except UserError as error:
            yield Check("task", Status.BROKEN, *found_and_advice(error))
            return
        template = of_inputs.check_template(inputs, states[0])
        yield template
        if template.status is Status.BROKEN:
            return
        broken = False
        for check in (*self._of_inputs(inputs, states), *self._of_network(inputs)):
            broken = broken or check.status is Status.BROKEN
            yield check
        if self._whole and not broken:
            yield from self._measured(inputs, states)

    def _of_inputs(self, inputs: PolicyInputs, states: list[ProbedState]) -> Iterator[Check]:
        yield of_inputs.check_start_token(inputs, states[0])
        yield of_inputs.check_end_tokens(inputs)
        answers = of_inputs.round_trip(inputs, states)
        self._report.round_trip = answers.share
        yield of_inputs.check_round_trip(answers)
        yield of_inputs.check_stop(inputs, answers, state_wise=make_objective(self._config).uses_stops)
        self._prompts = of_inputs.measured_prompts(inputs, states)
        if self._implied:
            self._config, self._report.settings = of_inputs.with_room(self._config, self._prompts)
        yield of_inputs.check_lengths(self._config, self._prompts)

    def _of_network(self, inputs: PolicyInputs) -> Iterator[Check]:
        self._say("the network, without its weights")
        targets = network.check_targets(self._config, inputs.model)
        yield targets
        if targets.status is Status.BROKEN:
            return
        if self._config.policy.load_in is not None:
            yield network.check_fewer_bits(self._config.policy.load_in, here=self._config.cluster.address is None)
        try:
            plan = memory_plan(self._config, inputs.model, self._prompts.size, self._memory)
        except UserError as error:
            yield Check(network.MEMORY, Status.NOTE, *found_and_advice(error))
            return
        self._report.memory = plan
        yield network.check_memory(plan, Status.NOTE if self._implied else Status.BROKEN)

    def _measured(self, inputs: PolicyInputs, states: list[ProbedState]) -> Iterator[Check]:
        """Yields what only the weights and the sampler's engine tell."""
        config, plan = self._config, self._report.memory
        gpus = max(config.sampler.gpus_per_replica, config.learner.gpus_per_worker)
        if (plan is not None and plan.problems) or (gpus > 0 and not torch.cuda.is_available()):
            reason = "no GPU is seen here" if gpus > 0 else "by the memory plan they do not fit here"
            advice = "run the check where the run is to be, or with settings that fit here"
            yield Check("weights, sampler", Status.NOTE, f"not looked at: {reason}", advice)
            return
        self._say("the weights")
        try:
            learner = Learner(config, inputs.model)
        except UserError as error:
            yield Check("weights", Status.BROKEN, *found_and_advice(error))
            return
        mass = largest_action_mass(config, learner, inputs, states)
        self._report.action_mass_max = mass.largest
        yield mass.check()
        check = self._sampler(config, inputs, learner)
        if check.status is not Status.BROKEN or config.sampler.engine != "vllm" or not self._implied:
            yield check
            return
        # Nobody has asked for vLLM: what it cannot do with this model, the other engine may.
        yield Check("vLLM", Status.NOTE, check.detail, f"set {OTHER_ENGINE}")
        sampler = config.sampler.model_copy(update={"engine": "transformers"})
        self._report.settings.append(OTHER_ENGINE)
        yield self._sampler(config.model_copy(update={"sampler": sampler}), inputs, learner)

    def _sampler(self, config: RunConfig, inputs: PolicyInputs, learner: Learner) -> Check:
        """Compares the sampler with the learner."""
        self._say(f"the sampler ({config.sampler.engine}) beside the learner")
        try:
            agreement = compared_with_sampler(config, inputs, learner)
        except UserError as error:
            return Check("sampler", Status.BROKEN, *found_and_advice(error))
        base, adapted = agreement.base, agreement.adapted
        self._report.mismatch_mean, self._report.mismatch_max = base.mean, base.max
        self._report.mismatch_mean_adapter, self._report.mismatch_max_adapter = adapted.mean, adapted.max
        return agreement.check(config, inputs.model)
