"""`gflowvlm jobs`, `gflowvlm logs` and `gflowvlm stop`: the runs that were sent to a Ray cluster."""

import time
from typing import Annotated

import typer
from rich.table import Table

from gflowvlm.cli.commands.submit import Address, follow
from gflowvlm.run.console import terminal

_Name = Annotated[str, typer.Argument(metavar="NAME", help="The run's name, or the id of one of its jobs.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to the application."""

    @app.command()
    def jobs(address: Address = None) -> None:
        """List the runs that `gflowvlm submit` sent to a cluster, the newest first."""
        from gflowvlm.cluster.launch.jobs import Jobs

        console, cluster_jobs = terminal(), Jobs(address)
        table = Table("run", "job", "status", "sent", "minutes", "folder")
        for job in cluster_jobs.list():
            sent = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.started))
            minutes = ((time.time() if job.ended is None else job.ended) - job.started) / 60
            table.add_row(job.run, job.id, job.status, sent, f"{minutes:.1f}", job.folder or f"(runs)/{job.run}")
        console.print(table)

    @app.command()
    def logs(name: _Name, address: Address = None) -> None:
        """Follow the log of a run on a cluster to its end; Ctrl-C ends only the following."""
        from gflowvlm.cluster.launch.jobs import Jobs

        cluster_jobs = Jobs(address)
        follow(terminal(), cluster_jobs, cluster_jobs.newest(name))

    @app.command()
    def stop(name: _Name, address: Address = None) -> None:
        """End a run on a cluster: it writes a checkpoint, and `gflowvlm submit --resume NAME` goes on with it."""
        from gflowvlm.cluster.launch.jobs import STOP_WAIT_S, Jobs

        console, cluster_jobs = terminal(), Jobs(address)
        job = cluster_jobs.newest(name)
        if job.over:
            console.print(f"{job.run} has ended already ({job.status})")
            return
        console.print(f"stopping {job.run}: it writes a checkpoint, at most {STOP_WAIT_S} s")
        job = cluster_jobs.stop(job)
        if job.status == "STOPPED":
            console.print(f"stopped; go on with: gflowvlm submit --resume {job.run}")
        else:
            console.print(f"it ended before that ({job.status})")
