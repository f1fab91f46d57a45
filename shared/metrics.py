"""Names of the run's metrics: the keys in metrics.jsonl, in TensorBoard and, prefixed, in Prometheus."""

from dataclasses import dataclass

PROMETHEUS_PREFIX = "gflowvlm_"


@dataclass(frozen=True)
class MetricSpec:
    """One metric. All of it is ASCII: Ray takes nothing else.

    Attributes:
        name: Key in metrics.jsonl; TensorBoard tag; with `PROMETHEUS_PREFIX`, the Prometheus name.
        unit: Unit of the value.
        description: What it says.
    """

    name: str
    unit: str
    description: str


STEP_METRICS = (
    MetricSpec("step", "steps", "Learner steps done."),
    MetricSpec("version", "version", "Newest published adapter version."),
    MetricSpec(
        "loss",
        "nats squared",
        "Mean over trajectories of the mean (clipped) squared residual; for the baselines their own loss.",
    ),
    MetricSpec("residual_abs_mean", "nats", "Mean absolute residual."),
    MetricSpec("residual_abs_max", "nats", "Largest absolute residual."),
    MetricSpec("residual_clipped_share", "share", "Share of residuals beyond residual_clip."),
    MetricSpec("trajectories_used", "trajectories", "Trajectories of the batch with a residual."),
    MetricSpec("trajectories_dropped", "trajectories", "Trajectories of the batch without any residual."),
    MetricSpec(
        "trajectories_without_flow",
        "trajectories",
        "Among those dropped: the first response is malformed, and so is that of its whole group (db, subtb).",
    ),
    MetricSpec("groups", "groups", "Instances of the batch with two or more complete trajectories (var_tb)."),
    MetricSpec("groups_of_one", "groups", "Instances with a single one, which teaches nothing (var_tb)."),
    MetricSpec("log_z", "nats", "Mean log Z of the batch's instances (tb, var_tb and the flow losses)."),
    MetricSpec("reward_mean", "reward", "Mean sum of a trajectory's rewards (ppo, grpo)."),
    MetricSpec("policy_loss", "loss", "Clipped surrogate, in the last epoch (ppo, grpo)."),
    MetricSpec("ratio_mean", "ratio", "Mean probability ratio of a response, in the last epoch (ppo, grpo)."),
    MetricSpec("ratio_clipped_share", "share", "Responses whose probability ratio is beyond the clip (ppo, grpo)."),
    MetricSpec("approximate_kl", "nats", "How far the epochs moved the policy from the one that sampled (ppo, grpo)."),
    MetricSpec("value_loss", "reward unit squared", "Half the mean squared error of the value (ppo)."),
    MetricSpec("value_mean", "reward unit", "Mean value of the batch's states (ppo)."),
    MetricSpec("return_mean", "reward unit", "Mean return that the value is fitted to (ppo)."),
    MetricSpec("token_log_prob", "nats", "Mean log-probability of the expert's tokens (sft)."),
    MetricSpec("grad_norm", "norm", "Gradient norm of the adapter before clipping."),
    MetricSpec("head_grad_norm", "norm", "Gradient norm of the log Z, flow or value head before clipping."),
    MetricSpec("lr", "rate", "Learning rate of the step."),
    MetricSpec("updated", "flag", "1 where the step changed the adapter; 0 without a signal or a finite gradient."),
    MetricSpec("skipped_updates", "steps", "Steps skipped because of a non-finite gradient, so far."),
    MetricSpec(
        "steps_without_signal",
        "steps",
        "Batches without a residual or an advantage, so far: they move neither adapter, momentum nor schedule.",
    ),
    MetricSpec("log_pf_mean", "nats", "Mean log P_F of a transition under the learner."),
    MetricSpec("trajectories", "trajectories", "Trajectories in the batch."),
    MetricSpec("responses", "responses", "Responses in the batch."),
    MetricSpec("response_tokens_scored", "tokens", "Response tokens in the batch."),
    MetricSpec("micro_batches", "passes", "Forward passes that the batch was cut into by the token budget."),
    MetricSpec("mismatch_mean", "nats", "Mean |sampler - learner| log-probability per token of the batch."),
    MetricSpec("mismatch_max", "nats", "Largest |sampler - learner| log-probability of a token of the batch."),
    MetricSpec("mismatch_share", "share", "Response tokens of the batch that have a sampler's log-probability."),
    MetricSpec("staleness_mean", "versions", "Mean age of the batch's policy versions."),
    MetricSpec("staleness_max", "versions", "Largest age of the batch's policy versions."),
    MetricSpec("batch_success", "share", "Successful trajectories in the batch (replayed ones included)."),
    MetricSpec("wait_s", "seconds", "Time the learner waited for the batch."),
    MetricSpec("step_s", "seconds", "Time of the whole learner step, wait included."),
    MetricSpec("seconds_reference", "seconds", "Of the step: scoring chains of thought without the adapter."),
    MetricSpec("seconds_scoring", "seconds", "Of the step: scoring the batch's responses, in all epochs."),
    MetricSpec("seconds_loss", "seconds", "Of the step: the loss and its gradient in the scores."),
    MetricSpec("seconds_backward", "seconds", "Of the step: backward passes and the optimiser."),
    MetricSpec("publish_s", "seconds", "Time to write and publish the adapter."),
    MetricSpec(
        "sampler_sleep_s",
        "seconds",
        "Time in which the sampler went to sleep and woke up, on one GPU (sampler.sleep_level).",
    ),
)

