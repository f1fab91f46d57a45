"""Idefics3 and SmolVLM."""

from typing import Any

import transformers
from transformers import PretrainedConfig

from tests.families import templates
from tests.families.family import Family, text_sizes, token_id, vision_sizes
from tests.families.tokenizer_kinds import SpecialTokens

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
        text_config={"model_type": "llama", **text_sizes(tokenizer)},
        vision_config=vision_sizes(image_size=_SMOL_SIDE, patch_size=_SMOL_PATCH),
        image_token_id=token_id(tokenizer, "<image>"),
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


FAMILIES = {
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
}
