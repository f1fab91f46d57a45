"""state.json: what a resumed run must know besides its newest checkpoint and its trajectories.

Written whole by the driver. A step at which an evaluation is due stands in it before the learner writes that step's
checkpoint (the learner's report is answered only then), so that whatever checkpoint a run goes on from, the evaluations
up to it are known.
"""

from typing import Annotated

from pydantic import Field, ValidationError

from gflowvlm.run.folder import RunFolder
from gflowvlm.run.log import Row, read_rows
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.files import write_whole
from gflowvlm.shared.settings import Settings

Count = Annotated[int, Field(ge=0)]


class SavedState(Settings):
    """What a run goes on with.

    Attributes:
        env_steps: Environment steps played for training.
        response_tokens: Response tokens sampled for training.
        due: Adapter version by learner step, of evaluations that are due and not finished.
        evaluated: Learner steps whose evaluation is finished.
        best: The evaluation of the best adapter, for the case that `best.json` is lost; None before the first.
    """

    env_steps: Count = 0
    response_tokens: Count = 0
    due: dict[Count, Count] = Field(default_factory=dict)
    evaluated: frozenset[Count] = frozenset()
    best: Row | None = None


def load_state(folder: RunFolder) -> SavedState:
    """Returns the saved state of a run, that of a new one where nothing is saved.

    Raises:
        UserError: The file is damaged.
    """
    try:
        text = folder.state.read_text(encoding="utf-8")
    except FileNotFoundError:
        return _state_of_older_release(folder)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder.state}: cannot be read ({error})") from None
    try:
        return SavedState.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise UserError(
            f"{folder.state}: damaged ({where}: {problem['msg']}); remove it, and the run goes on with what its "
            "metrics.jsonl tells"
        ) from None


def save_state(folder: RunFolder, state: SavedState) -> None:
    """Saves a run's state; it outlasts a loss of power from then on.

    Raises:
        UserError: It cannot be written.
    """
    try:
        write_whole(folder.state, state.model_dump_json(), durable=True)
    except OSError as error:
        raise UserError(
            f"{folder.state}: cannot be written ({error.strerror or error}); free some space, then resume"
        ) from None


def _state_of_older_release(folder: RunFolder) -> SavedState:
    """Returns what the record of a run tells that was begun before there was a state file; read once, then saved.

    Steps are taken as due whether or not their evaluation was asked for: the driver leaves out those that are not.
    """
    rows = read_rows(folder.metrics)
    played = [row for row in rows if row["kind"] == "rollout"]
    evaluated = frozenset(row["step"] for row in rows if row["kind"] == "evaluation")
    return SavedState(
        env_steps=int(played[-1].get("env_steps", 0)) if played else 0,
        response_tokens=int(played[-1].get("response_tokens", 0)) if played else 0,
        due={r["step"]: r["version"] for r in rows if r["kind"] == "step" and r["step"] not in evaluated},
        evaluated=evaluated,
    )
