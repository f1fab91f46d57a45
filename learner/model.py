"""The policy as the learner holds it: a frozen vision-language model with a trainable LoRA adapter."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from gflowvlm.shared.config import PolicySettings
from gflowvlm.shared.errors import UserError, one_line
from gflowvlm.shared.hub import require_at_hub
from gflowvlm.shared.lora_layers import lora_target_names
from gflowvlm.shared.policy_inputs import directory_or_hub_name
from gflowvlm.shared.precision import FewerBits

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_policy(settings: PolicySettings, model_path: str, *, seed: int, device: torch.device) -> Any:
    """Loads the base model and puts a fresh LoRA adapter on its language model.

    The base model is frozen, in `settings.dtype` or the fewer bits of `settings.load_in`; the adapter's weights are
    in float32, and compute in `settings.dtype` as the sampler's do (`MasterLinear`). Its initialisation depends on
    `seed` only (B = 0: the policy starts as the base model). Nothing in it is random afterwards: there is no
    dropout anywhere, with gradient checkpointing neither.

    Args:
        settings: Precision, adapter and checkpointing.
        model_path: Model directory or hub name.
        seed: Seed of the adapter's initialisation.
        device: Where the model shall live.

    Returns:
        The PEFT model.

    Raises:
        UserError: No such model, weights that cannot be loaded (in these bits), or LoRA targets outside the language
            model.
    """
    if settings.load_in is not None:
        return adapted(load_quantized_model(model_path, settings.dtype, settings.load_in, device), settings, seed)
    return adapted(load_base_model(model_path, settings.dtype), settings, seed).to(device)


def empty_policy(settings: PolicySettings, model: str | PreTrainedConfig) -> Any:
    """Returns what `load_policy` does on the meta device: all names, shapes and precisions, and no numbers.

    Args:
        settings: Precision, adapter and checkpointing.
        model: Model directory or hub name, or a model's configuration.

    Raises:
        UserError: No such model, or LoRA targets outside the language model.
    """
    name = model if isinstance(model, str) else type(model).__name__
    if isinstance(model, str):
        require_at_hub(directory_or_hub_name(model))
    try:
        config = AutoConfig.from_pretrained(model) if isinstance(model, str) else model
        with torch.device("meta"):
            empty = AutoModelForImageTextToText.from_config(config, dtype=DTYPES[settings.dtype])
    except (ImportError, OSError, ValueError) as error:
        raise UserError(f"model {name!r}: cannot be built ({one_line(error)})") from None
    return adapted(empty, settings, seed=0)


def adapted(
    model: Any, settings: PolicySettings, seed: int, trained_rows: Mapping[str, Sequence[int]] | None = None
) -> Any:
    """Returns a base model with a fresh adapter on its language model, in evaluation mode; see `load_policy`.

    Args:
        model: The base model.
        settings: Precision, adapter and checkpointing.
        seed: Seed of the adapter's initialisation.
        trained_rows: Rows of embeddings and output layers that are trained too, by the layer's name.
    """
    targets = lora_target_names(model, settings.lora_targets)
    lora = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=targets,
        trainable_token_indices={name: list(rows) for name, rows in trained_rows.items()} if trained_rows else None,
    )
    # The fork keeps the caller's random state; on the CPU, so that the adapter is the same on every device.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = get_peft_model(model, lora)
    if DTYPES[settings.dtype] != torch.float32:
        _compute_in_input_precision(policy)
    policy.eval()
    if settings.gradient_checkpointing:
        _enable_checkpointing(policy)
    return policy


def load_base_model(model_path: str, dtype: str) -> Any:
    """Loads a vision-language model's weights (safetensors only) onto the CPU.

    Raises:
        UserError: No such model, or its weights cannot be loaded.
    """
    path = directory_or_hub_name(model_path)
    # A bar for reading a local file would stand in the middle of our own; downloads keep theirs.
    transformers_logging.disable_progress_bar()
    try:
        return AutoModelForImageTextToText.from_pretrained(path, dtype=DTYPES[dtype], use_safetensors=True)
    except (ImportError, OSError, ValueError, SafetensorError) as error:
        raise UserError(f"model {model_path!r}: its weights cannot be loaded ({one_line(error)})") from None


def require_fewer_bits(load_in: FewerBits) -> None:
    """Makes sure that a model can be loaded in fewer bits.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"policy.load_in = {load_in}: needs bitsandbytes, which is not installed; `pip install bitsandbytes`"
        )


