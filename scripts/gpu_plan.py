"""Writes the table of `docs/gpu.md`: which model fits which GPU, and how, by the memory plan.

``PYTHONPATH=scripts:. python -m gpu_plan`` rewrites the table; ``--check`` only says whether it is up to date. The
models are built from their published sizes, without weights and without a hub.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Gemma3Config, LlavaNextConfig, PreTrainedConfig, Qwen2_5_VLConfig

from gflowvlm.evaluation.memory_plan import CACHE, GIB, LEARNER, SAMPLER, DevicePlan, Memory, gib, memory_plan
from gflowvlm.learner.memory import PromptSize
from gflowvlm.run.preset_library import load_preset
from gflowvlm.shared.config import RunConfig

PAGE = Path(__file__).resolve().parent.parent / "docs/gpu.md"
BEGIN, END = "<!-- made by scripts/gpu_plan.py -->\n", "<!-- end -->\n"

TEXT_TOKENS = 300
"""Tokens of NumberLine's longest prompt in a vocabulary of a real model, its picture aside."""

SHOWN_AS = {24: 22.4, 48: 44.4, 80: 79.1}
"""Memory that GPUs sold with so many GB have at least, GiB: A10 and L4, A6000 and L40S, A100 and H100."""


@dataclass(frozen=True)
class Sized:
    """A model by its published sizes.

    Attributes:
        config: Its configuration.
        image_tokens: Tokens of a picture of 336 x 336 pixels.
        patches: Pieces that its vision tower cuts it into.
    """

    config: PreTrainedConfig
    image_tokens: int
    patches: int

    @property
    def prompt(self) -> PromptSize:
        """The longest prompt that is planned for."""
        return PromptSize(TEXT_TOKENS + self.image_tokens, self.patches)


def qwen2_5_vl(hidden: int, layers: int, heads: int, kept: int, inside: int, vocabulary: int, tied: bool) -> Sized:
    """Returns a Qwen2.5-VL."""
    text: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kept,
        "intermediate_size": inside,
        "vocab_size": vocabulary,
        "max_position_embeddings": 128_000,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {"hidden_size": 1280, "depth": 32, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": hidden}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    return Sized(config, image_tokens=144, patches=576)


def llava_next_mistral() -> Sized:
    """Returns LLaVA-1.6 on Mistral-7B; a picture is shown whole and in four parts."""
    text = {
        "model_type": "mistral",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14_336,
        "vocab_size": 32_064,
        "max_position_embeddings": 32_768,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "image_size": 336,
        "patch_size": 14,
    }
    return Sized(LlavaNextConfig(text_config=text, vision_config=vision), image_tokens=1176, patches=5 * 576)


def gemma3_4b() -> Sized:
    """Returns Gemma 3 4B; every picture is 256 tokens of 896 x 896 pixels."""
    text = {
        "hidden_size": 2560,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "intermediate_size": 10_240,
        "vocab_size": 262_208,
    }
    vision = {
        "hidden_size": 1152,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "intermediate_size": 4304,
        "image_size": 896,
        "patch_size": 14,
    }
    return Sized(Gemma3Config(text_config=text, vision_config=vision), image_tokens=256, patches=4096)


MODELS = {
    "Qwen2.5-VL-3B": qwen2_5_vl(2048, 36, 16, 2, 11_008, 151_936, tied=True),
    "Qwen2.5-VL-7B": qwen2_5_vl(3584, 28, 28, 4, 18_944, 152_064, tied=False),
    "LLaVA-1.6-Mistral-7B": llava_next_mistral(),
    "Gemma 3 4B": gemma3_4b(),
}

PRESETS = {
    "qwen2.5-vl-3b-24gb": ("Qwen2.5-VL-3B", 24),
    "qwen2.5-vl-7b-24gb": ("Qwen2.5-VL-7B", 24),
    "qwen2.5-vl-3b-80gb": ("Qwen2.5-VL-3B", 80),
    "qwen2.5-vl-7b-80gb": ("Qwen2.5-VL-7B", 80),
}
"""The presets of one GPU, with the models and the GPUs that they are for."""


def preset_plan(preset: str) -> DevicePlan:
    """Returns the plan of the GPU that a preset is for."""
    model, size = PRESETS[preset]
    return device_plan(load_preset(preset), MODELS[model], size)


def device_plan(config: RunConfig, model: Sized, size: int) -> DevicePlan:
    """Returns the plan of the GPU that sampler and learner share.

    Args:
        config: The run's configuration.
        model: Its model.
        size: What the GPU is sold as, GB.
    """
    memory = Memory(gpu=int(SHOWN_AS[size] * GIB))
    return memory_plan(config, model.config, model.prompt, memory).devices[0]


def tried(preset: str) -> Iterator[tuple[str, RunConfig]]:
    """Yields ways to share a GPU, from a preset: what they are called, and their configurations."""
    chosen = load_preset(preset)
    sampler, learner = chosen.sampler, chosen.learner
    for name, share, sleeps, offload in (
        ("side by side", 0.5, 0, False),
        ("by turns", 0.55, 1, False),
        ("by turns, `learner.offload`", 0.9, 1, True),
    ):
        yield (
            name,
            chosen.model_copy(
                update={
                    "sampler": sampler.model_copy(update={"sleep_level": sleeps, "gpu_memory_utilization": share}),
                    "learner": learner.model_copy(update={"offload": offload, "token_budget": 4096}),
                    "policy": chosen.policy.model_copy(update={"max_response_tokens": 128}),
                }
            ),
        )


def rows() -> Iterator[list[str]]:
    """Yields the table's rows."""
    for preset, (model, size) in PRESETS.items():
        yield [model, f"{size} GB", f"preset `{preset}`", *_figures(preset_plan(preset))]
    for model in MODELS:
        for size in SHOWN_AS:
            yield [model, f"{size} GB", *_first_that_fits(MODELS[model], size)]


def _first_that_fits(model: Sized, size: int) -> list[str]:
    """Returns the cells of the simplest way in which a model fits a GPU; of the last one where none does."""
    cells: list[str] = []
    for name, config in tried("qwen2.5-vl-3b-24gb"):
        longer = config.sampler.model_copy(update={"max_model_len": 2048})
        plan = device_plan(config.model_copy(update={"sampler": longer}), model, size)
        cells = [name, *_figures(plan)]
        if not plan.problems:
            break
    return cells


def table() -> str:
    """Returns the table."""
    head = ["model", "GPU", "how", "the learner's step", "vLLM, of that KV cache", "most at once", "fits"]
    lines = [head, ["---"] * len(head), *rows()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _figures(plan: DevicePlan) -> list[str]:
    parts = [part for phase in plan.phases for part in phase.parts]
    step = sum(part.bytes for part in parts if part.process == LEARNER and part.purpose != "waiting")
    vllm = sum(part.bytes for part in parts if part.process == SAMPLER and part.purpose != "asleep")
    cache = sum(part.bytes for part in parts if part.purpose == CACHE)
    fits = "no" if plan.problems else "yes"
    return [gib(step), f"{gib(vllm)}, {gib(cache)}", f"{gib(plan.needed)} of {gib(plan.available or 0)}", fits]


def main() -> int:
    """Writes the table into the page, or compares it with what stands there."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--check", action="store_true", help="only compare")
    only_compare = options.parse_args().check
    text = PAGE.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        print(f"{PAGE}: has no place for the table", file=sys.stderr)
        return 2
    made = before + BEGIN + table() + END + after
    if only_compare:
        return int(made != text)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
