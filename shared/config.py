"""Run configuration: every setting of a run, typed, bounded, unknown keys refused."""

import os
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from gflowvlm.shared.cluster_settings import ClusterSettings, ScalingSettings
from gflowvlm.shared.instances import EVALUATION_SEEDS
from gflowvlm.shared.learner_settings import LearnerSettings
from gflowvlm.shared.lora_layers import ALL_LINEAR
from gflowvlm.shared.objective_settings import ObjectiveSettings, TargetSettings
from gflowvlm.shared.precision import MISMATCH_LIMITS, QUANTIZED_LIMITS, FewerBits, MismatchLimits, Precision
from gflowvlm.shared.prompt_settings import PromptSettings
from gflowvlm.shared.settings import CustomResources, FolderPath, Fraction, ModelName, NodeLabels, PathMarker, Settings
from gflowvlm.shared.task_settings import AnyTaskSettings, default_settings
from gflowvlm.shared.user_code import use_code_folder, used_code_folder

_DEMONSTRATIONS = PathMarker(advice="`gflowvlm demonstrate TASK --out DIR` makes a set")


class PolicySettings(PromptSettings):
    """The vision-language model, its prompts, and its LoRA adapter."""

    model: ModelName = Field(
        "numberline-tiny",
        description="Name of a shipped model, model directory (`./models/mine`), or hub name (`owner/name`).",
    )
    dtype: Precision = Field("float32", description="Weights and activations, in sampler and learner.")
    load_in: FewerBits | None = Field(
        None,
        description="Load the learner's frozen model in 8 or 4 bits (bitsandbytes); the sampler keeps policy.dtype.",
    )
    lora_rank: int = Field(16, ge=1, le=512, description="Rank r of the adapter's matrices.")
    lora_alpha: float = Field(32.0, gt=0, le=4096, description="lora_alpha / lora_rank scales what the adapter adds.")
    lora_targets: list[str] = Field(
        default=[ALL_LINEAR],
        min_length=1,
        description="Names of the language model's linear layers that get an adapter; `all-linear` is all of them.",
    )
    cot_weight: Fraction = Field(0.4, description="Weight of log P_CoT in log P_F (GFlowVLM eq. 5).")
    max_response_tokens: int = Field(64, ge=4, le=4096, description="A response is cut off after so many tokens.")
    gradient_checkpointing: bool = Field(False, description="Less memory and more time in the learner.")


class SamplerSettings(Settings):
    """The policy server."""

    engine: Literal["vllm", "transformers"] = Field("vllm", description="What samples the responses.")
    replicas: int = Field(1, ge=1, le=256, description="Policy server replicas, each with an engine of its own.")
    gpus_per_replica: float = Field(
        0.0,
        ge=0.0,
        le=16.0,
        description="GPUs that a replica asks Ray for; with 0 it computes on the CPU, and so do `eval` and `play`.",
    )
    cpus_per_replica: float = Field(
        0.5, ge=0.0, le=64.0, description="CPUs that a replica asks Ray for; rounded, its threads on a CPU."
    )
    resources_per_replica: CustomResources = Field({}, description="Ray's custom resources, for example {h100: 1}.")
    node_labels: NodeLabels = Field({}, description="Only on nodes with these labels: a, !a, in(a, b), !in(a, b).")
    tensor_parallel_size: int = Field(1, ge=1, le=16, description="Parts that one engine splits the model into (vLLM).")
    max_model_len: int = Field(512, ge=64, le=131072, description="Prompt and response, tokens.")
    max_num_seqs: int = Field(64, ge=1, le=1024, description="Sequences decoded at once by one replica.")
    kv_cache_gib: float = Field(0.25, gt=0, le=1024, description="KV cache of one replica on CPU, GiB.")
    gpu_memory_utilization: float = Field(0.85, gt=0, lt=1, description="Share of a GPU's memory that vLLM takes.")
    sleep_level: Literal[0, 1, 2] = Field(
        0,
        description="For one GPU that sampler and learner share: while the learner steps, the sampler keeps its "
        "weights in main memory (1) or drops them and reads them again (2, vLLM); 0: it never sleeps.",
    )
    sleep_timeout_s: float = Field(
        3600.0, gt=0, le=86_400, description="Longest that a response is waited for while the sampler sleeps."
    )
    enforce_eager: bool = Field(True, description="No CUDA graphs and no compilation in vLLM: a quicker start.")
    temperature: float = Field(1.0, gt=0, le=2, description="Sampling temperature of training rollouts.")
    request_timeout_s: float = Field(120.0, gt=0, le=3600, description="Longest wait for one try of a response.")
    start_timeout_s: float = Field(300.0, gt=0, le=7200, description="Longest wait for the policy server to start.")
    orphan_timeout_s: float = Field(
        900.0, gt=0, le=86_400, description="Replicas that have not seen their run for so long end themselves."
    )
    mismatch_mean_tolerance: float | None = Field(
        None,
        gt=0,
        le=10,
        description="Largest mean difference between sampler and learner of a token's log-probability at start, nats; "
        "by default 2e-5, 0.02 for bfloat16, 0.1 and 0.5 with policy.load_in 8bit and 4bit.",
    )
    mismatch_tolerance: float | None = Field(
        None,
        gt=0,
        le=10,
        description="The same for the 99 % quantile of the differences; by default 1e-4, 0.2, 1 and 5.",
    )