def load_quantized_model(model_path: str, dtype: str, load_in: FewerBits, device: torch.device) -> Any:
    """Loads a model whose linear layers, the output head aside, keep their weights in fewer bits (bitsandbytes).

    Args:
        model_path: Model directory or hub name.
        dtype: What they compute in, and what all else is in.
        load_in: ``8bit``, or ``4bit`` (NF4, its constants quantised again).
        device: Where the model shall live; it cannot be moved.

    Raises:
        UserError: bitsandbytes is not installed or does not work here, no such model, or its weights cannot be loaded.
    """
    path = directory_or_hub_name(model_path)
    require_fewer_bits(load_in)
    transformers_logging.disable_progress_bar()
    # In 8 bits it says at every product that it computes in float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    precision = DTYPES[dtype]
    quantization = BitsAndBytesConfig(
        load_in_8bit=load_in == "8bit",
        load_in_4bit=load_in == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=precision,
        bnb_4bit_use_double_quant=True,
    )
    try:
        return AutoModelForImageTextToText.from_pretrained(
            path, dtype=precision, use_safetensors=True, quantization_config=quantization, device_map={"": device}
        )
    except (ImportError, OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model {model_path!r}: cannot be loaded in {load_in} ({one_line(error)})") from None


class MasterLinear(nn.Linear):
    """A linear layer that computes in its input's precision from weights in float32, which an optimiser changes.

    In bfloat16 alone, updates below 1/256 of a weight would be rounded away; in float32 alone, it would compute other
    numbers than the sampler, and slower.
    """

    @classmethod
    def of(cls, linear: nn.Linear) -> MasterLinear:
        """Returns a layer with the weights of another, which it shares."""
        made = nn.utils.skip_init(cls, linear.in_features, linear.out_features, bias=False, device="meta")
        made.weight = linear.weight
        return made

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns the product with the weights as the input's precision has them."""
        return nn.functional.linear(input, self.weight.to(input.dtype))


def _compute_in_input_precision(policy: Any) -> None:
    """Makes the adapter's layers compute in the model's precision, with their weights in float32."""
    for layer in policy.modules():
        if isinstance(layer, LoraLayer):
            # Else PEFT would bring the input to the weights' precision.
            layer.cast_input_dtype_enabled = False
            for part in (layer.lora_A, layer.lora_B):
                for name, linear in part.items():
                    part[name] = MasterLinear.of(linear)


def load_adapted(model_path: str, dtype: str, adapter: Path | None, device: torch.device = CPU) -> Any:
    """Loads a policy to score with, not to train: the base model, with a published adapter unless None.

    Args:
        model_path: Model directory or hub name.
        dtype: ``float32`` or ``bfloat16``.
        adapter: The adapter's folder.
        device: Where it shall compute.

    Raises:
        UserError: No such model, or weights or an adapter that cannot be loaded.
    """
    model = load_base_model(model_path, dtype)
    if adapter is not None:
        try:
            model = PeftModel.from_pretrained(model, str(adapter))
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{adapter}: the adapter cannot be loaded ({one_line(error)})") from None
    return model.eval().to(device)


@contextmanager
def reference_policy(policy: Any) -> Iterator[Any]:
    """Yields the policy with its adapter switched off: P_ref. No gradients inside."""
    with torch.no_grad(), policy.disable_adapter():
        yield policy


def adapter_parameters(policy: Any) -> list[tuple[str, nn.Parameter]]:
    """Returns the trainable parameters by name, in one fixed order."""
    return [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]


def _enable_checkpointing(policy: Any) -> None:
    policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # Transformers checkpoints a layer only in training mode. Flag the layers alone, not what is inside them,
    # so that dropout stays off and the learner scores what the sampler played.
    for module in policy.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
