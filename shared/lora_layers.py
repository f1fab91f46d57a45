"""Which layers of a vision-language model get an adapter."""

from collections.abc import Sequence
from typing import Any

from gflowvlm.shared.errors import UserError

ALL_LINEAR = "all-linear"
"""Stands for every linear layer of the language model."""


def lora_target_names(model: Any, targets: Sequence[str]) -> list[str]:
    """Returns the full names of the language model's linear layers that `targets` name.

    Vision towers often use the same layer names (``q_proj``); theirs are left alone, since vLLM silently
    ignores an adapter there and the sampler would play another policy than the one that is trained.

    Args:
        model: A transformers vision-language model.
        targets: Layer names, or dotted endings of full names; `ALL_LINEAR` is all of them, fused ones included.

    Raises:
        UserError: A target names no linear layer of the language model.
    """
    decoder = model.get_decoder()
    if decoder is model or decoder is model.base_model:
        raise UserError(f"policy.lora_targets: the language model inside {type(model).__name__} cannot be told apart")
    # Linear layers of every kind, quantised ones too, say how many features they take and give.
    linears = [name for name, module in model.named_modules() if _is_linear(module)]
    text_modules = set(decoder.modules())
    in_text = [name for name in linears if model.get_submodule(name) in text_modules]
    found: set[str] = set()
    for target in targets:
        matching = in_text if target == ALL_LINEAR else [name for name in in_text if _ends_in(name, target)]
        if not matching:
            available = ", ".join([*sorted({name.rsplit(".", 1)[-1] for name in in_text}), ALL_LINEAR])
            elsewhere = any(_ends_in(name, target) for name in linears)
            problem = (
                "is outside the language model; the sampler (vLLM) would ignore an adapter there"
                if elsewhere
                else "names no linear layer"
            )
            raise UserError(f"policy.lora_targets: {target!r} {problem}; choose from {available}")
        found.update(matching)
    return sorted(found)


def _is_linear(module: Any) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)
