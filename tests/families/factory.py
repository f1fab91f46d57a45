"""Tiny random instances of real vision-language model classes: real processors, tokenizers of the families' kinds.

`build_family` writes one as a model folder that loads like one of a hub. Run as a program it writes them all::

    python -m tests.families.factory OUT [FAMILY ...]
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, GenerationConfig, PretrainedConfig

from tests.families import templates
from tests.families.tokenizer_kinds import SpecialTokens, TokenizerKind, build_tokenizer

PATCH = 14
SIDE = 56
"""Side of the picture that a vision tower with one size takes, pixels."""

MAX_POSITIONS = 2048
HEADS, KEY_VALUE_HEADS, HEAD_DIM = 4, 2, 32


@dataclass(frozen=True)
class Family:
    """How an instance of a family is made.

    Attributes:
        label: What its users call it.
        kind: Kind of its tokenizer.
        special: Its special tokens.
        config: Returns the model's configuration for a tokenizer.
        processor: Returns the processor for a tokenizer.
        ends: Tokens that the family's generation configuration ends a response with.
        generation: What else stands in its generation configuration.
    """

    label: str
    kind: TokenizerKind
    special: SpecialTokens
    config: Callable[[Any], PretrainedConfig]
    processor: Callable[[Any], Any]
    ends: tuple[str, ...]
    generation: dict[str, Any] = field(default_factory=dict)


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


def _text(tokenizer: Any, spare: int = 0, **more: Any) -> dict[str, Any]:
    """Sizes of a language model. Some families have spare rows in their vocabulary, past the last token."""
    return {
        "vocab_size": len(tokenizer) + spare,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": MAX_POSITIONS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **more,
    }


def _qwen_text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    """Sizes where heads are as wide as the states divided by their number."""
    sizes = {name: value for name, value in _text(tokenizer, spare=63, **more).items() if name != "head_dim"}
    return {**sizes, "hidden_size": HEADS * HEAD_DIM}


def _vision(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        **more,
    }


def _image_id(tokenizer: Any, token: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(token))


def _square(side: int = SIDE) -> dict[str, int]:
    return {"height": side, "width": side}


# --- Idefics3, SmolVLM ---------------------------------------------------------------------------------------------

_SMOL_SIDE, _SMOL_PATCH, _SMOL_SCALE = 64, 16, 2
_SMOL_TOKENS = (_SMOL_SIDE // _SMOL_PATCH // _SMOL_SCALE) ** 2
_SMOL = SpecialTokens(
    eos="<end_of_utterance>",
    pad="<|im_end|>",
    bos="<|im_start|>",
    others=(
        "<|endoftext|>",
        "<fake_token_around_image>",
        "<image>",
        "<video>",
        "<global-img>",
        *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    ),
)


def _smol_config(tokenizer: Any, config: type[PretrainedConfig]) -> PretrainedConfig:
    return config(
        text_config={"model_type": "llama", **_text(tokenizer)},
        vision_config=_vision(image_size=_SMOL_SIDE, patch_size=_SMOL_PATCH),
        image_token_id=_image_id(tokenizer, "<image>"),
        scale_factor=_SMOL_SCALE,
        pad_token_id=tokenizer.pad_token_id,
    )


def _smol_pictures(processor: Any) -> Any:
    """Two tiles at most on a side, whatever the picture: the real one's 17 are for documents."""
    return processor(size={"longest_edge": 2 * _SMOL_SIDE}, max_image_size={"longest_edge": _SMOL_SIDE})


def _idefics3_processor(tokenizer: Any) -> Any:
    return transformers.Idefics3Processor(
        _smol_pictures(transformers.Idefics3ImageProcessor),
        tokenizer,
        image_seq_len=_SMOL_TOKENS,
        chat_template=templates.SMOLVLM,
    )


def _smolvlm_processor(tokenizer: Any) -> Any:
    videos = transformers.SmolVLMVideoProcessor(
        size={"longest_edge": 2 * _SMOL_SIDE}, max_image_size={"longest_edge": _SMOL_SIDE}
    )
    return transformers.SmolVLMProcessor(
        _smol_pictures(transformers.SmolVLMImageProcessor),
        tokenizer,
        videos,
        image_seq_len=_SMOL_TOKENS,
        chat_template=templates.SMOLVLM,
    )


