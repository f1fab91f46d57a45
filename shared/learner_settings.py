"""The section of a run's configuration about its learner."""

from typing import Literal

from pydantic import Field

from gflowvlm.shared.settings import CustomResources, NodeLabels, Settings


class LearnerSettings(Settings):
    """The learner's optimisation."""

    steps: int = Field(60, ge=1, le=10_000_000, description="Learner steps of the whole run.")
    groups_per_batch: int = Field(4, ge=1, le=100_000, description="Groups in a batch.")
    workers: int = Field(1, ge=1, le=4096, description="Data-parallel learner processes (Ray Train).")
    sharding: Literal["none", "fsdp"] = Field(
        "none",
        description="Every learner holds the whole base model, or fsdp: a part, for models that do not fit on a GPU.",
    )
    gpus_per_worker: float = Field(
        0.0, ge=0, le=8, description="GPUs that a learner process asks Ray for; with 0 it computes on the CPU."
    )
    cpus_per_worker: float = Field(0.5, ge=0, le=64, description="CPUs that a learner process asks Ray for.")
    offload: bool = Field(
        False,
        description="Keep the learner's model in main memory while the sampler is awake (sampler.sleep_level).",
    )
    resources_per_worker: CustomResources = Field({}, description="As sampler.resources_per_replica.")
    node_labels: NodeLabels = Field({}, description="As sampler.node_labels.")
    learning_rate: float = Field(1e-3, gt=0, le=1, description="Peak rate of the adapter, after the warm-up.")
    final_learning_rate: float = Field(1e-4, ge=0, le=1, description="Rate at the last step, the end of a cosine.")
    head_learning_rate: float = Field(
        5e-3,
        gt=0,
        le=1,
        description="Peak rate of the log Z or flow head (tb, flow_*, fl_*); its schedule has the adapter's shape.",
    )
    warmup_steps: int = Field(5, ge=0, description="First steps, over which the rate rises linearly.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW's, of the adapter; heads have none.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the mean of the gradients.")
    adam_beta2: float = Field(0.98, ge=0, lt=1, description="AdamW's decay of the mean of their squares.")
    grad_clip: float = Field(1.0, gt=0, le=1e6, description="Largest gradient norm, of adapter and head each.")
    token_budget: int = Field(
        16_384, ge=64, description="Padded tokens in one forward pass; a prompt that responses share counts once."
    )
    publish_every: int = Field(1, ge=1, description="Learner steps per published adapter version.")
    checkpoint_every: int = Field(1, ge=1, description="Learner steps per checkpoint; `ppo` and `grpo` write each.")
    keep_checkpoints: int = Field(3, ge=1, description="Newest checkpoints that stay on disk.")
    keep_adapters: int = Field(
        8,
        ge=2,
        le=1_000_000,
        description="Newest adapter versions that stay on disk, beside every evaluated one and those in use.",
    )
    max_failures: int = Field(3, ge=0, description="Restarts of a failed learner before the run gives up.")
    data_timeout_s: float = Field(600.0, gt=0, le=86_400, description="Longest wait for a batch.")
