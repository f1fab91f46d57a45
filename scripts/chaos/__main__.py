"""Runs a real job on a local Ray cluster of several nodes, kills parts at random, and proves that nothing is lost."""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from chaos.killing import JobFiles, run_job
from chaos.network import own_network
from chaos.nodes import LocalCluster
from chaos.proof import prove, same_success
from chaos.records import Records, read_records
from chaos.report import as_json, as_text
from chaos.schedule import ENGINE, HEAD, NETWORK, PARTS, Kill, Part, schedule
from chaos.state_store import state_store
from gflowvlm.cli.json_file import write_json_file
from gflowvlm.cluster.launch.placement import resource_plan
from gflowvlm.run.interruption import INTERRUPTED, termination_as_interrupt
from gflowvlm.run.preset_library import resolve_config
from gflowvlm.run.setup import new_run
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError

FAILED, WRONG = 1, 2
DISTURBED, UNDISTURBED = "disturbed", "undisturbed"


def say(text: str) -> None:
    """Prints a line at once, also through a pipe."""
    print(f"chaos: {text}", flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command's options."""
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of the run, as of `gflowvlm train`")
    parser.add_argument("--preset", help="preset to start from (the default one)")
    parser.add_argument("--kills", type=_positive, default=10, help="how many kills (10)")
    parser.add_argument(
        "--only", action="append", metavar="PART", help="kill nothing but this, such as learner; may be given again"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the kills; the run has its own, seed=N (0)")
    parser.add_argument("--nodes", type=_positive, default=2, help="worker nodes beside the head (2)")
    parser.add_argument(
        "--network", action="store_true", help="give nodes network addresses of their own, and cut them off too (root)"
    )
    parser.add_argument(
        "--head",
        action="store_true",
        help="lose the head too, its state kept in Redis (redis-server); implies --network",
    )
    parser.add_argument(
        "--undisturbed", action="store_true", help="run the same without kills first (unless --out has it), and compare"
    )
    parser.add_argument("--out", type=Path, help="folder for runs and results (runs/chaos-DATE-TIME)")
    parser.add_argument(
        "--patience", type=_positive, default=900, metavar="SECONDS", help="longest time without a learner step (900)"
    )
    options = parser.parse_args(arguments)
    options.network |= options.head
    return options


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("has to be at least 1")
    return value


def configure(options: argparse.Namespace) -> RunConfig:
    """Returns the run's configuration: with room for every restart that the kills can cause."""
    restarts = f"learner.max_failures={2 * options.kills}", f"rollout.max_restarts={100 + options.kills}"
    return resolve_config(options.preset, None, ["rollout.workers=2", *restarts, *options.settings])


def run(
    config: RunConfig, out: Path, name: str, plan: Sequence[Kill], options: argparse.Namespace
) -> tuple[int, Records]:
    """Runs a job on a cluster of its own; returns its exit status and its records."""
    files, nodes = JobFiles.under(out, name), options.nodes
    # Every worker node can hold all parts: a run outlives the loss of all but one.
    cpus = math.ceil(resource_plan(config).cpus)
    say(f"{name}: starting a head and {nodes} worker nodes of {cpus} CPU slots")
    with ExitStack() as opened:
        network = opened.enter_context(own_network()) if options.network else None
        kept = None
        if network is not None and options.head:
            kept = opened.enter_context(state_store(network.connect(), out / f"{name}.redis.log"))
        cluster = opened.enter_context(LocalCluster(out, name, nodes, cpus, network, kept))
        address = {"address": cluster.address}
        new_run(config.model_copy(update={"cluster": config.cluster.model_copy(update=address)}), files.run.root)
        say(f"{name}: {config.learner.steps} learner steps; output in {files.output}")
        status = run_job(files, cluster, plan, options.patience, say)
    say(f"{name}: ended with exit status {status}")
    return status, read_records(files)


def chaos(options: argparse.Namespace) -> int:
    """Runs it all; returns 1 where a proof fails, else 0."""
    config = configure(options)
    parts = parts_of(options, config.sampler.engine)
    if config.learner.steps < 3:
        raise UserError("learner.steps: a run of fewer than 3 leaves no time for kills")
    plan = schedule(options.seed, options.kills, config.learner.steps, parts)
    out = options.out if options.out is not None else Path("runs") / f"chaos-{time.strftime('%Y%m%d-%H%M%S')}"
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    other = None
    if options.undisturbed:
        before = JobFiles.under(out, UNDISTURBED)
        if before.run.summary.exists():
            say(f"undisturbed: taken from {before.run.root}")
            other = read_records(before)
        else:
            _, other = run(config, out, UNDISTURBED, [], options)
    status, records = run(config, out, DISTURBED, plan, options)
    checks = prove(records, options.kills, status)
    if other is not None:
        checks.append(same_success(records, other))
    found = as_json(_setting(options, config), checks, records, other)
    write_json_file(found, out / "chaos.json")
    text = as_text(found)
    (out / "chaos.md").write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)
    say(f"wrote {out}/chaos.md and chaos.json")
    return 0 if found["holds"] else FAILED


def parts_of(options: argparse.Namespace, engine: str) -> tuple[Part, ...]:
    """Returns what can be killed in such a run, and is wanted to be."""
    parts = list(PARTS)
    if options.network:
        parts.append(NETWORK)
    if options.head:
        parts.append(HEAD)
    if engine != "vllm":
        parts.remove(ENGINE)
    names = [part.name for part in parts]
    for name in options.only or []:
        if name not in names:
            raise UserError(
                f"--only {name!r}: there are {', '.join(names)}; head and network have options of their own"
            )
    return tuple(part for part in parts if not options.only or part.name in options.only)


def _setting(options: argparse.Namespace, config: RunConfig) -> dict[str, Any]:
    return {
        "preset": config.name,
        "run seed": config.seed,
        "learner steps": config.learner.steps,
        "engine": config.sampler.engine,
        "kills": options.kills,
        "kill seed": options.seed,
        "worker nodes": options.nodes,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 where a proof fails, 2 with a message, 130 after Ctrl-C."""
    options = parse(arguments)
    try:
        with termination_as_interrupt():
            return chaos(options)
    except UserError as error:
        print(f"chaos: {error}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        say("interrupted; all processes are gone")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
