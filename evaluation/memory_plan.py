"""The memory plan: what a run holds on each device, from the model's configuration alone.

No weights are read and nothing is started. Micro-batches are taken to be full of the task's longest prompts and
responses, so that a plan is rather too large than too small.
"""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from gflowvlm.actors.sampler_memory import CUDA_CONTEXT, SamplerMemory, sampler_memory
from gflowvlm.learner.memory import LearnerMemory, PlannedModel, PromptSize
from gflowvlm.shared.config import RunConfig

GIB = 2**30

PROCESSES = {"learner": 0.5, "sampler": 1.3, "rollout workers": 0.45, "driver and Ray": 1.8}
"""Main memory of each process before it has a model, GiB; measured on this project's set-up for CPUs."""

ASLEEP = int(0.5 * GIB)
"""What vLLM keeps of a GPU while it sleeps, beside its CUDA context and graphs; assumed."""

LEARNER, SAMPLER = "learner", "sampler"
CACHE = "KV cache"
STEPS, PLAYS = "the learner steps", "the sampler plays"
"""The two phases of a GPU that is shared by turns."""


@dataclass(frozen=True)
class PlannedPart:
    """What one process holds of a device for one purpose.

    Attributes:
        process: Which process.
        purpose: What for.
        bytes: How much.
    """

    process: str
    purpose: str
    bytes: int


@dataclass(frozen=True)
class Phase:
    """What is held at one time.

    Attributes:
        name: When; empty where all is held at once.
        parts: What.
    """

    name: str
    parts: tuple[PlannedPart, ...]

    @property
    def needed(self) -> int:
        """Bytes in all."""
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True)
class DevicePlan:
    """What a run holds on one device, or on each of several that are alike.

    Attributes:
        name: The device.
        phases: What is held there at the peak: one, or two where sampler and learner take turns.
        available: Bytes that there are; None where it is not known.
        problems: Why it does not fit and what to do, a line each; empty where it fits or nothing is known.
        remarks: What else there is to say of it, a line each.
    """

    name: str
    phases: tuple[Phase, ...]
    available: int | None
    problems: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def needed(self) -> int:
        """Bytes of the phase that holds most."""
        return max(phase.needed for phase in self.phases)


@dataclass(frozen=True)
class MemoryPlan:
    """The plan of a run.

    Attributes:
        devices: Its devices.
        parameters: Parameters of the base model.
        adapter_parameters: Parameters of its adapter.
    """

    devices: tuple[DevicePlan, ...]
    parameters: int
    adapter_parameters: int

    @property
    def problems(self) -> list[str]:
        """Why it does not fit, a line each."""
        return [f"{device.name} {problem}" for device in self.devices for problem in device.problems]

    def as_json(self) -> dict[str, Any]:
        """Returns the plan as plain values, amounts in GiB."""
        return {
            "parameters": self.parameters,
            "adapter_parameters": self.adapter_parameters,
            "devices": [
                {
                    "name": device.name,
                    "needed_gib": round(device.needed / GIB, 3),
                    "available_gib": None if device.available is None else round(device.available / GIB, 3),
                    "parts": [
                        {
                            "phase": phase.name,
                            "process": part.process,
                            "purpose": part.purpose,
                            "gib": round(part.bytes / GIB, 3),
                        }
                        for phase in device.phases
                        for part in phase.parts
                    ],
                    "problems": list(device.problems),
                    "remarks": list(device.remarks),
                }
                for device in self.devices
            ],
        }


@dataclass(frozen=True)
class Memory:
    """What memory there is, bytes; None where it is not known.

    Attributes:
        gpu: Of each GPU.
        main: Of the machine that the whole run is on.
    """

    gpu: int | None = None
    main: int | None = None


def memory_plan(config: RunConfig, model: str | PreTrainedConfig, prompt: PromptSize, memory: Memory) -> MemoryPlan:
    """Returns what a run holds on each device.

    Args:
        config: The run's configuration.
        model: Model directory or hub name, or a model's configuration.
        prompt: The task's longest prompt.
        memory: What there is.

    Raises:
        UserError: The model cannot be built, or its passes not be traced.
    """
    planned = PlannedModel(config, model)
    learner = planned.learner(prompt)
    gpu = memory.gpu if config.sampler.gpus_per_replica > 0 else None
    sampler = sampler_memory(config, planned.sizes, prompt.patches, gpu)
    both = _Both(config, learner, sampler, planned.sizes.cache_bytes_per_token, memory)
    return MemoryPlan(both.devices(), planned.sizes.parameters, planned.sizes.adapter_parameters)