class RolloutSettings(Settings):
    """Rollout workers."""

    workers: int = Field(1, ge=1, le=4096, description="Rollout worker processes.")
    groups_per_worker: int = Field(4, ge=1, le=4096, description="Groups one worker plays at the same time.")
    group_size: int = Field(8, ge=1, le=256, description="K: trajectories per task instance.")
    epsilon: Fraction = Field(0.0, description="Probability that a step's action is a random admissible one.")
    expert_on_failure: bool = Field(False, description="Add the expert's trajectory where all of a group failed.")
    demonstrations: Annotated[str, _DEMONSTRATIONS] | None = Field(
        None,
        description="Folder made by `gflowvlm demonstrate`: groups play its instances, and what it has of an instance "
        "joins the group.",
    )
    cpus_per_worker: float = Field(0.25, ge=0, le=64, description="CPUs that a worker asks Ray for.")
    resources_per_worker: CustomResources = Field({}, description="As sampler.resources_per_replica.")
    node_labels: NodeLabels = Field({}, description="As sampler.node_labels.")
    max_restarts: int = Field(100, ge=0, description="Restarts of dead workers before the run gives up.")
    environment_processes: int | None = Field(
        None,
        ge=0,
        le=256,
        description="Processes of each worker that hold its environments and are replaced when they die; 0 keeps the "
        "environments in the worker. By default 1 for tasks that ask for it (alfworld), 0 for those of short steps.",
    )
    environment_timeout_s: float = Field(
        300.0,
        ge=1,
        le=86_400,
        description="Longest that an environment may take for one call; then its group fails, and its process is "
        "replaced (the worker itself, where it holds the environments).",
    )

    @property
    def rollouts_at_once(self) -> int:
        """Rollouts that all workers together play at the same time."""
        return self.workers * self.groups_per_worker * self.group_size


class BufferSettings(Settings):
    """The replay buffer. Sizes are in trajectories unless said otherwise."""

    capacity: int = Field(4096, ge=1, le=10_000_000, description="The most trajectories in memory; files are kept.")
    newest_share: Fraction = Field(0.5, description="Share of a batch that is the newest groups; the rest by reward.")
    max_staleness: int = Field(4, ge=0, le=10_000, description="How many versions generation may run ahead.")
    replay_staleness: int = Field(
        64, ge=0, le=1_000_000, description="Versions after which a trajectory is no longer sampled."
    )
    priority_temperature: float = Field(1.0, gt=0, le=100, description="Softness of the priority by reward.")

    def newest_of(self, groups: int) -> int:
        """Returns how many of a batch's groups are the newest: `newest_share`, rounded, at least one unless it is 0."""
        return max(1, round(groups * self.newest_share)) if self.newest_share > 0 else 0


