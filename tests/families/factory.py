"""Tiny random instances of real vision-language model classes: real processors, tokenizers of the families' kinds.

`build_family` writes one as a model folder that loads like one of a hub. Run as a program it writes them all::

    python -m tests.families.factory OUT [FAMILY ...]
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, GenerationConfig

from tests.families import gemma, llava, others, qwen, smolvlm
from tests.families.family import Family
from tests.families.tokenizer_kinds import build_tokenizer

FAMILIES: dict[str, Family] = {
    **smolvlm.FAMILIES,
    **llava.FAMILIES,
    **qwen.FAMILIES,
    **gemma.FAMILIES,
    **others.FAMILIES,
}
"""The families of the matrix by their short names."""


def build_family(name: str, directory: Path | str, seed: int = 0) -> Path:
    """Writes a tiny random instance of a family.

    Args:
        name: A key of `FAMILIES`.
        directory: Where to write; made when it does not exist.
        seed: Seed of the weights.

    Returns:
        The directory, which holds safetensors and JSON files only.
    """
    family = FAMILIES[name]
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(family.kind, family.special)
    processor = family.processor(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(family.config(tokenizer), dtype=torch.float32)
        _make_lively(model)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=[tokenizer.convert_tokens_to_ids(end) for end in family.ends],
        **family.generation,
    )
    model.save_pretrained(folder)
    _rename_vision_tower(folder / "model.safetensors", getattr(model.config.vision_config, "model_type", ""))
    processor.save_pretrained(folder)
    return folder


def _rename_vision_tower(weights: Path, kind: str) -> None:
    """Gives the weights of a CLIP or SigLIP tower the names that they have at the hub, and that vLLM knows.

    Transformers takes a part of the name away when it loads them, and puts it back only into models that it loaded.
    """
    if kind in ("clip_vision_model", "siglip_vision_model"):
        tensors = load_file(weights)
        hub = {name.replace("vision_tower.", "vision_tower.vision_model.", 1): t for name, t in tensors.items()}
        save_file(hub, weights, metadata={"format": "pt"})


def _make_lively(model: torch.nn.Module) -> None:
    """Makes weights larger than a new model's, so that positions, pictures and adapters show in the logits."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and not parameter.any():
                # Gemma 3 begins with a connector of zeros.
                parameter.normal_(0.0, 0.2)
            elif parameter.ndim >= 2:
                parameter.mul_(3.0)
            elif "norm" in name and "bias" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))


def main(arguments: list[str]) -> int:
    """Writes instances; returns the exit code."""
    if not arguments or any(name not in FAMILIES for name in arguments[1:]):
        print(f"usage: python -m tests.families.factory OUT [FAMILY ...]\nfamilies: {', '.join(FAMILIES)}")
        return 2
    for name in arguments[1:] or FAMILIES:
        print(build_family(name, Path(arguments[0]) / name))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