# --- LLaVA -----------------------------------------------------------------------------------------------------------

_LLAVA = SpecialTokens(eos="</s>", pad="<pad>", bos="<s>", others=("<image>",), named=(("image_token", "<image>"),))
_PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]


def _llava_config(tokenizer: Any) -> PretrainedConfig:
    return transformers.LlavaConfig(
        text_config={"model_type": "llama", **_text(tokenizer)},
        vision_config={"model_type": "clip_vision_model", "projection_dim": 32, **_vision(num_hidden_layers=3)},
        image_token_index=_image_id(tokenizer, "<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
    )


def _llava_processor(tokenizer: Any) -> Any:
    return transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=_square()),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=templates.LLAVA_1_5,
    )


def _llava_next_config(tokenizer: Any) -> PretrainedConfig:
    return transformers.LlavaNextConfig(
        text_config={"model_type": "mistral", **_text(tokenizer, spare=63), "sliding_window": None},
        vision_config={"model_type": "clip_vision_model", "projection_dim": 32, **_vision(num_hidden_layers=3)},
        image_token_index=_image_id(tokenizer, "<image>"),
        image_grid_pinpoints=_PINPOINTS,
        image_seq_length=(SIDE // PATCH) ** 2,
    )


def _llava_next_processor(tokenizer: Any) -> Any:
    return transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessor(
            size={"shortest_edge": SIDE}, crop_size=_square(), image_grid_pinpoints=_PINPOINTS
        ),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=templates.LLAVA_1_6_MISTRAL,
    )


# --- Qwen's language models ------------------------------------------------------------------------------------------

_QWEN = SpecialTokens(
    eos="<|im_end|>",
    pad="<|endoftext|>",
    others=("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
_QWEN_GENERATION = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.6, "top_k": 20, "top_p": 0.8}


def _onevision_config(tokenizer: Any) -> PretrainedConfig:
    return transformers.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **_qwen_text(tokenizer)},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **_vision()},
        image_token_index=_image_id(tokenizer, "<image>"),
        video_token_index=_image_id(tokenizer, "<video>"),
        image_grid_pinpoints=_PINPOINTS,
    )


def _onevision_processor(tokenizer: Any) -> Any:
    return transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=_square(), image_grid_pinpoints=_PINPOINTS),
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(size=_square()),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=templates.LLAVA_ONEVISION,
    )


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    return {
        "image_token_id": _image_id(tokenizer, "<|image_pad|>"),
        "video_token_id": _image_id(tokenizer, "<|video_pad|>"),
        "vision_start_token_id": _image_id(tokenizer, "<|vision_start|>"),
        "vision_end_token_id": _image_id(tokenizer, "<|vision_end|>"),
    }


def _mrope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, "mrope_section": [4, 6, 6], **more}


def _qwen2_5_vl_config(tokenizer: Any) -> PretrainedConfig:
    return transformers.Qwen2_5_VLConfig(
        text_config=_qwen_text(tokenizer, rope_parameters=_mrope(1e6)),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": HEADS * HEAD_DIM,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        tie_word_embeddings=True,
        **_qwen_ids(tokenizer),
    )


def _qwen2_5_vl_processor(tokenizer: Any) -> Any:
    bounds = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16}
    return transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(size=bounds),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(size=bounds),
        chat_template=templates.QWEN2_5_VL,
    )


def _qwen3_vl_config(tokenizer: Any) -> PretrainedConfig:
    return transformers.Qwen3VLConfig(
        # More spare rows than vLLM's second model runner takes biases for.
        text_config=_text(tokenizer, spare=1100, rope_parameters=_mrope(5e6, mrope_interleaved=True)),
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        **_qwen_ids(tokenizer),
    )


