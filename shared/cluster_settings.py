"""The sections of a run's configuration about its Ray cluster, and its size there."""

from pydantic import Field, model_validator

from gflowvlm.shared.settings import CustomResources, Fraction, NodeLabels, Settings


class ClusterSettings(Settings):
    """The Ray cluster of the run."""

    address: str | None = Field(None, description="Address of a running cluster; null starts a local one.")
    wait_for_resources_s: float = Field(
        600.0, ge=0, le=86_400, description="Longest wait for room on a running cluster before the parts are started."
    )
    control_resources: CustomResources = Field(
        {}, description="Custom resources of the adapter store, the replay buffer and a submitted driver, each."
    )
    control_node_labels: NodeLabels = Field(
        {}, description="Labels of the nodes for them; the replay buffer is always on the driver's node."
    )
    dashboard: bool = Field(True, description="Start the Ray dashboard with a local cluster.")
    dashboard_port: int | None = Field(None, ge=1024, le=65535, description="null takes the first free from 8265.")
    metrics_port: int | None = Field(None, ge=1024, le=65535, description="Prometheus port; null takes a free one.")
    object_store_mib: int = Field(256, ge=80, le=1_048_576, description="Object store of a local cluster, MiB.")


class ScalingSettings(Settings):
    """Changing the numbers of rollout workers and policy server replicas by load, while the run runs."""

    automatic: bool = Field(False, description="Change the numbers by load, within these bounds.")
    min_workers: int = Field(1, ge=1, le=4096, description="Fewest rollout workers.")
    max_workers: int = Field(8, ge=1, le=4096, description="Most rollout workers.")
    min_replicas: int = Field(1, ge=1, le=256, description="Fewest policy server replicas.")
    max_replicas: int = Field(2, ge=1, le=256, description="Most policy server replicas.")
    more_above: Fraction = Field(
        0.2, description="Share of its time that the learner waits for batches, from which on more are started."
    )
    fewer_below: Fraction = Field(0.05, description="The share up to which those that are not needed are ended.")
    patience: int = Field(
        3, ge=1, le=1000, description="Looks in a row that must agree; one after learner steps, at most every 5 s."
    )
    cooldown_s: float = Field(60.0, ge=0, le=86_400, description="Least time from one change to the next.")

    @model_validator(mode="after")
    def _ordered(self) -> "ScalingSettings":
        for few, many in (("min_workers", "max_workers"), ("min_replicas", "max_replicas")):
            if getattr(self, few) > getattr(self, many):
                raise ValueError(f"scaling.{few} must not exceed scaling.{many}")
        if self.fewer_below >= self.more_above:
            raise ValueError("scaling.fewer_below must be below scaling.more_above, or the numbers would swing")
        return self
