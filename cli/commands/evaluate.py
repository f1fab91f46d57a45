"""`gflowvlm eval`: how good a run's policy is, outside the run."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gflowvlm.cli.json_file import json_option, write_json_file
from gflowvlm.envs.base import SPLITS
from gflowvlm.run.console import terminal
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.instances import EVALUATION_SEEDS
from gflowvlm.shared.trajectory import BASE_VERSION


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    @app.command(name="eval")
    def evaluate(
        run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
        split: Annotated[str, typer.Option(help="`id` (in distribution) or `ood` (out of distribution).")] = "id",
        instances: Annotated[int, typer.Option(min=1, max=100_000, help="Task instances.")] = 100,
        samples: Annotated[int, typer.Option(min=1, max=1024, help="N of Div@N: trajectories an instance.")] = 8,
        seed: Annotated[
            int,
            typer.Option(
                min=0, max=EVALUATION_SEEDS.stop - 200_000, help="Seed of the first instance; training uses others."
            ),
        ] = 20_000_033,
        temperature: Annotated[
            float, typer.Option(min=0.01, max=2.0, help="Sampling temperature; the greedy success stands beside it.")
        ] = 1.0,
        version: Annotated[
            int | None, typer.Option(min=0, help="Adapter version; 0 is the base model [default: the best].")
        ] = None,
        engine: Annotated[
            str | None, typer.Option(help="`vllm` or `transformers` [default: the run's].", show_default=False)
        ] = None,
        exact: Annotated[
            bool, typer.Option("--exact", help="Also expand the tree of action sequences and score all of it.")
        ] = False,
        exact_instances: Annotated[int, typer.Option(min=1, max=1000, help="Instances to expand.")] = 4,
        json_file: Annotated[Path | None, json_option("Write the figures to this file.")] = None,
    ) -> None:
        """Evaluate a run's best adapter: success, diversity, validity, and the match to the target R^beta / Z.

        It computes on a GPU where the run's samplers did (`sampler.gpus_per_replica`) and this machine has one,
        else on the CPU, which needs the engine `transformers` or a vLLM for CPUs.

        Beside the success stands that of the perfect sampler of the same target, and beside the total
        variation its noise floor: no policy can be expected to do better than those.

        With --exact the policy's distribution over action sequences is computed, before and after training,
        and compared with the target R^beta / Z and with what training aims at, the distribution where the
        losses have their minimum (`aim_…`; it also depends on how the chains of thought are weighted). Action
        probabilities are sums over the demonstrated chains of thought, and over sampled ones where those leave
        much out; what is still left out is `uncovered`. It takes some minutes with the default task and
        policy, and works where all action sequences can be enumerated.
        """
        if split not in SPLITS:
            raise UserError(f"--split {split!r}: there is no such split; use {' or '.join(SPLITS)}")
        if engine not in (None, "vllm", "transformers"):
            raise UserError(f"--engine {engine!r}: there is no such engine; use vllm or transformers")
        from gflowvlm.run.setup import open_run

        # A folder without a run is said before anything large is imported.
        open_run(run)
        from gflowvlm.evaluation.metrics import EvaluationPlan
        from gflowvlm.evaluation.run_evaluation import evaluate_run

        console = terminal()
        plan = EvaluationPlan(split, instances, samples, seed, temperature)
        figures = evaluate_run(run, plan, version=version, engine=engine, console=console)
        policy = "base model" if figures["version"] == BASE_VERSION else f"adapter version {figures['version']}"
        console.print(f"{run}, {policy}, {split}:", soft_wrap=True)
        table = Table("figure", "value")
        for name, value in _flat(figures).items():
            if name not in ("version", "split"):
                table.add_row(name, "-" if value is None else f"{value:.4g}")
        console.print(table)
        if exact:
            figures["exact"] = _exact_figures(
                run, int(figures["version"]), split=split, seed=seed, instances=exact_instances, console=console
            )
            _show_exact(console, figures, exact_instances)
        if json_file is not None:
            write_json_file(figures, json_file)


def _exact_figures(
    run: Path, version: int, *, split: str, seed: int, instances: int, console: Console
) -> dict[str, dict[str, float | None]] | None:
    """Returns the exact match of the base model and of a version; None where a tree is too large."""
    from gflowvlm.evaluation.exact_check import ExactCheck
    from gflowvlm.run.adapters import published_adapter
    from gflowvlm.run.setup import open_run

    folder, config = open_run(run)
    check = ExactCheck(config, split=split, seed=seed, instances=instances, console=console)
    if check.base is None:
        return None
    match = check.base if version == BASE_VERSION else check.measure(published_adapter(folder, version))
    return {"base": check.base.as_dict(), "version": match.as_dict()}


def _flat(figures: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures with those by kind of task one after the other; without them where there is one kind."""
    flat = {name: value for name, value in figures.items() if name != "success_by_category"}
    by_category = figures["success_by_category"] or {}
    return flat | {f"success, {category}": value for category, value in by_category.items()}


def _show_exact(console: Console, figures: dict[str, Any], instances: int) -> None:
    if figures["exact"] is None:
        estimate = (
            "no sampled estimate either"
            if figures["total_variation"] is None
            else f"the sampled estimate is {figures['total_variation']:.3f} "
            f"(95 % interval {figures['total_variation_low']:.3f} to {figures['total_variation_high']:.3f})"
        )
        console.print(f"the tree of action sequences is too large to be expanded; {estimate}", soft_wrap=True)
        return
    console.print(f"every action sequence, {instances} instances:")
    table = Table("exact", "base", f"version {figures['version']}")
    for name, before in figures["exact"]["base"].items():
        after = figures["exact"]["version"][name]
        table.add_row(name, *("-" if value is None else f"{value:.4g}" for value in (before, after)))
    console.print(table)
