"""Families around Qwen's language models: Qwen-VL, LLaVA-OneVision, InternVL."""

from typing import Any

import transformers
from transformers import PretrainedConfig

from tests.families import templates
from tests.families.family import (
    HEAD_DIM,
    HEADS,
    PATCH,
    PINPOINTS,
    SIDE,
    Family,
    qwen_text_sizes,
    square,
    text_sizes,
    token_id,
    vision_sizes,
)
from tests.families.tokenizer_kinds import SpecialTokens

_QWEN = SpecialTokens(
    eos="<|im_end|>",
    pad="<|endoftext|>",
    others=("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
_QWEN_GENERATION = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.6, "top_k": 20, "top_p": 0.8}


def _onevision_config(tokenizer: Any) -> PretrainedConfig:
    return transformers.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **qwen_text_sizes(tokenizer)},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **vision_sizes()},
        image_token_index=token_id(tokenizer, "<image>"),
        video_token_index=token_id(tokenizer, "<video>"),
        image_grid_pinpoints=PINPOINTS,
    )


def _onevision_processor(tokenizer: Any) -> Any:
    return transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=square(), image_grid_pinpoints=PINPOINTS),
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(size=square()),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=templates.LLAVA_ONEVISION,
    )


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    return {
        "image_token_id": token_id(tokenizer, "<|image_pad|>"),
        "video_token_id": token_id(tokenizer, "<|video_pad|>"),
        "vision_start_token_id": token_id(tokenizer, "<|vision_start|>"),
        "vision_end_token_id": token_id(tokenizer, "<|vision_end|>"),
    }


def _mrope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, "mrope_section": [4, 6, 6], **more}


def _qwen2_5_vl_config(tokenizer: Any) -> PretrainedConfig:
    return transformers.Qwen2_5_VLConfig(
        text_config=qwen_text_sizes(tokenizer, rope_parameters=_mrope(1e6)),
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
        text_config=text_sizes(tokenizer, spare=1100, rope_parameters=_mrope(5e6, mrope_interleaved=True)),
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
    vision = vision_sizes(image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH])
    return transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **qwen_text_sizes(tokenizer)},
        vision_config=vision,
        image_token_id=token_id(tokenizer, "<IMG_CONTEXT>"),
        image_seq_length=(SIDE // PATCH // 2) ** 2,
        tie_word_embeddings=False,
    )


def _internvl_processor(tokenizer: Any) -> Any:
    return transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=square(), crop_to_patches=False, max_patches=4),
        tokenizer,
        transformers.InternVLVideoProcessor(size=square()),
        image_seq_length=(SIDE // PATCH // 2) ** 2,
        chat_template=templates.INTERNVL,
    )


FAMILIES = {
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
}
