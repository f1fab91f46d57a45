"""`gflowvlm play`: watch a task being played, or play it."""

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from gflowvlm.cli.json_file import json_option, write_json_file
from gflowvlm.envs.base import TaskEnv
from gflowvlm.evaluation.playing import (
    Episode,
    ExpertPlayer,
    Move,
    Player,
    RandomPlayer,
    named_policy,
    play_episodes,
    policy_player,
    task_env,
    write_picture,
)
from gflowvlm.run.console import printable, terminal
from gflowvlm.shared.config_io import override_task
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.response import DONE_TOKEN
from gflowvlm.shared.task_settings import default_settings, task_names

LISTED_EPISODES = 20
PICTURE_COLUMNS = 64


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    @app.command()
    def play(
        task: Annotated[str, typer.Argument(help=f"The task: {', '.join(task_names())}.")],
        task_settings: Annotated[
            list[str] | None,
            typer.Argument(
                metavar="[KEY=VALUE]...",
                help="Settings of the task, as in `image_size=256`; a run's own are kept where none is given.",
                show_default=False,
            ),
        ] = None,
        *,
        player: Annotated[
            str,
            typer.Option(
                help="Who plays: `human` (you), `expert` (the task's own), `random` (admissible actions), the folder "
                "of a run (its best adapter) or of a model, or a shipped model such as `numberline-tiny`."
            ),
        ] = "human",
        episodes: Annotated[int, typer.Option(min=1, help="How many episodes.")] = 1,
        split: Annotated[
            str, typer.Option(help="`id` (as in training) or `ood` (larger numbers than training has, other decks).")
        ] = "id",
        seed: Annotated[
            int, typer.Option(min=0, max=2**31, help="Instance of the first episode; the others count on from it.")
        ] = 0,
        json_file: Annotated[
            Path | None,
            json_option("Write instance, success, actions, rewards and steps here."),
        ] = None,
        images: Annotated[
            Path | None, typer.Option(help="Write every state's picture into this folder (PNG).", file_okay=False)
        ] = None,
    ) -> None:
        """Play a task in the terminal: by hand, by the expert, at random, or by a policy.

        A player sees what a policy sees, a picture and a text, and answers with one action a step. `[DONE]`
        stops; what counts is where it stands then. The same seed is the same instance, always.

        See what the task is: `gflowvlm play numberline`

        See what a run has learned: `gflowvlm play numberline --player RUN --episodes 5`

        Numbers that training does not play: `gflowvlm play numberline --player RUN --split ood`

        One kind of household task: `gflowvlm play alfworld 'task_types=[pick_heat_then_place_in_recep]'`
        """
        console = terminal()
        with _env_and_player(task, task_settings or [], player, split, console) as (env, chosen):
            by_hand = isinstance(chosen, HumanPlayer)
            if images is None and by_hand:
                images = Path(tempfile.mkdtemp(prefix="gflowvlm-play-"))
            screen = _Screen(console, images, every_prompt=by_hand)
            finished = []
            seeds = range(seed, seed + episodes)
            for episode in play_episodes(env, chosen, split, seeds, screen.show_state, screen.show_move):
                finished.append(episode)
        console.print(_summary(finished))
        if json_file is not None:
            write_json_file([asdict(episode) for episode in finished], json_file)
            console.print(f"Every episode: {json_file}", soft_wrap=True)
        if images is not None:
            console.print(f"Pictures: {images}", soft_wrap=True)