@dataclass(frozen=True)
class _Both:
    config: RunConfig
    learner: LearnerMemory
    sampler: SamplerMemory
    per_token: int
    memory: Memory

    def devices(self) -> tuple[DevicePlan, ...]:
        sampler, learner = self.config.sampler.gpus_per_replica > 0, self.config.learner.gpus_per_worker > 0
        found = []
        if sampler and learner and self.share_a_gpu:
            found.append(self._shared())
        else:
            if sampler:
                found.append(self._sampler_alone())
            if learner:
                found.append(self._learner_alone())
        if self.config.cluster.address is None:
            found.append(self._main_memory(sampler, learner))
        return tuple(found)

    @property
    def share_a_gpu(self) -> bool:
        """Whether one sampler and one learner ask for parts of a GPU that make up no more than one."""
        sampler, learner = self.config.sampler, self.config.learner
        alone = sampler.replicas == sampler.tensor_parallel_size == learner.workers == 1
        return alone and sampler.gpus_per_replica + learner.gpus_per_worker <= 1

    def _shared(self) -> DevicePlan:
        name, learner, sampler = "the GPU of sampler and learner", self._learner_parts(), self._sampler_parts()
        if self.config.sampler.sleep_level == 0:
            return self._device(name, [Phase("", (*learner, *sampler))])
        stays = 0 if self.config.learner.offload else self.learner.resident
        asleep = PlannedPart(SAMPLER, "asleep", CUDA_CONTEXT + ASLEEP + self.sampler.graphs)
        waiting = PlannedPart(LEARNER, "waiting", CUDA_CONTEXT + stays)
        phases = [Phase(STEPS, (*learner, asleep)), Phase(PLAYS, (*sampler, waiting))]
        return self._device(name, phases)

    def _sampler_alone(self) -> DevicePlan:
        sampler = self.config.sampler
        count = sampler.replicas * sampler.tensor_parallel_size
        return self._device(_each("sampler's GPU", count), [Phase("", self._sampler_parts())])

    def _learner_alone(self) -> DevicePlan:
        return self._device(_each("learner's GPU", self.config.learner.workers), [Phase("", self._learner_parts())])

    def _device(self, name: str, phases: list[Phase]) -> DevicePlan:
        available, fullest = self.memory.gpu, max(phases, key=lambda phase: phase.needed)
        plays = any(part.process == SAMPLER for phase in phases for part in phase.parts)
        problems = self._cache_problems() if plays else []
        if available is not None and fullest.needed > available and not problems:
            when = f" while {fullest.name}" if fullest.name else ""
            advice = self._advice(fullest, available)
            problems = [f"needs {gib(fullest.needed)} of {gib(available)} GiB{when}; {advice}"]
        return DevicePlan(name, tuple(phases), available, tuple(problems), self._cache_remarks() if plays else ())

    def _advice(self, phase: Phase, available: int) -> str:
        """Returns what makes the phase fit, as far as one can tell."""
        config, excess = self.config, phase.needed - available
        if config.policy.dtype == "float32":
            return "set policy.dtype=bfloat16"
        cache = sum(part.bytes for part in phase.parts if part.purpose == CACHE)
        # Of vLLM's own share only the cache can be given up, down to one response.
        least = config.sampler.max_model_len * self.per_token
        if cache - excess > least and config.sampler.engine == "vllm":
            share = config.sampler.gpu_memory_utilization - excess / available
            return f"set sampler.gpu_memory_utilization={max(0.01, share - 0.005):.2f}"
        shared = {part.process for part in phase.parts} == {LEARNER, SAMPLER}
        if shared and config.sampler.sleep_level == 0:
            return "let the sampler sleep while the learner steps: set sampler.sleep_level=1"
        if phase.name == PLAYS and not config.learner.offload:
            return "set learner.offload=true"
        if not config.policy.gradient_checkpointing:
            return "set policy.gradient_checkpointing=true, or a smaller learner.token_budget"
        if self.learner.activations - excess > self.learner.activations // 8:
            return "set a smaller learner.token_budget"
        if config.policy.load_in is None:
            return "set policy.load_in=4bit, or use a larger GPU or a smaller model"
        return "use a larger GPU, or learner.sharding=fsdp on several, or a smaller model"

    def _cache_problems(self) -> list[str]:
        sampler, least = self.config.sampler, self.config.sampler.max_model_len
        if self.memory.gpu is None or sampler.engine != "vllm" or self.sampler.cache_tokens >= least:
            return []
        share = int(sampler.gpu_memory_utilization * self.memory.gpu)
        taken = self.sampler.total - self.sampler.cache + CUDA_CONTEXT
        needed = taken + least * self.per_token // sampler.tensor_parallel_size
        advice = "set policy.dtype=bfloat16"
        if self.config.policy.dtype != "float32":
            advice = f"set sampler.gpu_memory_utilization={needed / self.memory.gpu + 0.01:.2f}"
            if needed > 0.98 * self.memory.gpu:
                advice = "use a larger GPU, a larger sampler.tensor_parallel_size, or a smaller model"
        return [
            f"vLLM's share is {gib(share)} GiB (sampler.gpu_memory_utilization = {sampler.gpu_memory_utilization:g}), "
            f"and it needs {gib(needed)} with the keys and values of one response of sampler.max_model_len = {least}; "
            f"{advice}"
        ]

    def _cache_remarks(self) -> tuple[str, ...]:
        sampler = self.config.sampler
        if self.memory.gpu is None or sampler.engine != "vllm":
            return ()
        at_once = self.sampler.cache_tokens // sampler.max_model_len
        if self._cache_problems() or at_once >= sampler.max_num_seqs:
            return ()
        return (
            f"the KV cache holds {at_once} responses of sampler.max_model_len at once, fewer than "
            f"sampler.max_num_seqs = {sampler.max_num_seqs}: others wait",
        )

    def _learner_parts(self) -> tuple[PlannedPart, ...]:
        learner = self.learner
        return (
            PlannedPart(LEARNER, "weights", learner.weights),
            PlannedPart(LEARNER, "adapter", learner.adapter),
            PlannedPart(LEARNER, "gradients", learner.gradients),
            PlannedPart(LEARNER, "optimiser", learner.optimiser),
            PlannedPart(LEARNER, "activations", learner.activations),
            PlannedPart(LEARNER, "logits", learner.logits),
            PlannedPart(LEARNER, "CUDA", CUDA_CONTEXT),
        )

    def _sampler_parts(self) -> tuple[PlannedPart, ...]:
        sampler = self.sampler
        return (
            PlannedPart(SAMPLER, "weights", sampler.weights),
            PlannedPart(SAMPLER, "adapters", sampler.adapters),
            PlannedPart(SAMPLER, "passes", sampler.passes + sampler.graphs),
            PlannedPart(SAMPLER, CACHE, sampler.cache),
            PlannedPart(SAMPLER, "CUDA", CUDA_CONTEXT),
        )

    def _main_memory(self, sampler_on_gpu: bool, learner_on_gpu: bool) -> DevicePlan:
        config = self.config
        parts = []
        for process, on_gpu, count, own in (
            (LEARNER, learner_on_gpu, config.learner.workers, self._learner_parts()),
            (SAMPLER, sampler_on_gpu, config.sampler.replicas, self._sampler_parts()),
        ):
            if not on_gpu:
                parts += [PlannedPart(process, p.purpose, count * p.bytes) for p in own if p.purpose != "CUDA"]
            parts.append(PlannedPart(process, "process", count * int(PROCESSES[process] * GIB)))
        if config.sampler.sleep_level == 1 and sampler_on_gpu:
            parts.append(PlannedPart(SAMPLER, "weights while it sleeps", self.sampler.weights + self.sampler.adapters))
        if config.learner.offload:
            parts.append(PlannedPart(LEARNER, "weights while it waits", self.learner.resident))
        workers = int(config.rollout.workers * PROCESSES["rollout workers"] * GIB)
        parts.append(PlannedPart("rollout workers", "processes", workers))
        store = config.cluster.object_store_mib * 2**20
        parts.append(PlannedPart("driver and Ray", "processes", int(PROCESSES["driver and Ray"] * GIB) + store))
        phase, available = Phase("", tuple(parts)), self.memory.main
        problems = []
        if available is not None and phase.needed > available:
            advice = "set a smaller learner.token_budget or model, or policy.gradient_checkpointing=true"
            problems.append(f"needs {gib(phase.needed)} of {gib(available)} GiB; {advice}")
        return DevicePlan("main memory", (phase,), available, tuple(problems))


def gib(size: int) -> str:
    """Returns bytes as GiB, with as many digits as say something."""
    amount = size / GIB
    return f"{amount:.1f}" if amount >= 1 else f"{amount:.2f}"


def _each(name: str, count: int) -> str:
    return f"the {name}" if count == 1 else f"each of {count} {name}s"
