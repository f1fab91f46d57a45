"""`gflowvlm scale`: more or fewer rollout workers and policy server replicas, while the run runs."""

from pathlib import Path
from typing import Annotated

import typer

from gflowvlm.cli.commands.submit import Address, say
from gflowvlm.run.console import terminal
from gflowvlm.shared.errors import UserError


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    @app.command()
    def scale(
        run: Annotated[
            str, typer.Argument(metavar="RUN", help="Folder of a run that is running, or the name of a submitted one.")
        ],
        changes: Annotated[
            list[str],
            typer.Argument(
                metavar="rollout.workers=N sampler.replicas=M",
                help="Rollout workers, policy server replicas, or both.",
                show_default=False,
            ),
        ],
        address: Address = None,
    ) -> None:
        """Change the number of rollout workers and of policy server replicas of a run while it runs.

        From any machine that sees the run's folder, or, for a run that `gflowvlm submit` sent, that reaches the
        cluster's dashboard. Rollout workers that leave finish their groups first, replicas their requests: nothing is
        lost. What the cluster has no room for yet starts once it has. A resumed run begins with the numbers of its
        config.yaml again.

        Examples: `gflowvlm scale runs/first rollout.workers=8`,
        `gflowvlm scale /runs/first rollout.workers=32 sampler.replicas=4`,
        `gflowvlm scale --address http://head:8265 first rollout.workers=32`.
        """
        from gflowvlm.cluster.scaling.run_scaling import describe
        from gflowvlm.cluster.scaling.scale_requests import ask, parse_request
        from gflowvlm.run.setup import open_run

        request = parse_request(changes)
        console = terminal()
        if address is not None or (Path(run).name == run and not Path(run).exists()):
            say(console, _ask_cluster(address, run, changes))
            return
        folder, _ = open_run(Path(run))
        say(console, f"{run}: {describe(ask(folder, request))}")
        say(console, "what joins or leaves does so while the run goes on; it resumes with its config.yaml's numbers")


def _ask_cluster(address: str | None, name: str, changes: list[str]) -> str:
    from gflowvlm.cluster.launch.jobs import Jobs, check_name

    check_name(name)
    try:
        jobs = Jobs(address)
        job = jobs.newest(name)
    except UserError as error:
        if address is not None:
            raise
        raise UserError(f"{name}: no folder of a run here; asked for a submitted run of that name, {error}") from None
    if job.over:
        raise UserError(f"run {name!r} is not running ({job.status})")
    return jobs.run_beside(job, "scale", changes)