class HumanPlayer:
    """Asks at the terminal until the answer is admissible."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def act(self, env: TaskEnv) -> Move:
        """Returns the typed action; raises EOFError when the person stops (Ctrl-D or Ctrl-C)."""
        actions = env.admissible_actions
        # Commands of several words are long to type: their numbers do as well.
        numbered = {str(n): a for n, a in enumerate(actions, 1)} if any(" " in a for a in actions) else {}
        asked = " ".join(actions)
        if numbered:
            self._console.print(Text("\n".join(f"{n:>3} {action}" for n, action in numbered.items())))
            asked = "or its number"
        while True:
            try:
                typed = self._console.input(Text(f"Your action, {asked} (Ctrl-D ends): ")).strip()
            except (EOFError, KeyboardInterrupt):
                self._console.print()
                raise EOFError from None
            action = numbered.get(typed, DONE_TOKEN if typed.lower() == "done" else typed)
            if action in actions:
                return Move(action)
            self._console.print(Text(f"{printable(typed)!r} is not possible here."))


class _Screen:
    """Shows states and moves as they happen, and keeps the pictures."""

    def __init__(self, console: Console, images: Path | None, every_prompt: bool) -> None:
        self._console = console
        self._images = images
        self._every_prompt = every_prompt

    def show_state(self, number: int, env: TaskEnv) -> None:
        """Shows a new state; the first of an episode under the episode's name."""
        first = len(env.past_actions) == 0
        if first:
            self._console.rule(Text(f"episode {number}: {env.instance_id}"))
        if self._console.is_terminal:
            self._console.print(half_blocks(env, min(PICTURE_COLUMNS, self._console.width)))
        if self._images is not None:
            path = write_picture(env, number, self._images)
            self._console.print(Text(str(path), style="dim"), soft_wrap=True)
        if first or (self._every_prompt and env.end is None):
            self._console.print(Text(env.prompt(), style="dim"), soft_wrap=True)

    def show_move(self, env: TaskEnv, move: Move) -> None:
        """Shows a move and, after the last one, how the episode ended."""
        shown = move.response if move.response != "" else str(move.action)
        self._console.print(Text(f"-> {printable(shown)}", style="bold"))
        if env.end is not None:
            word = "solved" if env.success else "not solved"
            self._console.print(
                Text(f"{word}: {env.outcome} ({env.end.value})", style="green" if env.success else "red")
            )


def half_blocks(env: TaskEnv, columns: int) -> Text:
    """Returns the picture as characters: each upper-half block is two pixels, one above the other."""
    picture = env.picture().resize((columns, columns + columns % 2))
    text = Text(no_wrap=True)
    for y in range(0, picture.height, 2):
        for x in range(columns):
            upper, lower = (_hex(picture.getpixel((x, row))) for row in (y, y + 1))
            text.append("▀", Style(color=upper, bgcolor=lower))
        text.append("\n")
    return text


@contextmanager
def _env_and_player(
    task: str, task_settings: list[str], player: str, split: str, console: Console
) -> Iterator[tuple[TaskEnv, Player]]:
    built_in: dict[str, Player] = {
        "human": HumanPlayer(console),
        "expert": ExpertPlayer(),
        "random": RandomPlayer(),
    }
    if player in built_in:
        yield task_env(override_task(default_settings(task), task_settings), split), built_in[player]
        return
    policy = named_policy(player, task)
    env = task_env(override_task(policy.config.task, task_settings), split)
    which = "base model" if policy.adapter is None else f"adapter version {policy.version}"
    with policy_player(policy) as chosen:
        console.print(Text(f"Playing {policy.config.policy.model}, {which}, by transformers."), soft_wrap=True)
        yield env, chosen


def _summary(episodes: list[Episode]) -> Table | Text:
    if len(episodes) == 0:
        return Text("No episode was finished.")
    table = Table("instance", "success", "end", "steps", "reward", "actions")
    for episode in episodes[:LISTED_EPISODES]:
        shown = ["(malformed)" if action is None else printable(action) for action in episode.actions]
        actions = (", " if any(" " in action for action in shown) else " ").join(shown)
        table.add_row(
            episode.instance,
            "yes" if episode.success else "no",
            episode.end.value,
            str(episode.steps),
            f"{sum(episode.rewards):g}",
            Text(actions),
        )
    successes = sum(episode.success for episode in episodes)
    ends = ", ".join(f"{count} {end.value}" for end, count in Counter(e.end for e in episodes).most_common())
    steps = sum(episode.steps for episode in episodes) / len(episodes)
    more = len(episodes) - LISTED_EPISODES
    solved = f"{successes} of {len(episodes)} solved ({successes / len(episodes):.0%}), {steps:.1f} steps each; {ends}"
    table.caption = f"{more} more, not listed. {solved}" if more > 0 else solved
    return table


def _hex(pixel: object) -> str:
    if not isinstance(pixel, tuple):
        raise UserError("the task's picture is not in colour (RGB)")
    return "#{:02x}{:02x}{:02x}".format(*pixel)
