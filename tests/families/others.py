"""Mistral Small 3.1 and GLM-4.1V."""

from typing import Any

import transformers
from transformers import PretrainedConfig

from tests.families import templates
from tests.families.family import (
    HEAD_DIM,
    HEADS,
    PATCH,
    SIDE,
    Family,
    qwen_text_sizes,
    square,
    text_sizes,
    token_id,
    vision_sizes,
)
from tests.families.tokenizer_kinds import SpecialTokens

_MISTRAL3 = SpecialTokens(
    eos="</s>",
    pad="<pad>",
    bos="<s>",
    others=("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
)


def _mistral3_config(tokenizer: Any) -> PretrainedConfig:
    return transformers.Mistral3Config(
        text_config={"model_type": "mistral", **text_sizes(tokenizer), "sliding_window": None},
        vision_config={
            "model_type": "pixtral",
            **vision_sizes(image_size=8 * PATCH),
            "hidden_act": "silu",
            "rope_parameters": {"rope_type": "axial", "rope_theta": 10_000.0},
        },
        image_token_index=token_id(tokenizer, "[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )


def _mistral3_processor(tokenizer: Any) -> Any:
    return transformers.PixtralProcessor(
        transformers.PixtralImageProcessor(size={"longest_edge": 8 * PATCH}, patch_size=square(PATCH)),
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
        text_config=qwen_text_sizes(tokenizer, rope_parameters=rope),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "image_size": SIDE,
            "out_hidden_size": HEADS * HEAD_DIM,
            "intermediate_size": 64,
        },
        image_token_id=token_id(tokenizer, "<|image|>"),
        video_token_id=token_id(tokenizer, "<|video|>"),
        image_start_token_id=token_id(tokenizer, "<|begin_of_image|>"),
        image_end_token_id=token_id(tokenizer, "<|end_of_image|>"),
        video_start_token_id=token_id(tokenizer, "<|begin_of_video|>"),
        video_end_token_id=token_id(tokenizer, "<|end_of_video|>"),
    )


def _glm4v_processor(tokenizer: Any) -> Any:
    bounds = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 32}
    return transformers.Glm4vProcessor(
        transformers.Glm4vImageProcessor(size=bounds),
        tokenizer,
        transformers.Glm4vVideoProcessor(size=bounds),
        chat_template=templates.GLM4V,
    )


FAMILIES = {
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
