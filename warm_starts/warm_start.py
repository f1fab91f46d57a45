"""What a supervised policy can do: does it read, does it say the true relation, how does it act?"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from gflowvlm.envs.base import TaskEnv
from gflowvlm.envs.registry import make_env
from gflowvlm.shared.answer_formats import ParsedResponse
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.task_settings import TaskSettings

_CHUNK = 64
_WORDINGS = 32


@dataclass(frozen=True)
class WarmStartFigures:
    """Shares measured while the policy plays whole episodes.

    Attributes:
        split: ``id`` or ``ood``.
        temperature: 0 is greedy.
        episodes: Episodes played, each of another instance.
        responses: Responses in them.
        success: Share of episodes that succeeded.
        malformed: Share of responses without a readable action.
        inadmissible: Share of responses whose action was not admissible.
        reading: Share of responses whose fields (the numbers read) are all right.
        relation: Share of responses whose thoughts are a demonstration's for the same state, and so true.
        expert_actions: Share of responses whose action is the expert's.
        actions: How often each action was chosen, as shares.
    """

    split: str
    temperature: float
    episodes: int
    responses: int
    success: float
    malformed: float
    inadmissible: float
    reading: float
    relation: float
    expert_actions: float
    actions: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """Returns the figures as JSON values, shares rounded to four digits."""
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(self).items()}


def play_and_measure(
    network: Any,
    inputs: PolicyInputs,
    settings: TaskSettings,
    split: str,
    episodes: int,
    temperature: float,
    seed: int,
    max_tokens: int,
) -> WarmStartFigures:
    """Lets a model play episodes of instances ``seed, seed + 1, …`` and measures what it says and does.

    Args:
        network: The model.
        inputs: Its processor.
        settings: The task's settings.
        split: ``id`` or ``ood``.
        episodes: How many, each of another instance.
        temperature: Sampling temperature; 0 is greedy.
        seed: First instance seed, and the seed of sampling.
        max_tokens: Longest response.
    """
    environments = [make_env(settings) for _ in range(episodes)]
    for number, environment in enumerate(environments):
        environment.reset(seed=seed + number, options={"split": split})
    counts: Counter[str] = Counter()
    actions: Counter[str] = Counter()
    with torch.random.fork_rng(devices=[network.device] if network.device.type == "cuda" else []):
        torch.manual_seed(seed)
        while live := [e for e in environments if e.end is None]:
            texts = generate(
                network, inputs, [e.prompt() for e in live], [e.shown() for e in live], temperature, max_tokens
            )
            for environment, text in zip(live, texts, strict=True):
                response = environment.answer_format.parse(text)
                _count(environment, response, counts, actions)
                environment.step(response.action or "")
    responses = counts["responses"]
    return WarmStartFigures(
        split=split,
        temperature=temperature,
        episodes=episodes,
        responses=responses,
        success=sum(e.success for e in environments) / episodes,
        malformed=counts["malformed"] / responses,
        inadmissible=counts["inadmissible"] / responses,
        reading=counts["reading"] / responses,
        relation=counts["relation"] / responses,
        expert_actions=counts["expert"] / responses,
        actions={action: number / responses for action, number in sorted(actions.items())},
    )


def generate(
    network: Any,
    inputs: PolicyInputs,
    prompts: Sequence[str],
    images: Sequence[bytes],
    temperature: float,
    max_tokens: int,
) -> list[str]:
    """Returns one response for each prompt, sampled with transformers; special tokens are suppressed."""
    options: dict[str, Any] = {"max_new_tokens": max_tokens, "suppress_tokens": inputs.forbidden_ids}
    if temperature > 0:
        options |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    else:
        options["do_sample"] = False
    padding = inputs.tokenizer.pad_token_id
    options["pad_token_id"] = inputs.end_id if padding is None else padding
    texts: list[str] = []
    for first in range(0, len(prompts), _CHUNK):
        batch = inputs.encode(prompts[first : first + _CHUNK], images[first : first + _CHUNK])
        batch = batch.to(network.device, network.dtype)
        with torch.no_grad(), _no_generation_settings(network):
            tokens = network.generate(**batch, eos_token_id=sorted(inputs.end_ids), **options)
        for row in tokens[:, batch["input_ids"].shape[1] :].tolist():
            texts.append(inputs.decode(list(takewhile(lambda token: token not in inputs.end_ids, row))))
    return texts


@contextmanager
def _no_generation_settings(network: Any) -> Iterator[None]:
    """Keeps the model's own generation settings, a repetition penalty for example, out of what it generates inside."""
    own = network.generation_config
    network.generation_config = GenerationConfig()
    try:
        yield
    finally:
        network.generation_config = own


def _count(environment: TaskEnv, response: ParsedResponse, counts: Counter[str], actions: Counter[str]) -> None:
    counts["responses"] += 1
    if response.action is None:
        counts["malformed"] += 1
        return
    actions[response.action if response.action in environment.admissible_actions else "other"] += 1
    counts["inadmissible"] += response.action not in environment.admissible_actions
    counts["expert"] += response.action == environment.expert_action()
    demonstrations = [
        environment.answer_format.parse(
            environment.demonstration(environment.expert_action(), np.random.default_rng(wording))
        )
        for wording in range(_WORDINGS)
    ]
    counts["reading"] += response.fields == demonstrations[0].fields
    counts["relation"] += response.thoughts in {d.thoughts for d in demonstrations}
