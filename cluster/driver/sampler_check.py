"""The check at start: whether sampler and learner give the same tokens the same probabilities."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from ray import serve

from gflowvlm.actors.policy_client import PolicyClient
from gflowvlm.actors.policy_server import DEPLOYMENT
from gflowvlm.actors.sampling import SampleRequest
from gflowvlm.envs.registry import make_env
from gflowvlm.learner.mismatch import Mismatch, compare
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.response import parse_response, token_spans
from gflowvlm.shared.trajectory import BASE_VERSION, EndReason, Step, Trajectory, Validity

Score = Callable[[Sequence[Trajectory]], list[list[list[float]]]]
"""Gives the learner's log-probability of every response token; see `Learner.score`."""


def compare_with_sampler(config: RunConfig, model_path: str, server_name: str, score: Score) -> Mismatch:
    """Returns how far a sampled response's log-probabilities are from the learner's, both of the base model.

    Args:
        config: The run's configuration.
        model_path: Model directory or hub name.
        server_name: Name of the policy server's Serve application.
        score: The learner's `Learner.score`.
    """
    trajectory = asyncio.run(_one_sampled_state(config, model_path, server_name))
    return compare([trajectory], score([trajectory]))


def mismatch_row(mismatch: Mismatch) -> dict[str, Any]:
    """Returns the figures of the check as the run's log has them."""
    return {"max": mismatch.max, "tokens": mismatch.tokens}


def require_agreement(mismatch: Mismatch, config: RunConfig, model_path: str) -> None:
    """Raises UserError when the two are further apart than the run's configuration allows."""
    if mismatch.max > config.sampler.mismatch_tolerance:
        worst = mismatch.worst[0]
        token = PolicyInputs.load(model_path).decode([worst.token_id])
        raise UserError(
            f"sampler and learner disagree by {mismatch.max:.3g} nats (sampler.mismatch_tolerance is "
            f"{config.sampler.mismatch_tolerance:g}) at token {worst.position} ({token!r}): sampler "
            f"{worst.sampler:.4f}, learner {worst.learner:.4f}; check policy.dtype and the model's processor"
        )


async def _one_sampled_state(config: RunConfig, model_path: str, server_name: str) -> Trajectory:
    """Returns a one-step trajectory: what the base model answers at the first evaluation instance."""
    env = make_env(config.task)
    env.reset(seed=config.evaluation.seed, options={"split": "id"})
    client = PolicyClient.from_config(serve.get_deployment_handle(DEPLOYMENT, server_name), config)
    prompt, image = env.prompt(), env.image_png()
    response = await client.sample(
        SampleRequest(prompt, image, config.policy.max_response_tokens, temperature=1.0, version=BASE_VERSION)
    )
    parsed = parse_response(response.text)
    spans = token_spans(response.token_ids, parsed.action_chars, PolicyInputs.load(model_path).decode)
    step = Step(
        prompt=prompt,
        image=0,
        response_ids=response.token_ids,
        response_text=response.text,
        cot_end=spans.cot_end,
        action_end=spans.action_end,
        sampler_log_probs=response.log_probs,
        policy_version=response.version,
        action=parsed.action,
        validity=Validity.MALFORMED if parsed.malformed else Validity.VALID,
    )
    log_reward = env.log_reward
    return Trajectory(
        trajectory_id="check",
        group_id="check",
        instance_id=env.instance_id,
        instance_seed=config.evaluation.seed,
        task=config.task.name,
        split="id",
        steps=[step],
        images=[image],
        log_rewards=[log_reward],
        original_rewards=[0.0],
        end=EndReason.DONE,
        success=False,
        outcome="",
        expert=False,
    )