class EvaluationSettings(Settings):
    """Evaluation during and after training, on instances that training never sees."""

    every: int = Field(20, ge=1, description="Learner steps between evaluations.")
    instances: int = Field(30, ge=1, le=100_000, description="Task instances of one evaluation.")
    samples: int = Field(8, ge=1, le=1024, description="N of Div@N: trajectories per instance.")
    seed: int = Field(10_000_019, ge=0, lt=EVALUATION_SEEDS.stop // 2, description="Seed of the evaluation instances.")
    at_start: bool = Field(True, description="Evaluate the base model before the first learner step.")


class RunConfig(Settings):
    """A whole run.

    Frozen; its sections are attributes, and docs/configuration.md lists all settings with their bounds.
    `gflowvlm.load_config` makes one from a preset, a file or a mapping and says mistakes in one line.

    Example:
        >>> config = gflowvlm.RunConfig(name="mine", objective={"loss": "subtb"})
        >>> config.objective.loss, config.learner.steps, config.on_policy
        ('subtb', 60, False)
    """

    name: str = Field(
        "numberline-tiny", min_length=1, max_length=80, description="First part of the default run folder's name."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of instances, exploration, adapter and replay draws.")
    task: AnyTaskSettings = Field(default_factory=default_settings)
    policy: PolicySettings = PolicySettings()
    target: TargetSettings = TargetSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    sampler: SamplerSettings = SamplerSettings()
    rollout: RolloutSettings = RolloutSettings()
    buffer: BufferSettings = BufferSettings()
    learner: LearnerSettings = LearnerSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    scaling: ScalingSettings = ScalingSettings()
    cluster: ClusterSettings = ClusterSettings()
    # Last, because by then the other settings have named what they name.
    code: FolderPath | None = Field(
        None,
        validate_default=True,
        description="Folder of your own modules that settings name as `module:Name`; by default where the command "
        "starts.",
    )

    @model_validator(mode="before")
    @classmethod
    def _uses_code(cls, settings: Any) -> Any:
        folder = settings.get("code") if isinstance(settings, dict) else None
        if isinstance(folder, str) and os.path.isdir(folder):
            use_code_folder(folder)
        return settings

    @field_validator("code", mode="before")
    @classmethod
    def _notes_code(cls, folder: Any) -> Any:
        used = used_code_folder()
        return str(used) if folder is None and used is not None else folder

    @property
    def on_policy(self) -> bool:
        """Whether the objective may only be given trajectories of the newest policy."""
        return self.objective.loss in ("ppo", "grpo")

    @property
    def expert_plays(self) -> bool:
        """Whether the expert, not the policy, makes the training trajectories."""
        return self.objective.loss == "sft"

    @property
    def only_recorded(self) -> bool:
        """Whether nobody plays: the training trajectories are those of a set."""
        return self.expert_plays and self.rollout.demonstrations is not None

    @property
    def mismatch_limits(self) -> MismatchLimits:
        """How far sampler and learner may be apart at start: as set, otherwise as the precision lets them be."""
        own, load_in = self.sampler, self.policy.load_in
        usual = MISMATCH_LIMITS[self.policy.dtype] if load_in is None else QUANTIZED_LIMITS[load_in]
        return MismatchLimits(
            usual.mean if own.mismatch_mean_tolerance is None else own.mismatch_mean_tolerance,
            usual.high if own.mismatch_tolerance is None else own.mismatch_tolerance,
        )

    @property
    def replay(self) -> BufferSettings:
        """The buffer's settings as the objective lets them be: nothing is replayed on-policy."""
        if not self.on_policy:
            return self.buffer
        return self.buffer.model_copy(update={"newest_share": 1.0, "max_staleness": 0})

    @property
    def optimization(self) -> LearnerSettings:
        """The learner's settings as the objective lets them be: policy gradients have a rate of their own."""
        if not self.on_policy:
            return self.learner
        peak = self.objective.policy_gradient.learning_rate
        final = self.learner.final_learning_rate * peak / self.learner.learning_rate
        return self.learner.model_copy(update={"learning_rate": peak, "final_learning_rate": final})

    @property
    def checkpoint_every(self) -> int:
        """Learner steps per checkpoint, as the objective lets them be.

        A learner takes the steps since its checkpoint again, on-policy with what was played for them: that is of its
        own policy for one step, and of policies that are undone for more.
        """
        return 1 if self.on_policy else self.learner.checkpoint_every

    @property
    def environment_processes(self) -> int:
        """Processes of each rollout worker that hold its environments."""
        wanted = self.rollout.environment_processes
        if wanted is not None:
            return wanted
        return 1 if self.task.in_own_process else 0

    @property
    def groups_per_batch(self) -> int:
        """Groups in a learner's batch: without replay, the new ones alone."""
        return self.fresh_groups_per_step if self.on_policy else self.learner.groups_per_batch

    @property
    def fresh_groups_per_step(self) -> int:
        """New groups that one learner step consumes; the rest of its batch is replayed."""
        return max(1, self.buffer.newest_of(self.learner.groups_per_batch))

    @property
    def fresh_per_step(self) -> int:
        """New trajectories that one learner step consumes."""
        return self.fresh_groups_per_step * self.rollout.group_size

    def evaluation_is_due(self, step: int) -> bool:
        """Whether the policy after a learner step is evaluated."""
        return step % self.evaluation.every == 0 or step == self.learner.steps

    def is_evaluated(self, step: int, *, at_start: bool = False) -> bool:
        """Whether an adapter published at a learner step is evaluated, then or before the next one is published.

        Args:
            step: The learner's step.
            at_start: Whether a learner that goes on from this step publishes it again: the step's own evaluation is
                of the adapter that was published when it was done.
        """
        every = self.learner.publish_every
        first = step + 1 if at_start else step
        return any(self.evaluation_is_due(later) for later in range(first, (step // every + 1) * every))

    @model_validator(mode="after")
    def _fits(self) -> "RunConfig":
        batch = self.learner.groups_per_batch * self.rollout.group_size
        if self.buffer.capacity < batch:
            raise ValueError(
                f"buffer.capacity ({self.buffer.capacity}) must hold a batch of "
                f"learner.groups_per_batch x rollout.group_size = {batch} trajectories"
            )
        loss = self.objective.loss
        if loss in ("var_tb", "grpo") and self.rollout.group_size < 2:
            raise ValueError(f"objective.loss {loss} needs rollout.group_size of at least 2 (it compares a group)")
        if self.on_policy:
            self._only_own_policy(loss)
        if self.only_recorded and self.rollout.group_size > 1:
            raise ValueError(
                "objective.loss sft with rollout.demonstrations learns from one demonstration of an instance; "
                "set rollout.group_size=1 and more learner.groups_per_batch"
            )
        if self.buffer.replay_staleness <= self.buffer.max_staleness:
            raise ValueError("buffer.replay_staleness must exceed buffer.max_staleness, or new data could be too old")
        if self.groups_per_batch < self.learner.workers:
            raise ValueError(
                "learner.groups_per_batch (ppo, grpo: times buffer.newest_share) must be at least learner.workers "
                "(each learner needs a group)"
            )
        if self.learner.sharding == "fsdp" and self.learner.workers < 2:
            raise ValueError(
                "learner.sharding fsdp divides the model among learners; set learner.workers to at least 2"
            )
        if self.policy.load_in is not None and self.learner.sharding == "fsdp":
            raise ValueError("policy.load_in does not go with learner.sharding=fsdp; choose one of them")
        if self.policy.load_in is not None and self.learner.offload:
            raise ValueError("policy.load_in does not go with learner.offload; the model is small enough to stay")
        if self.policy.max_response_tokens >= self.sampler.max_model_len:
            raise ValueError("policy.max_response_tokens must be below sampler.max_model_len")
        if self.scaling.automatic:
            self._starts_within_bounds()
        self._share_a_gpu()
        return self

    def _share_a_gpu(self) -> None:
        sampler, learner = self.sampler, self.learner
        if sampler.sleep_level == 0:
            if learner.offload:
                raise ValueError("learner.offload makes room for a sampler that wakes up; set sampler.sleep_level=1")
            return
        for name, found in (
            ("sampler.replicas", sampler.replicas),
            ("sampler.tensor_parallel_size", sampler.tensor_parallel_size),
            ("learner.workers", learner.workers),
        ):
            if found != 1:
                raise ValueError(f"sampler.sleep_level is for one sampler and one learner on one GPU; set {name}=1")
        if self.scaling.automatic:
            raise ValueError("sampler.sleep_level is for one sampler and one learner; set scaling.automatic=false")
        if sampler.gpus_per_replica + learner.gpus_per_worker > 1:
            raise ValueError(
                "sampler.sleep_level: sampler and learner share one GPU, so sampler.gpus_per_replica and "
                "learner.gpus_per_worker must not exceed 1 together (0.5 each)"
            )
        if sampler.engine == "vllm" and sampler.gpus_per_replica == 0:
            raise ValueError("sampler.sleep_level: vLLM sleeps on GPUs only, and sampler.gpus_per_replica is 0")
        if sampler.engine == "transformers" and sampler.sleep_level == 2:
            raise ValueError("sampler.sleep_level 2 is vLLM's; the engine transformers sleeps at level 1")

    def _starts_within_bounds(self) -> None:
        scaling = self.scaling
        for name, found, least, most in (
            ("rollout.workers", self.rollout.workers, scaling.min_workers, scaling.max_workers),
            ("sampler.replicas", self.sampler.replicas, scaling.min_replicas, scaling.max_replicas),
        ):
            if not least <= found <= most:
                raise ValueError(f"{name} ({found}) is outside {least} to {most}, the bounds of scaling.automatic")

    def _only_own_policy(self, loss: str) -> None:
        wanted = {
            "rollout.epsilon": (self.rollout.epsilon, 0.0),
            "rollout.expert_on_failure": (self.rollout.expert_on_failure, False),
            "rollout.demonstrations": (self.rollout.demonstrations, None),
            "sampler.temperature": (self.sampler.temperature, 1.0),
            "learner.publish_every": (self.learner.publish_every, 1),
        }
        for name, (found, needed) in wanted.items():
            if found != needed:
                value = "null" if needed is None else needed
                raise ValueError(f"objective.loss {loss} learns only from its own newest policy; set {name}={value}")