ROLLOUT_METRICS = (
    MetricSpec("rollout_success", "share", "Success of the newest rollouts (last 128 trajectories)."),
    MetricSpec("rollout_invalid", "share", "Newest trajectories ended by an invalid response."),
    MetricSpec("rollout_cut", "share", "Newest trajectories cut off by a limit of tokens."),
    MetricSpec("rollout_length", "transitions", "Mean length of the newest trajectories."),
    MetricSpec("env_steps", "steps", "Environment steps played for training in total."),
    MetricSpec("response_tokens", "tokens", "Response tokens sampled for training in total."),
    MetricSpec("accepted", "trajectories", "Trajectories the replay buffer has acknowledged in total."),
    MetricSpec("buffer_size", "trajectories", "Trajectories in the replay buffer now."),
    MetricSpec("groups_running", "groups", "Groups being played now."),
    MetricSpec("groups_failed", "groups", "Groups that failed and were played again, in total."),
    MetricSpec("groups_set_aside", "groups", "Groups given up after failing again and again while others did not."),
    MetricSpec(
        "responses_cut",
        "trajectories",
        "Trajectories cut off by a limit on the response: policy.max_response_tokens, or what the prompt left.",
    ),
    MetricSpec(
        "prompts_too_long", "trajectories", "Trajectories cut off by a prompt beyond sampler.max_model_len, in total."
    ),
    MetricSpec(
        "responses_unexplored",
        "responses",
        "Responses whose action rollout.epsilon was to replace, and the tokenizer has no tokens for another one there.",
    ),
    MetricSpec("worker_restarts", "restarts", "Rollout worker restarts in total."),
    MetricSpec("rollout_workers", "workers", "Rollout workers in service now."),
    MetricSpec(
        "rollout_workers_wanted",
        "workers",
        "Rollout workers wanted: `rollout.workers` or as scaled.",
    ),
    MetricSpec("sampler_replicas", "replicas", "Policy server replicas that answer now."),
    MetricSpec(
        "sampler_replicas_wanted",
        "replicas",
        "Policy server replicas wanted: `sampler.replicas` or as scaled.",
    ),
    MetricSpec("sampler_requests", "requests", "Requests at the policy server's replicas now, waiting ones included."),
    MetricSpec("memory_gib", "GiB", "Memory of all processes of the run, shared pages once (local cluster only)."),
    MetricSpec("sampler_idle_share", "share", "Share of the last seconds without a request in flight."),
    MetricSpec("tokens_per_s", "tokens/s", "Response tokens per second since the start of training."),
)

EVALUATION_METRICS = (
    MetricSpec("success", "share", "Success at temperature 1."),
    MetricSpec("success_greedy", "share", "Success of the greedy policy."),
    MetricSpec("success_bound", "share", "Success of the perfect sampler of the same target R^beta / Z."),
    MetricSpec("div_at_n", "trajectories", "Div@N: distinct successful trajectories per solved instance."),
    MetricSpec("malformed_rate", "share", "Responses that could not be read, of those that no limit cut off."),
    MetricSpec("inadmissible_rate", "share", "Responses with an inadmissible action."),
    MetricSpec("cut_rate", "share", "Trajectories cut off by a limit of tokens."),
    MetricSpec("mean_response_tokens", "tokens", "Mean length of a response that no limit cut off."),
    MetricSpec("total_variation", "distance", "Total variation of sampled final outcomes to R^beta / Z, mean."),
    MetricSpec("total_variation_low", "distance", "Lower end of its 95 % interval (bootstrap over instances)."),
    MetricSpec("total_variation_high", "distance", "Upper end of its 95 % interval."),
    MetricSpec("total_variation_floor", "distance", "The same for as many draws from R^beta / Z itself."),
)

ALL_METRICS = STEP_METRICS + ROLLOUT_METRICS + EVALUATION_METRICS
