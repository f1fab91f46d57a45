"""LoRA in vLLM's CPU engine by one matrix product for each adapter of a batch.

vLLM's own CPU kernels copy the adapter's weights once for every token of the batch, which is most of a small
model's time. A platform plugin is vLLM's public way to bring another implementation
(`gflowvlm.actors.cpu_platform`). Where the project runs without being installed vLLM finds no plugin and uses its own
kernels: slower, with the same results.
"""

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

AdapterRows = list[tuple[int, torch.Tensor | None]]
"""For each adapter of a batch: its slot, and the batch's rows that use it (None: all)."""


def adapter_rows(slots: torch.Tensor) -> AdapterRows:
    """Returns which rows of a batch use which adapter.

    Args:
        slots: The adapter's slot of each token, -1 for the base model. Shape (tokens,).
    """
    used: list[int] = torch.unique(slots).tolist()
    if len(used) == 1:
        return [(slot, None) for slot in used if slot >= 0]
    return [(slot, torch.nonzero(slots == slot).flatten()) for slot in used if slot >= 0]


class MatmulPunicaWrapper(PunicaWrapperCPU):
    """vLLM's CPU wrapper with `add_lora_linear` grouped by adapter."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._adapter_rows: AdapterRows = []

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Notes which tokens of the next batch use which adapter."""
        super().update_metadata(*args, **kwargs)
        self._adapter_rows = adapter_rows(self.token_lora_indices)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds scale · x Aᵀ Bᵀ of each token's adapter to `y`, in place.

        Args:
            y: A linear layer's output. Shape (..., sum of `output_slices`).
            x: Its input. Shape (..., inputs).
            lora_a_stacked: A of every slot, one tensor a slice. Shape (slots, 1, rank, inputs).
            lora_b_stacked: B of every slot, one tensor a slice. Shape (slots, 1, slice's outputs, rank).
            scale: Factor of the product.
            output_slices: Outputs of each slice.
            buffer: Unused; vLLM's GPU kernels write into it.
            **kwargs: Unused.
        """
        outputs, inputs = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        for slot, rows in self._adapter_rows:
            chosen = inputs if rows is None else inputs[rows]
            start = 0
            for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                added = (chosen @ a[slot, 0].T * scale) @ b[slot, 0].T
                part = outputs[:, start : start + width]
                if rows is None:
                    part += added
                else:
                    part.index_add_(0, rows, added)
                start += width