def _qwen3_vl_processor(tokenizer: Any) -> Any:
    bounds = {"shortest_edge": 64 * 64, "longest_edge": 32 * 32 * 16}
    shape = {"size": bounds, "patch_size": 16}
    return transformers.Qwen3VLProcessor(
        transformers.Qwen2VLImageProcessor(**shape, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokenizer,
        transformers.Qwen3VLVideoProcessor(**shape),
        chat_template=templates.QWEN3_VL,
    )


_INTERNVL = SpecialTokens(
    eos="<|im_end|>",
    pad="<|endoftext|>",
    others=("<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
    named=(
        ("start_image_token", "<img>"),
        ("end_image_token", "</img>"),
        ("context_image_token", "<IMG_CONTEXT>"),
        ("video_token", "<video>"),
    ),
)


def _internvl_config(tokenizer: Any) -> PretrainedConfig:
    vision = _vision(image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH])
    return transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **_qwen_text(tokenizer)},
        vision_config=vision,
        image_token_id=_image_id(tokenizer, "<IMG_CONTEXT>"),
        image_seq_length=(SIDE // PATCH // 2) ** 2,
        tie_word_embeddings=False,
    )


def _internvl_processor(tokenizer: Any) -> Any:
    return transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=_square(), crop_to_patches=False, max_patches=4),
        tokenizer,
        transformers.InternVLVideoProcessor(size=_square()),
        image_seq_length=(SIDE // PATCH // 2) ** 2,
        chat_template=templates.INTERNVL,
    )


# --- Gemma's language models -----------------------------------------------------------------------------------------

_GEMMA3 = SpecialTokens(
    eos="<eos>",
    pad="<pad>",
    bos="<bos>",
    others=("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"),
    named=(
        ("boi_token", "<start_of_image>"),
        ("eoi_token", "<end_of_image>"),
        ("image_token", "<image_soft_token>"),
    ),
)


def _gemma3_config(tokenizer: Any) -> PretrainedConfig:
    return transformers.Gemma3Config(
        text_config=_text(
            tokenizer,
            query_pre_attn_scalar=HEAD_DIM,
            sliding_window=512,
            layer_types=["sliding_attention", "full_attention"],
        ),
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **_vision()},
        mm_tokens_per_image=4,
        boi_token_index=_image_id(tokenizer, "<start_of_image>"),
        eoi_token_index=_image_id(tokenizer, "<end_of_image>"),
        image_token_index=_image_id(tokenizer, "<image_soft_token>"),
    )


def _gemma3_processor(tokenizer: Any) -> Any:
    return transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessor(size=_square()),
        tokenizer,
        chat_template=templates.GEMMA3,
        image_seq_length=4,
    )


_PALIGEMMA = SpecialTokens(
    eos="<eos>", pad="<pad>", bos="<bos>", others=("<image>",), named=(("image_token", "<image>"),)
)


