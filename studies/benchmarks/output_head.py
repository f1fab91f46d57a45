"""What the learner's log-probabilities cost at a real vocabulary, in chunks and from all logits at once."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gflowvlm.learner.output_head import LogitMap, frozen_log_probs, log_probs_of
from gflowvlm.studies.benchmarks.measurement import Measurement, Say, Scale
from gflowvlm.studies.benchmarks.memory import peak_memory

PART = "learner"

VOCABULARY = 152_000
"""About Qwen's."""

TOKENS = 768

FEATURES = {"cpu": 256, "cuda": 3584}
"""Width of the hidden states by the type of device; on a CPU a narrow one, to be done in a minute."""

MEMORY_BAR = 0.25
TIME_BAR = 1.1


def bench_output_head(device: torch.device, scale: Scale, say: Say) -> list[Measurement]:
    """Compares forward and backward pass of the output layer, in chunks against all logits at once, in turns."""
    features = FEATURES[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    made: dict[str, Any] = {"generator": generator, "device": device}
    weight = (torch.randn(VOCABULARY, features, **made) * features**-0.5).to(dtype)
    states = torch.randn(TOKENS, features, **made).to(dtype)
    ids = torch.randint(0, VOCABULARY, (TOKENS,), **made)

    def in_chunks() -> Tensor:
        return _gradient(states, lambda x: frozen_log_probs(x, ids, weight, None, LogitMap()))

    def at_once() -> Tensor:
        return _gradient(states, lambda x: log_probs_of(nn.functional.linear(x, weight), ids))

    ways = {"in chunks": in_chunks, "at once": at_once}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(scale.learner_steps):
        for name, work in ways.items():
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
            say(f"output layer, {VOCABULARY:,} tokens, {name}: {seconds[name][-1]:.2f} s")
    peak = {name: peak_memory(work) for name, work in ways.items()}
    what = f"{TOKENS} tokens, vocabulary {VOCABULARY:,}, width {features}, {device.type}; forward and backward"
    share, ratio = peak["in chunks"] / peak["at once"], min(seconds["in chunks"]) / min(seconds["at once"])
    return [
        Measurement(PART, "head_peak_mib", peak["in chunks"] / 2**20, "MiB", f"log-probabilities in chunks; {what}"),
        Measurement(PART, "head_memory_share", share, "share", f"of all logits at once; {what}", at_most=MEMORY_BAR),
        Measurement(PART, "head_time_ratio", ratio, "x", f"against all logits at once; {what}", at_most=TIME_BAR),
    ]


def _gradient(states: Tensor, log_probs: Callable[[Tensor], Tensor]) -> Tensor:
    states = states.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_probs(states).sum(), states)
    return gradient
