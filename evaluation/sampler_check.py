"""The check at start: whether sampler and learner give the same tokens the same probabilities.

Several responses to several instances are compared, by the mean of the differences and by a high quantile: in bfloat16
a single unlikely token differs by tenths of a nat between two engines that are both right.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gflowvlm.actors.environment_hosts import EnvironmentHosts
from gflowvlm.actors.environments import (
    EnvironmentFailedError,
    EnvironmentLostError,
    LocalCalls,
    View,
)
from gflowvlm.actors.episode import ResponseSource
from gflowvlm.actors.event_loop import EventLoopEndedError, EventLoopThread
from gflowvlm.actors.sampling import PromptTooLongError, SampleRequest, SampleResponse
from gflowvlm.learner.mismatch import QUANTILE, Mismatch, compare
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.precision import FewerBits
from gflowvlm.shared.trajectory import BASE_VERSION, EndReason, Step, Trajectory, Validity

INSTANCES, SAMPLES = 8, 2
"""How many instances are answered, and how often each: enough tokens that a few unlikely ones are a few per cent."""

Score = Callable[[Sequence[Trajectory]], list[list[list[float]]]]
"""Gives the learner's log-probability of every response token; see `Learner.score`."""


def compare_with_sampler(config: RunConfig, model_path: str, source: ResponseSource, score: Score) -> Mismatch:
    """Returns how far sampled responses' log-probabilities are from the learner's, both of the base model.

    Args:
        config: The run's configuration.
        model_path: Model directory or hub name.
        source: Samples the responses.
        score: The learner's `Learner.score`.

    Raises:
        UserError: None of the instances could be answered.
    """
    responses = sampled_responses(config, PolicyInputs.load(model_path, config.task.answer_format), source)
    return compare(responses, score(responses))


def mismatch_row(mismatch: Mismatch) -> dict[str, Any]:
    """Returns the figures of the check as the run's log has them."""
    return {
        "mean": mismatch.mean,
        "quantile_99": mismatch.high,
        "max": mismatch.max,
        "tokens": mismatch.tokens,
        "responses": mismatch.trajectories,
    }


def agreement_line(row: Mapping[str, Any]) -> str:
    """Returns what is said of a check that was passed, from its `mismatch_row`."""
    return (
        f"sampler and learner agree to {row['mean']:.1e} nats in the mean and {row['quantile_99']:.1e} at the "
        f"{QUANTILE:.0%} quantile, on {row['tokens']} tokens of {row['responses']} responses"
    )


def rounding_line(load_in: FewerBits) -> str:
    """Returns what is said beside `agreement_line` of a learner whose weights are in fewer bits."""
    return (
        f"policy.load_in = {load_in}: that difference is what the learner's rounded weights cost; the adapter is "
        "trained beside these, and played beside exact ones"
    )


def require_agreement(mismatch: Mismatch, config: RunConfig, model_path: str) -> None:
    """Raises UserError when the two are further apart than the run's configuration allows."""
    limits = config.mismatch_limits
    if mismatch.mean <= limits.mean and mismatch.high <= limits.high:
        return
    worst = mismatch.worst[0]
    inputs = PolicyInputs.load(model_path)
    token = inputs.decode([worst.token_id])
    on_cpu = config.sampler.engine == "vllm" and config.sampler.gpus_per_replica == 0
    advice = (
        "tokens of a picture (or of the whole prompt) see each other in this model, which vLLM's CPU backend does not "
        "compute; set sampler.engine=transformers"
        if on_cpu and inputs.has_token_types
        else "check policy.dtype and the model's processor"
    )
    raise UserError(
        f"sampler and learner disagree by {mismatch.mean:.2g} nats in the mean (sampler.mismatch_mean_tolerance is "
        f"{limits.mean:g}) and {mismatch.high:.2g} at the {QUANTILE:.0%} quantile (sampler.mismatch_tolerance is "
        f"{limits.high:g}), most at the token {token!r}: sampler {worst.sampler:.4f}, learner {worst.learner:.4f}; "
        f"{advice}"
    )


def sampled_responses(
    config: RunConfig, inputs: PolicyInputs, source: ResponseSource, version: int = BASE_VERSION
) -> list[Trajectory]:
    """Returns what a policy answers to the first evaluation instances, each response a trajectory of one step.

    Instances that cannot be started or shown are left out.

    Args:
        config: The run's configuration.
        inputs: The policy's processor.
        source: Samples the responses.
        version: Which version of the policy answers.

    Raises:
        UserError: None of them could be answered.
    """
    timeout_s, processes = config.rollout.environment_timeout_s, config.environment_processes
    calls = LocalCalls()
    hosts = EnvironmentHosts(config.task, min(processes, 1), timeout_s, calls)

    async def of_instance(seed: int) -> list[Trajectory] | str:
        try:
            environment = hosts.open(0)
            try:
                view = await environment.start(seed, "id", [0])
            finally:
                environment.close()
            request = SampleRequest(view.prompt, view.image, config.policy.max_response_tokens, 1.0, version)
            responses = await asyncio.gather(*(source.sample(request) for _ in range(SAMPLES)))
        except (EnvironmentFailedError, EnvironmentLostError, PromptTooLongError) as error:
            return str(error)
        return [_one_step(view, seed, f"check-{seed}-{i}", r, inputs) for i, r in enumerate(responses)]

    async def of_all() -> list[list[Trajectory] | str]:
        seeds = range(config.evaluation.seed, config.evaluation.seed + INSTANCES)
        return await asyncio.gather(*(of_instance(seed) for seed in seeds))

    loop = EventLoopThread("sampler-check", blocked_s=timeout_s)
    try:
        answered = loop.run(of_all())
    except EventLoopEndedError:
        name = config.task.name if calls.running is None else calls.running[2]
        raise UserError(
            f"{name}: did not return in {timeout_s:g} s (rollout.environment_timeout_s); play it in a process of its "
            "own (rollout.environment_processes=1)"
        ) from None
    finally:
        hosts.close()
        loop.close()
    found = [trajectory for one in answered if not isinstance(one, str) for trajectory in one]
    if not found:
        reason = next(one for one in answered if isinstance(one, str))
        raise UserError(f"sampler and learner cannot be compared, no instance could be answered: {reason}")
    return found


def _one_step(view: View, seed: int, name: str, response: SampleResponse, inputs: PolicyInputs) -> Trajectory:
    read = inputs.read(response.token_ids)
    step = Step(
        prompt=view.prompt,
        image=0,
        response_ids=response.token_ids,
        response_text=response.text,
        cot_end=read.layout.cot_end,
        action_end=read.layout.action_end,
        sampler_log_probs=response.log_probs,
        policy_version=response.version,
        action=read.parsed.action,
        validity=Validity.MALFORMED if read.parsed.malformed else Validity.VALID,
        stop_ids=read.layout.stop_ids,
    )
    return Trajectory(
        trajectory_id=name,
        group_id="check",
        instance_id=view.instance_id,
        instance_seed=seed,
        task=view.task,
        split="id",
        steps=[step],
        images=[view.image],
        log_rewards=[view.log_reward],
        original_rewards=[0.0],
        end=EndReason.DONE,
        success=False,
        outcome="",
        expert=False,
    )
