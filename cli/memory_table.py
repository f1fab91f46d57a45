"""The table of a memory plan."""

from rich.console import Console
from rich.table import Table

from gflowvlm.evaluation.memory_plan import MemoryPlan, gib


def show_memory_plan(console: Console, plan: MemoryPlan) -> None:
    """Prints a plan: a table for each device, and what does not fit."""
    console.print(
        f"memory plan, GiB (model {plan.parameters / 1e6:,.1f} M parameters, adapter "
        f"{plan.adapter_parameters / 1e6:,.2f} M):",
        highlight=False,
    )
    for device in plan.devices:
        of = "" if device.available is None else f" of {gib(device.available)}"
        table = Table(
            "process", "what for", "GiB", title=f"{device.name}: {gib(device.needed)}{of}", title_justify="left"
        )
        for phase in device.phases:
            if phase.name:
                table.add_row(f"while {phase.name}", "", gib(phase.needed), style="bold")
            for part in phase.parts:
                table.add_row(part.process, part.purpose, gib(part.bytes))
        table.columns[2].justify = "right"
        console.print(table)
        for remark in device.remarks:
            console.print(f"{device.name}: {remark}", highlight=False, soft_wrap=True)
    for problem in plan.problems:
        console.print(f"does not fit: {problem}", highlight=False, soft_wrap=True)
