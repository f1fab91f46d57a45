"""A tiny random policy, adapters that change what it says, and requests for it."""

import io
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText

from gflowvlm.actors.sampling import SampleRequest
from gflowvlm.learner.tiny_policy import build_tiny_policy
from gflowvlm.shared.config import RunConfig, SamplerSettings

LANGUAGE_LAYERS = r".*text_model.*\.(q_proj|v_proj|o_proj|gate_proj|down_proj)"


def write_policy(folder: Path, adapters: int) -> Path:
    """Writes ``model`` and ``adapter-1`` ... into a folder; returns it."""
    model = build_tiny_policy(folder / "model", seed=0)
    for number in range(1, adapters + 1):
        write_adapter(model, folder / f"adapter-{number}", seed=number)
    return folder


def write_adapter(model: Path, folder: Path, seed: int, targets: str = LANGUAGE_LAYERS, scale: float = 0.1) -> Path:
    """Writes an adapter with random weights, by default large enough to change greedy answers."""
    base = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_B" in name:
                    weight.normal_(0.0, scale)
    adapted.save_pretrained(folder)
    return folder


def picture(seed: int) -> bytes:
    """Returns a random picture as PNG."""
    pixels = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def request(number: int = 0, temperature: float = 1.0, version: int | None = None, **changes: int) -> SampleRequest:
    """Returns one of many requests, with prompts of different lengths."""
    prompt = "Target: 5\nState 0: picture" + "\nState 1: 2 Action 1: +" * (number % 3)
    settings = {"max_tokens": 24, **changes}
    return SampleRequest(prompt, picture(number % 4), temperature=temperature, version=version, **settings)


def config(engine: str = "transformers", **sampler: object) -> RunConfig:
    """Returns a configuration with small caches."""
    settings = {"engine": engine, "kv_cache_gib": 0.03, "max_num_seqs": 32, **sampler}
    return RunConfig(sampler=SamplerSettings.model_validate(settings))
