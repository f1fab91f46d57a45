"""LLaVA 1.5 and 1.6."""

from typing import Any

import transformers
from transformers import PretrainedConfig

from tests.families import templates
from tests.families.family import PATCH, PINPOINTS, SIDE, Family, square, text_sizes, token_id, vision_sizes
from tests.families.tokenizer_kinds import SpecialTokens

_LLAVA = SpecialTokens(eos="</s>", pad="<pad>", bos="<s>", others=("<image>",), named=(("image_token", "<image>"),))


def _llava_config(tokenizer: Any) -> PretrainedConfig:
    return transformers.LlavaConfig(
        text_config={"model_type": "llama", **text_sizes(tokenizer)},
        vision_config={"model_type": "clip_vision_model", "projection_dim": 32, **vision_sizes(num_hidden_layers=3)},
        image_token_index=token_id(tokenizer, "<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
    )


def _llava_processor(tokenizer: Any) -> Any:
    return transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square()),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=templates.LLAVA_1_5,
    )


def _llava_next_config(tokenizer: Any) -> PretrainedConfig:
    return transformers.LlavaNextConfig(
        text_config={"model_type": "mistral", **text_sizes(tokenizer, spare=63), "sliding_window": None},
        vision_config={"model_type": "clip_vision_model", "projection_dim": 32, **vision_sizes(num_hidden_layers=3)},
        image_token_index=token_id(tokenizer, "<image>"),
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=(SIDE // PATCH) ** 2,
    )


def _llava_next_processor(tokenizer: Any) -> Any:
    return transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessor(
            size={"shortest_edge": SIDE}, crop_size=square(), image_grid_pinpoints=PINPOINTS
        ),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=templates.LLAVA_1_6_MISTRAL,
    )


FAMILIES = {
    "llava": Family("LLaVA 1.5", "llama2", _LLAVA, _llava_config, _llava_processor, ("</s>",)),
    "llava_next": Family(
        "LLaVA 1.6 (Mistral)", "mistral", _LLAVA, _llava_next_config, _llava_next_processor, ("</s>",)
    ),
}
