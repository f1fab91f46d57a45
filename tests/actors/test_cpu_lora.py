"""LoRA by one matrix product an adapter gives what a plain loop over tokens gives."""

import pytest
import torch

pytest.importorskip("vllm")

from vllm.lora.layers import LoRAMapping, LoRAMappingType
from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("needs vLLM's CPU build", allow_module_level=True)

from gflowvlm.actors.cpu_lora import MatmulPunicaWrapper

SLOTS, RANK, INPUTS, SLICES, SCALE = 4, 3, 8, (6, 2, 4), 0.5
IDS = [11, 12, 13, None]
"""The adapter in each slot."""


def weights(generator: torch.Generator) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    a = tuple(torch.randn(SLOTS, 1, RANK, INPUTS, generator=generator) for _ in SLICES)
    b = tuple(torch.randn(SLOTS, 1, width, RANK, generator=generator) for width in SLICES)
    return a, b


@pytest.mark.parametrize("is_prefill", [True, False])
@pytest.mark.parametrize(
    "adapters",
    [[11] * 5, [0] * 5, [11, 11, 0, 12, 12], [13, 11, 13, 0, 11], [12]],
    ids=["one", "base", "mixed with base", "interleaved", "single token"],
)
def test_each_token_gets_its_own_adapters_product(adapters: list[int], is_prefill: bool) -> None:
    generator = torch.Generator().manual_seed(len(adapters))
    a, b = weights(generator)
    x = torch.randn(len(adapters), INPUTS, generator=generator)
    y = torch.randn(len(adapters), sum(SLICES), generator=generator)
    expected = y.clone()
    for row, adapter in enumerate(adapters):
        if adapter != 0:
            slot = IDS.index(adapter)
            expected[row] += torch.cat([x[row] @ a[i][slot, 0].T @ b[i][slot, 0].T for i in range(len(SLICES))]) * SCALE

    wrapper = MatmulPunicaWrapper(64, 16, "cpu")
    mapping = LoRAMapping(tuple(adapters), tuple(adapters), is_prefill=is_prefill, type=LoRAMappingType.LANGUAGE)
    wrapper.update_metadata(mapping, IDS, SLOTS, 100)
    wrapper.add_lora_linear(y, x, a, b, SCALE, SLICES)
    torch.testing.assert_close(y, expected)


def test_an_installed_project_gives_vllm_these_kernels() -> None:
    assert current_platform.get_punica_wrapper() == f"{MatmulPunicaWrapper.__module__}.{MatmulPunicaWrapper.__name__}"
