"""The sections of a run's configuration that say what is learned: the target distribution, and the objective."""

from typing import Literal

from pydantic import Field

from gflowvlm.shared.settings import Fraction, Settings

LossName = Literal["tb", "var_tb", "db", "subtb", "flow_db", "flow_subtb", "fl_db", "fl_subtb", "sft", "ppo", "grpo"]


class TargetSettings(Settings):
    """The target distribution R(x)^beta P_ref(c)^alpha."""

    reward_exponent: float = Field(8.0, ge=0.0, le=100.0, description="Beta.")
    log_reward_floor: float = Field(
        -1000.0,
        ge=-1e6,
        le=1e6,
        description="Smallest log R^beta, nats. Near the worst valid outcome's it keeps a few invalid ones "
        "from outweighing a group.",
    )
    reference_weight: Fraction = Field(0.4, description="Alpha: weight of the reference policy's log P_CoT.")
    truncation: Literal["terminal", "incomplete"] = Field(
        "terminal", description="A cut at the step limit is a forced stop, or an incomplete trajectory."
    )


class PolicyGradientSettings(Settings):
    """The baselines ppo and grpo. Epochs, discount, lambda and the value's weight are RL4VLM's."""

    learning_rate: float = Field(
        2e-4,
        gt=0,
        le=1,
        description="Peak rate of the adapter instead of learner.learning_rate; the schedule has the same shape.",
    )
    epochs: int = Field(4, ge=1, le=64, description="Updates from one batch.")
    ratio_clip: float = Field(0.2, gt=0, lt=1, description="How far the probability ratio counts, up and down.")
    discount: Fraction = Field(0.9, description="Gamma of ppo's advantages.")
    gae_lambda: Fraction = Field(0.95, description="Lambda of ppo's advantages.")
    value_weight: float = Field(0.5, ge=0, le=100, description="Weight of ppo's value loss.")
    reward: Literal["original", "revised"] = Field(
        "original",
        description="The task's own rewards, or the GFlowNet reward R(x) at the episode's end. "
        "Ppo's value is learned in units of the task's largest reward, or of 100.",
    )


class ObjectiveSettings(Settings):
    """What the learner minimises: a GFlowNet loss, or a baseline (sft, ppo, grpo)."""

    loss: LossName = Field(
        "var_tb",
        description="With ppo and grpo rollouts are strictly on-policy and a batch is its new groups alone; "
        "with sft the expert plays.",
    )
    policy_gradient: PolicyGradientSettings = PolicyGradientSettings()
    sft_done: bool = Field(True, description="Whether sft imitates the expert's stop action [DONE] too.")
    subtb_lambda: float = Field(0.9, gt=0, le=2.0, description="Lambda of subtb, flow_subtb and fl_subtb.")
    residual_clip: float | None = Field(10.0, gt=0, description="Residual beyond which the penalty is linear, nats.")
