"""`gflowvlm scale`: more or fewer rollout workers and policy server replicas, while the run runs."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    @app.command()
    def scale(
        run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that is running.")],
        changes: Annotated[
            list[str],
            typer.Argument(
                metavar="rollouts=N samplers=M",
                help="Rollout workers, policy server replicas, or both.",
                show_default=False,
            ),
        ],
    ) -> None:
        """Change the number of rollout workers and of policy server replicas of a run while it runs.

        From any machine that sees the run's folder. Rollout workers that leave finish their groups first, replicas
        their requests: nothing is lost. What the cluster has no room for yet starts once it has. A resumed run begins
        with the numbers of its config.yaml again.

        Examples: `gflowvlm scale runs/first rollouts=8`, `gflowvlm scale /runs/first rollouts=32 samplers=4`.
        """
        from cluster.run.run_setup import open_run
        from cluster.run.scale_requests import ask, parse_request
        from cluster.run.scaling import describe

        request = parse_request(changes)
        folder, _ = open_run(run)
        console = Console()
        console.print(f"{run}: {describe(ask(folder, request))}", highlight=False, soft_wrap=True)
        console.print("what joins or leaves does so while the run goes on; it resumes with its config.yaml's numbers")
