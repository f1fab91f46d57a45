"""vLLM's CPU platform with our LoRA: what the entry point group ``vllm.platform_plugins`` names."""

from vllm.platforms import cpu_platform_plugin
from vllm.platforms.cpu import CpuPlatform


class CpuLoraPlatform(CpuPlatform):
    """vLLM's CPU platform with `gflowvlm.actors.cpu_lora.MatmulPunicaWrapper`."""

    @classmethod
    def get_punica_wrapper(cls) -> str:
        """Returns the import path of the wrapper; its module can be imported once the platform is chosen."""
        return "gflowvlm.actors.cpu_lora.MatmulPunicaWrapper"


def cpu_lora_platform() -> str | None:
    """Returns the import path of `CpuLoraPlatform` where vLLM would use its plain CPU platform, else None."""
    plain = f"{CpuPlatform.__module__}.{CpuPlatform.__qualname__}"
    return f"{CpuLoraPlatform.__module__}.{CpuLoraPlatform.__qualname__}" if cpu_platform_plugin() == plain else None
