"""The parts of `gpu_check.py`: what is measured of one shape."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_shapes import PATCH, Shape, make_config, make_inputs, make_model, make_trajectories
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from gflowvlm.learner.learner import Learner
from gflowvlm.learner.memory import PlannedModel, PromptSize
from gflowvlm.learner.model import adapted
from gflowvlm.learner.output_head import LogitMap, frozen_log_probs, log_probs_of
from gflowvlm.learner.packing import ScoredStep, steps_of
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.lora_layers import lora_target_names
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.trajectory import Trajectory

GIB = 2**30
TIMED = 3
HEAD_TOKENS = 4096
"""Response tokens whose log-probabilities the head's part computes; 16 MiB of logits each thousand at 4 B x 152k."""

MATRIX = {"cuda": 8192, "cpu": 512}
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0, "A10": 125.0, "L4": 121.0}
"""Dense bfloat16 products, 10^12 operations a second by the makers' sheets, by a part of the device's name."""

Add = Callable[[str, str, dict[str, Any]], None]


class Clock:
    """Times work on a device, and sees what it takes of its memory.

    Args:
        device: The device.
        deadline: When no further repetition may begin, on `time.monotonic`'s clock.
    """

    def __init__(self, device: torch.device, deadline: float) -> None:
        self.device, self._deadline = device, deadline

    def seconds(self, work: Callable[[], object]) -> float:
        """Returns the median time of `TIMED` repetitions behind one that is not counted, seconds."""
        work()
        times: list[float] = []
        while len(times) < TIMED and (not times or time.monotonic() + 2 * max(times) < self._deadline):
            self._synchronize()
            started = time.perf_counter()
            work()
            self._synchronize()
            times.append(time.perf_counter() - started)
        return sorted(times)[len(times) // 2]

    def peak_gib(self, work: Callable[[], object]) -> float | None:
        """Returns the most memory that is held during some work, GiB; None on a CPU, where torch does not count it."""
        if self.device.type != "cuda":
            work()
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        work()
        self._synchronize()
        return torch.cuda.max_memory_allocated() / GIB

    def held_gib(self) -> float | None:
        """Returns the memory that is held now, GiB; None on a CPU."""
        return torch.cuda.memory_allocated() / GIB if self.device.type == "cuda" else None

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def describe(device: torch.device) -> dict[str, Any]:
    """Returns what is measured on, with the rate of a large bfloat16 product that it reaches."""
    import peft
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    size = MATRIX[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = Clock(device, float("inf")).seconds(lambda: left @ right)
    return {
        "name": name,
        "memory_gib": torch.cuda.get_device_properties(device).total_memory / GIB if device.type == "cuda" else None,
        "product_tflops": 2 * size**3 / seconds / 1e12,
        "sheet_tflops": next((rate for part, rate in PEAK_TFLOPS.items() if part in name), None),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def check_shape(shape: Shape, clock: Clock, rate: float, checkpointing: bool, folder: Path, add: Add) -> None:
    """Measures all parts of a shape; a part that fails gives its reason, and the next ones go on.

    Args:
        shape: The shape.
        clock: Measures time and memory on the device.
        rate: Operations a second that count as all of the device, 10^12.
        checkpointing: Whether activations are computed again instead of kept.
        folder: Where the model's configuration may stand.
        add: Takes the figures of each part: shape, part, figures.
    """

    def part(name: str, work: Callable[[], dict[str, Any]]) -> None:
        try:
            figures = work()
        except RuntimeError as error:
            figures = {"why_not": " ".join(str(error).split())[:300]}
        add(shape.name, name, figures)
        gc.collect()
        if clock.device.type == "cuda":
            torch.cuda.empty_cache()

    inputs = make_inputs(shape, folder)
    config = run_config(shape, clock.device, checkpointing)
    model: list[Any] = []

    def build() -> dict[str, Any]:
        started = time.perf_counter()
        model.append(make_model(make_config(shape, inputs.tokenizer), clock.device, torch.bfloat16))
        numbers = sum(parameter.numel() for parameter in model[0].parameters())
        return {"seconds": time.perf_counter() - started, "parameters": numbers, "held_gib": clock.held_gib()}

    part("build", build)
    if not model:
        return
    part("head", lambda: measure_head(model[0].get_output_embeddings().weight, clock))
    steps = steps_of(make_trajectories(shape, inputs))
    work = Workload(model[0], shape, inputs, steps)
    part("learner", lambda: measure_learner(model[0], config, shape, inputs, work, clock, rate))
    part("memory plan", lambda: plan_memory(config, shape, inputs, steps))
    part("plain", lambda: measure_plain(model[0], config, inputs, steps, work, clock, rate))


def run_config(shape: Shape, device: torch.device, checkpointing: bool) -> RunConfig:
    """Returns the configuration of the learner that is measured."""
    return RunConfig.model_validate(
        {
            "policy": {
                "dtype": "bfloat16",
                "max_response_tokens": max(64, shape.response + 8),
                "gradient_checkpointing": checkpointing,
            },
            "rollout": {"group_size": shape.group_size},
            "sampler": {"max_model_len": 4096},
            "learner": {
                "groups_per_batch": shape.groups,
                "token_budget": shape.token_budget,
                "gpus_per_worker": 1.0 if device.type == "cuda" else 0.0,
            },
        }
    )


class Workload:
    """How much a step computes, whoever takes it: every response behind its own prompt, nothing padded or shared.

    Args:
        model: The base model.
        shape: Its shape.
        inputs: Its inputs.
        steps: What is learned from.

    Attributes:
        tokens: Tokens of prompts and responses.
        operations: What a forward and a backward pass without gradients of the frozen weights takes at least.
    """

    def __init__(self, model: Any, shape: Shape, inputs: PolicyInputs, steps: list[ScoredStep]) -> None:
        prompts = inputs.encode([s.prompt for s in steps], [s.image for s in steps])["attention_mask"].sum()
        responses = sum(len(step.response_ids) for step in steps)
        self.tokens = int(prompts) + responses
        decoder = _numbers(model.get_decoder()) - _numbers(model.get_input_embeddings())
        head = _numbers(model.get_output_embeddings())
        tower = _numbers(model.model.visual)
        patches = len(steps) * (shape.side // PATCH) ** 2
        # Two operations for each weight and token, in either direction; the picture's tower has no way back.
        self.operations = 4.0 * (self.tokens * decoder + responses * head) + 2.0 * patches * tower

    def figures(self, seconds: float, rate: float) -> dict[str, Any]:
        """Returns rates of a step that takes so many seconds."""
        share = self.operations / seconds / (rate * 1e12)
        return {"seconds": seconds, "tokens_per_s": self.tokens / seconds, "share_of_peak": share}


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def measure_head(weight: Tensor, clock: Clock) -> dict[str, Any]:
    """Returns time, memory and difference of log-probabilities in chunks and from all logits, with their gradients."""
    weight = weight.detach()
    generator = torch.Generator(device=clock.device).manual_seed(0)
    states = torch.randn(HEAD_TOKENS, weight.shape[1], device=clock.device, generator=generator).to(weight.dtype)
    ids = torch.randint(weight.shape[0], (HEAD_TOKENS,), device=clock.device, generator=generator)

    def passed(log_probs: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leaf = states.clone().requires_grad_()
        found = log_probs(leaf)
        found.sum().backward()
        assert leaf.grad is not None
        return found.detach(), leaf.grad

    def chunked() -> tuple[Tensor, Tensor]:
        return passed(lambda leaf: frozen_log_probs(leaf, ids, weight, None, LogitMap()))

    def whole() -> tuple[Tensor, Tensor]:
        return passed(lambda leaf: log_probs_of(leaf @ weight.T, ids))

    held = clock.held_gib()
    peaks = [clock.peak_gib(work) for work in (chunked, whole)]
    (in_chunks, way), (exact, exact_way) = chunked(), whole()
    return {
        "tokens": HEAD_TOKENS,
        "chunked_s": clock.seconds(chunked),
        "whole_s": clock.seconds(whole),
        "chunked_gib": None if held is None or peaks[0] is None else peaks[0] - held,
        "whole_gib": None if held is None or peaks[1] is None else peaks[1] - held,
        "difference": float((in_chunks - exact).abs().max()),
        "gradient_difference": float((way - exact_way).abs().max() / exact_way.abs().max()),
    }


def measure_learner(
    model: Any, config: RunConfig, shape: Shape, inputs: PolicyInputs, work: Workload, clock: Clock, rate: float
) -> dict[str, Any]:
    """Returns rates and memory of the learner's step; the model is left as it was."""
    policy = adapted(model, config.policy, seed=0).to(clock.device)
    try:
        learner = Learner(config, inputs.model, made=(policy, inputs))
        batch = make_trajectories(shape, inputs)
        difference = _score_difference(learner, batch, inputs)
        metrics: dict[str, float] = {}
        seconds = clock.seconds(lambda: metrics.update(learner.step(batch)))
        peak = clock.peak_gib(lambda: metrics.update(learner.step(batch)))
    finally:
        policy.unload()
    parts = {name: value for name, value in metrics.items() if name.startswith("seconds_")}
    return {
        **work.figures(seconds, rate),
        "tokens": work.tokens,
        "micro_batches": metrics["micro_batches"],
        "peak_gib": peak,
        "loss": metrics["loss"],
        "updated": metrics["updated"],
        "difference": difference,
        **parts,
    }


def plan_memory(config: RunConfig, shape: Shape, inputs: PolicyInputs, steps: list[ScoredStep]) -> dict[str, Any]:
    """Returns what the memory plan says of the learner, GiB: `peak_gib` is to be held beside the learner's."""
    prompts = inputs.encode([s.prompt for s in steps], [s.image for s in steps])["input_ids"]
    size = PromptSize(prompts.shape[1], (shape.side // PATCH) ** 2)
    plan = PlannedModel(config, make_config(shape, inputs.tokenizer)).learner(size)
    return {
        "peak_gib": plan.peak / GIB,
        "weights_gib": plan.weights / GIB,
        "activations_gib": plan.activations / GIB,
        "logits_gib": plan.logits / GIB,
        "training_gib": (plan.adapter + plan.gradients + plan.optimiser) / GIB,
    }


def _score_difference(learner: Learner, batch: list[Trajectory], inputs: PolicyInputs) -> float:
    """Returns how far the learner's log-probabilities are from those of passes of one response each, nats, at most."""
    compared = batch[:2]
    scored = [tokens for trajectory in learner.score(compared) for tokens in trajectory]
    largest = 0.0
    for step, found in zip(steps_of(compared), scored, strict=True):
        (one,) = _plain_batches(inputs, [step], 0, learner.device)
        labels = one.pop("labels")[0]
        with torch.no_grad():
            logits = learner.policy(**one, use_cache=False).logits[0]
        places = (labels != -100).nonzero().flatten()
        exact = log_probs_of(logits[places - 1], labels[places]).cpu()
        largest = max(largest, float((exact - torch.tensor(found)).abs().max()))
    return largest


def measure_plain(
    model: Any,
    config: RunConfig,
    inputs: PolicyInputs,
    steps: list[ScoredStep],
    work: Workload,
    clock: Clock,
    rate: float,
) -> dict[str, Any]:
    """Returns the same of a loop as transformers and PEFT make it: all logits, no prompt shared, the library's loss."""
    targets = lora_target_names(model, config.policy.lora_targets)
    policy = get_peft_model(model, LoraConfig(r=config.policy.lora_rank, target_modules=targets, lora_alpha=32))
    try:
        policy.eval()
        parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        batches = _plain_batches(inputs, steps, config.learner.token_budget, clock.device)
        losses: list[float] = []

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            losses.append(0.0)
            for batch in batches:
                loss = policy(**batch, use_cache=False).loss / len(batches)
                loss.backward()
                losses[-1] += float(loss.detach())
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

        seconds = clock.seconds(step)
        peak = clock.peak_gib(step)
    finally:
        policy.unload()
    return {**work.figures(seconds, rate), "micro_batches": len(batches), "peak_gib": peak, "loss": losses[-1]}


def _plain_batches(
    inputs: PolicyInputs, steps: list[ScoredStep], budget: int, device: torch.device
) -> list[dict[str, Tensor]]:
    """Returns prompts with their responses, right-padded and labelled, as many at a time as the budget takes."""
    most = max(len(step.response_ids) for step in steps)
    longest = inputs.encode([s.prompt for s in steps], [s.image for s in steps])["input_ids"].shape[1] + most
    rows = max(1, budget // longest)
    batches = []
    for start in range(0, len(steps), rows):
        part = steps[start : start + rows]
        batch = dict(inputs.encode([s.prompt for s in part], [s.image for s in part]))
        responses = torch.full((len(part), most), inputs.tokenizer.pad_token_id)
        labels = torch.full((len(part), most), -100)
        for row, step in enumerate(part):
            responses[row, : len(step.response_ids)] = torch.tensor(step.response_ids)
            labels[row, : len(step.response_ids)] = torch.tensor(step.response_ids)
        ignored = torch.full_like(batch["input_ids"], -100)
        batch["input_ids"] = torch.cat([batch["input_ids"], responses], dim=1)
        batch["labels"] = torch.cat([ignored, labels], dim=1)
        batch["attention_mask"] = torch.cat([batch["attention_mask"], (labels != -100).long()], dim=1)
        batch["mm_token_type_ids"] = torch.cat([batch["mm_token_type_ids"], torch.zeros_like(labels)], dim=1)
        batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
        batches.append({name: tensor.to(device) for name, tensor in batch.items()})
    return batches
