"""`gflowvlm train --dry-run`: what a run asks for, beside what the cluster has."""

from rich.console import Console
from rich.table import Table

from gflowvlm.cluster.launch.placement import (
    BUFFER,
    NODE_ID_LABEL,
    STORE,
    Node,
    ResourcePlan,
    amounts,
    lacking,
    resource_plan,
    selectors,
)
from gflowvlm.cluster.launch.ray_runtime import cluster_nodes, ray_cluster
from gflowvlm.shared.config import RunConfig

_SHOWN_APART = ("CPU", "GPU", "memory", "object_store_memory")


def dry_run(console: Console, config: RunConfig) -> bool:
    """Prints the run's plan and, where ``cluster.address`` names a cluster, what that lacks for it.

    Returns:
        Whether the run could start now, other jobs aside; True without a cluster.
    """
    plan = resource_plan(config)
    _show_plan(console, config, plan)
    if config.cluster.address is None:
        return True
    with ray_cluster(config):
        nodes = cluster_nodes()
    _show_nodes(console, nodes)
    lacks = lacking(plan, nodes)
    for lack in lacks:
        later = "lacking" if lack.stops else "start later"
        console.print(f"{later}: {lack.describe()}", highlight=False, soft_wrap=True)
    if not lacks:
        console.print("the cluster has room for all of it, other jobs aside")
    stops = any(lack.stops for lack in lacks)
    if stops:
        limit = config.cluster.wait_for_resources_s
        console.print(f"a run would wait {limit:g} s (cluster.wait_for_resources_s) for what is lacking, then end")
    return not stops


def _show_plan(console: Console, config: RunConfig, plan: ResourcePlan) -> None:
    table = Table("part", "processes", "CPUs each", "GPUs each", "other resources each", "only on nodes with")
    for part in plan.parts:
        if part.name in (STORE, BUFFER) and not (part.resources or part.labels):
            continue
        labels = selectors(part.labels)
        row = (str(part.count), f"{part.cpus:g}", f"{part.gpus:g}", amounts(part.resources), labels)
        table.add_row(part.name, *row)
    console.print(table)
    batch = config.groups_per_batch * config.rollout.group_size
    others = "".join(f", {amount:g} {name}" for name, amount in plan.resources().items())
    console.print(
        f"in all {plan.cpus:g} CPUs and {plan.gpus:g} GPUs{others}; "
        f"model {config.policy.model} in {config.policy.dtype}; "
        f"{batch} trajectories a batch, {config.fresh_per_step} of them new; {config.learner.steps} learner steps"
    )


def _show_nodes(console: Console, nodes: list[Node]) -> None:
    table = Table("node", "alive", "CPUs", "GPUs", "other resources", "labels")
    for node in nodes:
        others = {n: a for n, a in node.resources.items() if n not in _SHOWN_APART and not n.startswith("node:")}
        table.add_row(
            node.name,
            "yes" if node.alive else "no",
            f"{node.resources.get('CPU', 0.0):g}",
            f"{node.resources.get('GPU', 0.0):g}",
            amounts(others),
            selectors({key: value for key, value in node.labels.items() if key != NODE_ID_LABEL}),
        )
    console.print(table)
