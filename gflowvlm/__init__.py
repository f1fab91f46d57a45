"""GFlowVLM: distributed GFlowNet fine-tuning of vision-language models."""
