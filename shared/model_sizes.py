"""A model's sizes, as far as its memory depends on them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a vision-language model with its adapter.

    Attributes:
        parameters: Parameters of the base model.
        weight_bytes: Bytes of them, in the precision that it computes in.
        linear_parameters: Those of its linear layers, the output layer aside: what is kept in fewer bits where asked.
        largest_linear: Parameters of the largest of these layers.
        adapter_parameters: Parameters of the LoRA adapter.
        cache_bytes_per_token: Bytes of one token's keys and values in all layers.
        hidden: Width of the language model.
        intermediate: Width inside its feed-forward layers.
        vocabulary: Rows of its output layer.
        vision_width: Numbers that the vision tower holds at once of each patch.
        block_bytes: Bytes of one block of the language model.
        element_bytes: Bytes of a number in the model's precision.
    """

    parameters: int
    weight_bytes: int
    linear_parameters: int
    largest_linear: int
    adapter_parameters: int
    cache_bytes_per_token: int
    hidden: int
    intermediate: int
    vocabulary: int
    vision_width: int
    block_bytes: int
    element_bytes: int
