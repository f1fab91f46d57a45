"""What `gpu_check.py` runs: models of real shapes with random weights, a processor without files, and trajectories."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedTokenizerFast, Qwen2_5_VLConfig

from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.trajectory import EndReason, Step, Trajectory, Validity

PATCH, MERGE, FRAMES = 14, 2, 2
"""Qwen2.5-VL's patches: pixels of a side, patches of a side in one token, frames that a picture is repeated for."""

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
VIDEO = "<|video_pad|>"


@dataclass(frozen=True)
class Shape:
    """A model's sizes and the batch that it learns from.

    Attributes:
        name: What it is called.
        hidden: Width of the language model.
        layers: Its blocks.
        heads: Its attention heads.
        key_value_heads: Those of keys and values.
        intermediate: Width of its feed-forward layers.
        vocabulary: Rows of its output head.
        tied: Whether that is the input embedding.
        vision_hidden: Width of the vision tower.
        vision_layers: Its blocks.
        vision_heads: Its attention heads.
        vision_intermediate: Width of its feed-forward layers.
        side: Of the pictures, pixels.
        prompt: Tokens of the first prompt, beside its picture's.
        response: Tokens of a response.
        groups: Instances of the batch.
        group_size: Trajectories of each.
        steps: Of each trajectory.
        token_budget: Padded tokens of a micro-batch.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    vocabulary: int
    tied: bool
    vision_hidden: int = 1280
    vision_layers: int = 32
    vision_heads: int = 16
    vision_intermediate: int = 3420
    side: int = 336
    prompt: int = 384
    response: int = 96
    groups: int = 4
    group_size: int = 8
    steps: int = 3
    token_budget: int = 8192


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("3b", 2048, 36, 16, 2, 11_008, 151_936, tied=True),
        Shape("7b", 3584, 28, 28, 4, 18_944, 152_064, tied=False),
        Shape(
            "tiny", 64, 2, 4, 2, 128, 512, tied=True,
            vision_hidden=32, vision_layers=2, vision_heads=2, vision_intermediate=64,
            side=56, prompt=48, response=90, groups=2, group_size=2, steps=2, token_budget=1024,
        ),
    )
}  # fmt: skip
"""Qwen2.5-VL-3B and -7B by their published configurations, and one that a CPU passes in a moment."""


class BytesAndPictures:
    """A processor of Qwen2.5-VL's kind that needs no files: one token for each byte, pictures of one size.

    Args:
        side: Of the pictures, pixels; a multiple of `PATCH` x `MERGE`.
    """

    chat_template = "as `apply_chat_template` writes it"
    image_token = "<|image_pad|>"
    model_input_names = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")

    def __init__(self, side: int) -> None:
        self.tokenizer = _byte_tokenizer()
        self._side = side
        self._patches = side // PATCH
        self._image_id = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def apply_chat_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool, **_: Any) -> str:
        """Returns the conversation as Qwen2.5-VL is shown it."""
        shown = []
        for message in messages:
            content = "".join(
                "<|vision_start|><|image_pad|><|vision_end|>" if part["type"] == "image" else part["text"]
                for part in message["content"]
            )
            shown.append(f"<|im_start|>{message['role']}\n{content}<|im_end|>\n")
        return "".join(shown) + ("<|im_start|>assistant\n" if add_generation_prompt else "")

    def __call__(self, text: list[str], images: list[Any], **_: Any) -> dict[str, Tensor]:
        """Returns left-padded inputs of N texts with pictures."""
        pictures = [picture for each in images for picture in (each if isinstance(each, list) else [each])]
        tokens = (self._patches // MERGE) ** 2
        rows = [
            self.tokenizer.encode(one.replace("<|image_pad|>", "<|image_pad|>" * tokens), add_special_tokens=False)
            for one in text
        ]
        length = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": (ids == self._image_id).long(),
            "pixel_values": torch.cat([self._patched(picture) for picture in pictures]),
            "image_grid_thw": torch.tensor([[1, self._patches, self._patches]] * len(pictures)),
        }

    def _patched(self, picture: Image.Image) -> Tensor:
        resized = picture.convert("RGB").resize((self._side, self._side))
        pixels = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).float() / 127.5 - 1.0
        merged = self._patches // MERGE
        frames = pixels[None].expand(FRAMES, -1, -1, -1)
        parts = frames.reshape(FRAMES, 3, merged, MERGE, PATCH, merged, MERGE, PATCH)
        # Patches that become one token stand together; each is colours, frames, rows, columns.
        return parts.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(self._patches**2, 3 * FRAMES * PATCH**2)


def make_inputs(shape: Shape, folder: Path) -> PolicyInputs:
    """Returns the inputs of a shape's model, whose configuration is written into a folder; nothing is looked up."""
    processor = BytesAndPictures(shape.side)
    make_config(shape, processor.tokenizer).save_pretrained(folder)
    GenerationConfig(eos_token_id=processor.tokenizer.eos_token_id).save_pretrained(folder)
    return PolicyInputs(str(folder), processor)


