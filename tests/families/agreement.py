"""Sampler against learner, token by token, on any model folder: base model and adapter, pictures of two sizes."""

import asyncio
import io
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gflowvlm.actors.sampling import PolicySampler, SampleRequest
from gflowvlm.learner.model import adapter_parameters, load_policy, reference_policy
from gflowvlm.learner.packing import ScoredStep
from gflowvlm.learner.scoring import Scorer
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.pictures import join_pictures
from gflowvlm.shared.policy_inputs import PolicyInputs

CPU = torch.device("cpu")
PROMPTS = ("Move to the target.", "Which number does the picture show? Target: 5\nAction 1: +\nAnswer in one line.")
SIZES = ((64, 64), (112, 64))
"""Width and height of the pictures, pixels: they must differ in their number of tokens where that depends on size."""


def picture(seed: int, size: tuple[int, int]) -> bytes:
    """Returns a random picture as PNG, in blocks that survive a resize."""
    blocks = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def requests(version: int, max_tokens: int = 10) -> list[SampleRequest]:
    """Returns requests of four states in two picture sizes, one with two pictures; two requests for each."""
    states = [
        (PROMPTS[0], picture(0, SIZES[0])),
        (PROMPTS[1], picture(1, SIZES[1])),
        (PROMPTS[0], picture(2, SIZES[1])),
        (PROMPTS[0], join_pictures([picture(3, SIZES[0]), picture(4, SIZES[1])])),
    ]
    return [
        SampleRequest(prompt, shown, max_tokens=max_tokens, temperature=1.0, version=version, seed=seed)
        for prompt, shown in states
        for seed in (1, 2)
    ]


def sampling(engine: str) -> RunConfig:
    """Returns the configuration of a small engine that takes these requests."""
    sampler = {"engine": engine, "max_model_len": 640, "kv_cache_gib": 0.05, "max_num_seqs": 8}
    return RunConfig.model_validate({"sampler": sampler, "task": {"pictures": 2}})


def scored(request: SampleRequest, token_ids: Sequence[int]) -> ScoredStep:
    """Returns a response as one long chain of thought: what is compared are its tokens."""
    length = len(token_ids)
    return ScoredStep(request.prompt, request.image, list(token_ids), cot_end=length, action_end=length)


def lively_policy(config: RunConfig, model: Path) -> Any:
    """Returns a policy whose adapter changes what the base model says."""
    policy = load_policy(config.policy, str(model), seed=0, device=CPU)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in adapter_parameters(policy):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy


async def difference(sampler: PolicySampler, policy: Any, inputs: PolicyInputs, version: int) -> float:
    """Returns the largest difference of a token's log-probability between sampler and learner, nats.

    Args:
        sampler: Holds the policy's adapter as the version, unless that is 0.
        policy: The learner's.
        inputs: Its processor.
        version: 0 for the base model.
    """
    asked = requests(version)
    responses = await asyncio.gather(*(sampler.sample(request) for request in asked))
    scorer = Scorer(policy, inputs, CPU, token_budget=100_000)
    (batch,) = scorer.pack([scored(r, a.token_ids) for r, a in zip(asked, responses, strict=True)])
    with torch.no_grad(), reference_policy(policy) if version == 0 else nullcontext():
        found = scorer.score_steps(batch).token_log_probs
    rows = [found[batch.index.index(i), : len(a.token_ids)] for i, a in enumerate(responses)]
    return max(
        float((row - torch.tensor(answer.log_probs)).abs().max()) for row, answer in zip(rows, responses, strict=True)
    )
