"""Findings about a model's network, built from its configuration without its weights."""

from transformers import AutoConfig

from gflowvlm.evaluation.memory_plan import MemoryPlan, gib
from gflowvlm.learner.model import adapter_parameters, empty_policy, require_fewer_bits
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError, one_line
from gflowvlm.shared.findings import Check, Status, found_and_advice
from gflowvlm.shared.precision import FewerBits

MEMORY = "memory"
"""Name of what is found about a run's memory."""


def check_architecture(model: str) -> Check:
    """Looks whether transformers knows the model's class as one that answers to pictures and text."""
    name = "architecture"
    try:
        config = AutoConfig.from_pretrained(model)
    except (ImportError, OSError, ValueError) as error:
        return Check(
            name, Status.BROKEN, f"its config.json cannot be read: {one_line(error)}", "give a whole model folder"
        )
    classes = ", ".join(config.architectures or []) or type(config).__name__
    return Check(name, Status.OK, classes)


def check_targets(config: RunConfig, model: str) -> Check:
    """Looks for the layers that get an adapter."""
    name = "LoRA targets"
    try:
        policy = empty_policy(config.policy, model)
    except UserError as error:
        return Check(name, Status.BROKEN, *found_and_advice(error))
    trained = adapter_parameters(policy)
    layers = {full.rpartition(".lora_")[0] for full, _ in trained}
    kinds = sorted({layer.rpartition(".")[2] for layer in layers})
    size = sum(parameter.numel() for _, parameter in trained)
    return Check(name, Status.OK, f"{len(layers)} layers ({', '.join(kinds)}), {size / 1e6:.2f} M parameters")


def check_fewer_bits(load_in: FewerBits, *, here: bool) -> Check:
    """Looks whether a learner can load its model in fewer bits.

    Args:
        load_in: How many.
        here: Whether the learner will be on this machine.
    """
    name = "fewer bits"
    try:
        require_fewer_bits(load_in)
    except UserError as error:
        return Check(name, Status.BROKEN if here else Status.NOTE, *found_and_advice(error))
    return Check(name, Status.OK, f"{load_in}, by bitsandbytes")


def check_memory(plan: MemoryPlan, otherwise: Status) -> Check:
    """Judges whether a run fits by its memory plan.

    Args:
        plan: The plan.
        otherwise: What it is called where it does not fit.
    """
    if plan.problems:
        return Check(MEMORY, otherwise, *found_and_advice(plan.problems[0]))
    parts = [
        f"{device.name} {gib(device.needed)}" + ("" if device.available is None else f" of {gib(device.available)}")
        for device in plan.devices
    ]
    unknown = any(device.available is None for device in plan.devices)
    advice = "give --gpu-memory GIB to see whether it fits" if unknown else ""
    return Check(MEMORY, Status.OK, f"{', '.join(parts)} GiB", advice)