def make_config(shape: Shape, tokenizer: Any) -> Qwen2_5_VLConfig:
    """Returns the configuration of a shape's model."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (*SPECIAL, VIDEO)}
    half = shape.hidden // shape.heads // 2
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": shape.hidden,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.key_value_heads,
            "intermediate_size": shape.intermediate,
            "vocab_size": shape.vocabulary,
            "max_position_embeddings": 128_000,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": shape.tied,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8],
            },
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={
            "hidden_size": shape.vision_hidden,
            "out_hidden_size": shape.hidden,
            "depth": shape.vision_layers,
            "num_heads": shape.vision_heads,
            "intermediate_size": shape.vision_intermediate,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
            "window_size": 112,
            "fullatt_block_indexes": [shape.vision_layers * part // 4 - 1 for part in range(1, 5)],
        },
        tie_word_embeddings=shape.tied,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids[VIDEO],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def make_model(config: Qwen2_5_VLConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """Returns a model with random weights that were made on its device."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype)


def make_trajectories(shape: Shape, inputs: PolicyInputs) -> list[Trajectory]:
    """Returns a batch: groups whose trajectories begin in one state and then go different ways."""
    made = []
    for group in range(shape.groups):
        for member in range(shape.group_size):
            histories = [(group, *(f"{member}" for _ in range(step))) for step in range(shape.steps)]
            steps = [_step(shape, inputs, history, last=i == shape.steps - 1) for i, history in enumerate(histories)]
            made.append(
                Trajectory(
                    trajectory_id=f"t{group}-{member}",
                    group_id=f"g{group}",
                    instance_id=f"check/{group}",
                    instance_seed=group,
                    task="check",
                    split="id",
                    steps=steps,
                    images=[_picture(shape.side, history) for history in histories],
                    log_rewards=[0.5 * ((group + member + i) % 4) for i in range(shape.steps)],
                    original_rewards=[0.0] * shape.steps,
                    end=EndReason.DONE,
                    success=True,
                    outcome="",
                    expert=False,
                )
            )
    return made


def _step(shape: Shape, inputs: PolicyInputs, history: tuple[Any, ...], last: bool) -> Step:
    past = "".join(f"\nAction {i}: {action}" for i, action in enumerate(history[1:]))
    prompt = ("Go to the target. " * shape.prompt)[: shape.prompt] + past
    action = "[DONE]" if last else "+"
    frame = f'{{"current": 1, "target": 5, "thoughts": "", "action": "{action}"}}'
    thoughts = ("below the target, so on; " * shape.response)[: max(1, shape.response - len(frame))]
    text = f'{{"current": 1, "target": 5, "thoughts": "{thoughts}", "action": "{action}"}}'
    ids = inputs.encode_response(text)
    layout = inputs.read(ids).layout
    return Step(
        prompt=prompt,
        image=len(history) - 1,
        response_ids=ids,
        response_text=text,
        cot_end=layout.cot_end,
        action_end=layout.action_end,
        sampler_log_probs=[float("nan")] * len(ids),
        policy_version=0,
        action=action,
        validity=Validity.VALID,
        stop_ids=layout.stop_ids,
    )


def _picture(side: int, history: tuple[Any, ...]) -> bytes:
    seed = int.from_bytes(repr(history).encode()[-4:], "little")
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (*SPECIAL, VIDEO)])
    tokenizer.add_tokens([AddedToken("[DONE]", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
