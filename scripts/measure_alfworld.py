"""What ALFWorld's games cost here: CPU time of load, reset and step, and memory. docs/alfworld.md has the figures.

    python scripts/measure_alfworld.py FOLDER          this project's environment
    python scripts/measure_alfworld.py FOLDER --hosts 2  the same in worker processes: steps a second, wall time
    python scripts/measure_alfworld.py FOLDER --plain  textworld and alfworld as their documentation says

FOLDER holds `json_2.1.1`; `gflowvlm alfworld generate FOLDER` makes one.
"""

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil

from gflowvlm.actors.environment_hosts import EnvironmentHosts
from gflowvlm.envs.household.engine import GameEngine
from gflowvlm.envs.household.environment import AlfworldEnv
from gflowvlm.envs.household.games import GAME_FILE, find_games
from gflowvlm.envs.household.settings import AlfworldSettings
from gflowvlm.envs.household.tasks import TaskType

GAMES, STEPS, TOGETHER = 12, 15, 16


def cpu_ms(work: Callable[[], object]) -> float:
    """Returns the CPU time of a piece of work, milliseconds."""
    begun = time.process_time()
    work()
    return 1000 * (time.process_time() - begun)


def tell(what: str, times: list[float]) -> None:
    """Prints the median and the largest of some times."""
    print(f"{what:38} median {statistics.median(times):6.1f}  max {max(times):6.1f} ms CPU")


def resident_mb() -> float:
    """Returns this process's memory, MB."""
    return psutil.Process().memory_info().rss / 2**20


def measure_ours(folder: Path) -> None:
    """Measures the environment that a run plays."""
    settings = AlfworldSettings(games=str(folder))
    env = AlfworldEnv(settings)
    tell("first reset (imports, pool)", [cpu_ms(lambda: env.reset(seed=0))])
    for what in ("reset of a new game", "reset of a known game"):
        tell(what, [cpu_ms(partial(env.reset, seed=seed)) for seed in range(1, GAMES + 1)])
    chooser = random.Random(0)
    steps, pictures, prompts = [], [], []
    for seed in range(GAMES):
        env.reset(seed=seed)
        for _ in range(STEPS):
            action = chooser.choice(env.admissible_actions[:-1])
            steps.append(cpu_ms(partial(env.advance, action)))
            pictures.append(cpu_ms(env.picture))
            prompts.append(cpu_ms(env.prompt))
    tell("step", steps)
    tell("picture", pictures)
    tell("prompt", prompts)
    tell("engine of one more game at a time", [cpu_ms(GameEngine) for _ in range(GAMES)])
    before = resident_mb()
    group = [AlfworldEnv(settings) for _ in range(TOGETHER)]
    for seed, member in enumerate(group):
        member.reset(seed=seed)
    print(f"memory {resident_mb():.0f} MB, of which {(resident_mb() - before) / TOGETHER:.1f} MB for each environment")

    def play() -> None:
        for _ in range(STEPS):
            for member in group:
                member.step(chooser.choice(member.admissible_actions[:-1]))

    pace = 1000 * TOGETHER * STEPS / cpu_ms(play)
    print(f"{TOGETHER} environments: {pace:.0f} steps with picture and prompt a CPU second")


async def measure_hosted(folder: Path, processes: int) -> None:
    """Measures `TOGETHER` environments in worker processes, as a rollout worker has them."""
    hosts = EnvironmentHosts(AlfworldSettings(games=str(folder)), processes)
    environments = [hosts.open(number) for number in range(TOGETHER)]

    async def play(number: int) -> None:
        chooser = random.Random(number)
        view = await environments[number].start(number, "id", [number])
        for _ in range(STEPS):
            view = await environments[number].act(chooser.choice(view.admissible_actions[:-1]))

    try:
        # The first time imports, and reads the games.
        for what in ("first", "again"):
            begun = time.perf_counter()
            await asyncio.gather(*(play(number) for number in range(TOGETHER)))
            pace = TOGETHER * STEPS / (time.perf_counter() - begun)
            print(f"{TOGETHER} environments, {processes} processes, {what}: {pace:.0f} steps/s with resets, wall time")
    finally:
        hosts.close()


def measure_plain(folder: Path) -> None:
    """Measures the packages without this project's engine."""
    import textworld
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredInfos

    infos = textworld.EnvInfos(won=True, admissible_commands=True, facts=True)
    chooser = random.Random(0)
    loads, resets, steps = [], [], []
    for game in find_games(folder, "train", tuple(TaskType))[:GAMES]:
        wrappers = [AlfredDemangler(shuffle=False), AlfredInfos]
        begun = time.process_time()
        env = textworld.start(str(game.folder / GAME_FILE), infos, wrappers)
        loads.append(1000 * (time.process_time() - begun))
        resets.append(cpu_ms(env.reset))
        commands = env.reset()["admissible_commands"]
        for _ in range(STEPS):
            begun = time.process_time()
            state, _, _ = env.step(chooser.choice(commands))
            steps.append(1000 * (time.process_time() - begun))
            commands = state["admissible_commands"]
    tell("load", loads)
    tell("reset", resets)
    tell("step", steps)


def main() -> None:
    """Measures what the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plain", action="store_true", help="without this project's engine")
    parser.add_argument("--hosts", type=int, help="in so many worker processes")
    arguments = parser.parse_args()
    if arguments.hosts is not None:
        asyncio.run(measure_hosted(arguments.folder, arguments.hosts))
        return
    (measure_plain if arguments.plain else measure_ours)(arguments.folder)


if __name__ == "__main__":
    main()
