"""Families around Gemma's language models: Gemma 3, PaliGemma 2."""

from typing import Any

import transformers
from transformers import PretrainedConfig

from tests.families import templates
from tests.families.family import HEAD_DIM, PATCH, SIDE, Family, square, text_sizes, token_id, vision_sizes
from tests.families.tokenizer_kinds import SpecialTokens

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
        text_config=text_sizes(
            tokenizer,
            query_pre_attn_scalar=HEAD_DIM,
            sliding_window=512,
            layer_types=["sliding_attention", "full_attention"],
        ),
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **vision_sizes()},
        mm_tokens_per_image=4,
        boi_token_index=token_id(tokenizer, "<start_of_image>"),
        eoi_token_index=token_id(tokenizer, "<end_of_image>"),
        image_token_index=token_id(tokenizer, "<image_soft_token>"),
    )


def _gemma3_processor(tokenizer: Any) -> Any:
    return transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessor(size=square()),
        tokenizer,
        chat_template=templates.GEMMA3,
        image_seq_length=4,
    )


_PALIGEMMA = SpecialTokens(
    eos="<eos>", pad="<pad>", bos="<bos>", others=("<image>",), named=(("image_token", "<image>"),)
)


def _paligemma2_config(tokenizer: Any) -> PretrainedConfig:
    sizes = text_sizes(
        tokenizer,
        query_pre_attn_scalar=HEAD_DIM,
        sliding_window=512,
        layer_types=["sliding_attention", "full_attention"],
    )
    return transformers.PaliGemmaConfig(
        text_config={"model_type": "gemma2", **sizes},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **vision_sizes()},
        image_token_index=token_id(tokenizer, "<image>"),
        vocab_size=sizes["vocab_size"],
        projection_dim=64,
        hidden_size=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _paligemma_processor(tokenizer: Any) -> Any:
    pictures = transformers.SiglipImageProcessor(size=square(), image_mean=[0.5] * 3, image_std=[0.5] * 3)
    pictures.image_seq_length = (SIDE // PATCH) ** 2
    # No chat template: it is a model for fine-tuning.
    return transformers.PaliGemmaProcessor(pictures, tokenizer)


FAMILIES = {
    "gemma3": Family("Gemma 3", "gemma", _GEMMA3, _gemma3_config, _gemma3_processor, ("<eos>", "<end_of_turn>")),
    "paligemma2": Family("PaliGemma 2", "gemma", _PALIGEMMA, _paligemma2_config, _paligemma_processor, ("<eos>",)),
}