def _paligemma2_config(tokenizer: Any) -> PretrainedConfig:
    sizes = _text(
        tokenizer,
        query_pre_attn_scalar=HEAD_DIM,
        sliding_window=512,
        layer_types=["sliding_attention", "full_attention"],
    )
    return transformers.PaliGemmaConfig(
        text_config={"model_type": "gemma2", **sizes},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **_vision()},
        image_token_index=_image_id(tokenizer, "<image>"),
        vocab_size=sizes["vocab_size"],
        projection_dim=64,
        hidden_size=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _paligemma_processor(tokenizer: Any) -> Any:
    pictures = transformers.SiglipImageProcessor(size=_square(), image_mean=[0.5] * 3, image_std=[0.5] * 3)
    pictures.image_seq_length = (SIDE // PATCH) ** 2
    # No chat template: it is a model for fine-tuning.
    return transformers.PaliGemmaProcessor(pictures, tokenizer)


# --- Others ----------------------------------------------------------------------------------------------------------

_MISTRAL3 = SpecialTokens(
    eos="</s>",
    pad="<pad>",
    bos="<s>",
    others=("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
)


def _mistral3_config(tokenizer: Any) -> PretrainedConfig:
    return transformers.Mistral3Config(
        text_config={"model_type": "mistral", **_text(tokenizer), "sliding_window": None},
        vision_config={
            "model_type": "pixtral",
            **_vision(image_size=8 * PATCH),
            "hidden_act": "silu",
            "rope_parameters": {"rope_type": "axial", "rope_theta": 10_000.0},
        },
        image_token_index=_image_id(tokenizer, "[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )


def _mistral3_processor(tokenizer: Any) -> Any:
    return transformers.PixtralProcessor(
        transformers.PixtralImageProcessor(size={"longest_edge": 8 * PATCH}, patch_size=_square(PATCH)),
        tokenizer,
        patch_size=PATCH,
        spatial_merge_size=2,
        chat_template=templates.MISTRAL3,
    )


_GLM4V = SpecialTokens(
    eos="<|endoftext|>",
    pad="<|pad|>",
    others=(
        "[gMASK]",
        "<sop>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|observation|>",
        "<|begin_of_image|>",
        "<|end_of_image|>",
        "<|image|>",
        "<|begin_of_video|>",
        "<|end_of_video|>",
        "<|video|>",
    ),
)


def _glm4v_config(tokenizer: Any) -> PretrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}
    return transformers.Glm4vConfig(
        text_config=_qwen_text(tokenizer, rope_parameters=rope),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "image_size": SIDE,
            "out_hidden_size": HEADS * HEAD_DIM,
            "intermediate_size": 64,
        },
        image_token_id=_image_id(tokenizer, "<|image|>"),
        video_token_id=_image_id(tokenizer, "<|video|>"),
        image_start_token_id=_image_id(tokenizer, "<|begin_of_image|>"),
        image_end_token_id=_image_id(tokenizer, "<|end_of_image|>"),
        video_start_token_id=_image_id(tokenizer, "<|begin_of_video|>"),
        video_end_token_id=_image_id(tokenizer, "<|end_of_video|>"),
    )


def _glm4v_processor(tokenizer: Any) -> Any:
    bounds = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 32}
    return transformers.Glm4vProcessor(
        transformers.Glm4vImageProcessor(size=bounds),
        tokenizer,
        transformers.Glm4vVideoProcessor(size=bounds),
        chat_template=templates.GLM4V,
    )


FAMILIES: dict[str, Family] = {
    "idefics3": Family(
        "Idefics3",
        "smollm2",
        _SMOL,
        lambda tokenizer: _smol_config(tokenizer, transformers.Idefics3Config),
        _idefics3_processor,
        ("<end_of_utterance>",),
    ),
    "smolvlm": Family(
        "SmolVLM 2",
        "smollm2",
        _SMOL,
        lambda tokenizer: _smol_config(tokenizer, transformers.SmolVLMConfig),
        _smolvlm_processor,
        ("<end_of_utterance>",),
    ),
    "llava": Family("LLaVA 1.5", "llama2", _LLAVA, _llava_config, _llava_processor, ("</s>",)),
    "llava_next": Family(
        "LLaVA 1.6 (Mistral)", "mistral", _LLAVA, _llava_next_config, _llava_next_processor, ("</s>",)
    ),
    "llava_onevision": Family(
        "LLaVA-OneVision",
        "qwen",
        SpecialTokens("<|im_end|>", "<|endoftext|>", None, ("<|im_start|>", "<image>", "<video>")),
        _onevision_config,
        _onevision_processor,
        ("<|im_end|>", "<|endoftext|>"),
        _QWEN_GENERATION,
    ),
    "qwen2_5_vl": Family(
        "Qwen2.5-VL",
        "qwen",
        _QWEN,
        _qwen2_5_vl_config,
        _qwen2_5_vl_processor,
        ("<|im_end|>", "<|endoftext|>"),
        _QWEN_GENERATION,
    ),
    "qwen3_vl": Family(
        "Qwen3-VL",
        "qwen",
        _QWEN,
        _qwen3_vl_config,
        _qwen3_vl_processor,
        ("<|im_end|>", "<|endoftext|>"),
        _QWEN_GENERATION,
    ),
    "internvl": Family(
        "InternVL 3 (hf)", "qwen", _INTERNVL, _internvl_config, _internvl_processor, ("<|im_end|>", "<|endoftext|>")
    ),
    "gemma3": Family("Gemma 3", "gemma", _GEMMA3, _gemma3_config, _gemma3_processor, ("<eos>", "<end_of_turn>")),
    "paligemma2": Family("PaliGemma 2", "gemma", _PALIGEMMA, _paligemma2_config, _paligemma_processor, ("<eos>",)),
    "mistral3": Family("Mistral Small 3.1", "llama3", _MISTRAL3, _mistral3_config, _mistral3_processor, ("</s>",)),
    "glm4v": Family(
        "GLM-4.1V",
        "llama3",
        _GLM4V,
        _glm4v_config,
        _glm4v_processor,
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
    ),
}
"""The families of the matrix by their short names."""


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
