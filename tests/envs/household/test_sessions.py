"""ALFWorld's sessions: the engines that are handed from game to game."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

MANY_AT_ONCE = """
import sys
from pathlib import Path
from gflowvlm.envs.household.games import find_games
from gflowvlm.envs.household.sessions import TextSession
from gflowvlm.envs.household.tasks import TaskType
games = find_games(Path(sys.argv[1]), "train", tuple(TaskType))
for turn in range(5):
    sessions = [TextSession(games[(turn + index) % 2]) for index in range(72)]
    print(turn)
    del sessions
"""


def test_more_games_at_once_than_most_runs_have_again_and_again_do_not_crash_the_planner(games_root: Path) -> None:
    # A process of its own: when engines above 64 were unloaded, loading the next ones ended it by a segmentation fault.
    played = subprocess.run(
        [sys.executable, "-c", MANY_AT_ONCE, str(games_root)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (played.returncode, played.stdout.split()) == (0, [str(turn) for turn in range(5)]), played.stderr
