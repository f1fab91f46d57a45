"""GFlowVLM: distributed GFlowNet fine-tuning of vision-language models."""

# Makes the shipped tasks known in every process that imports anything of the package.
import gflowvlm.envs as _envs  # noqa: F401
