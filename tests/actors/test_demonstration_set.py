"""Sets of demonstrations: what is read of them, and what is refused."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gflowvlm.actors.demonstration_set import MANIFEST, DemonstrationSet
from gflowvlm.actors.episode import as_member
from gflowvlm.learner.tiny_policy import build_processor
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.response import DONE_TOKEN
from gflowvlm.shared.trajectory import Trajectory, to_record_batch, write_parquet
from tests.actors.made_demonstrations import copied, damage, files, make_set, rewrite, stored, truncate
from tests.actors.made_trajectories import make_trajectory
from tests.shared.json_answers import parse_response


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> DemonstrationSet:
    return make_set(tmp_path_factory.mktemp("sets") / "numberline")


@pytest.fixture
def folder(made: DemonstrationSet, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return copied(made, tmp_path / "copy")


def test_every_instance_is_found_with_its_demonstration(made: DemonstrationSet) -> None:
    assert made.instance_seeds == list(range(2**31, 2**31 + 6))
    found = [made.find(seed) for seed in made.instance_seeds]
    assert [t.instance_seed for t in found] == made.instance_seeds
    # Their log-probabilities are NaN, which equals nothing.
    assert repr(list(made.trajectories())) == repr(found)
    assert all(t.expert and t.success and t.actions[-1] == DONE_TOKEN for t in found)
    with pytest.raises(KeyError):
        made.find(7)


def test_a_member_of_a_group_is_the_same_demonstration_in_other_tokens(made: DemonstrationSet) -> None:
    inputs = PolicyInputs("other", build_processor())
    original = made.find(2**31 + 1)
    member = as_member(original, "g00000003-0a", inputs)
    assert (member.group_id, member.expert) == ("g00000003-0a", True)
    assert member.trajectory_id.startswith("g00000003-0a")
    for step, before in zip(member.steps, original.steps, strict=True):
        assert step.response_text == before.response_text
        assert step.response_ids != before.response_ids
        assert step.response_ids == inputs.encode_response(before.response_text)
        assert inputs.read(step.response_ids).parsed.action == step.action
        assert step.stop_ids[-1] == inputs.done_id
        assert len(step.sampler_log_probs) == len(step.response_ids)
        assert all(map(math.isnan, step.sampler_log_probs))
    unchanged = ("instance_seed", "images", "log_rewards", "original_rewards", "end", "success", "outcome")
    assert all(getattr(member, name) == getattr(original, name) for name in unchanged)
    assert to_record_batch([member]).num_rows == 1


def test_a_tokenizer_that_loses_the_action_is_refused(made: DemonstrationSet) -> None:
    class Lossy(PolicyInputs):
        def encode_if_possible(self, text: str) -> None:
            return None

    with pytest.raises(UserError, match=r"no tokens that give .* back"):
        as_member(made.find(2**31), "g00000003-0a", Lossy("lossy", build_processor()))


def test_a_run_is_given_the_set_that_it_names(made: DemonstrationSet) -> None:
    assert DemonstrationSet.of_run(RunConfig()) is None
    named = DemonstrationSet.of_run(RunConfig.model_validate({"rollout": {"demonstrations": str(made.folder)}}))
    assert named is not None
    assert named.instance_seeds == made.instance_seeds


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"name": "blackjack"}, "of task 'numberline', not of 'blackjack'"),
        ({"prompt": "markov"}, "made with prompt='history', here task.prompt is 'markov'"),
        ({"n_max": 7}, "made with n_max=5, here task.n_max is 7"),
    ],
)
def test_demonstrations_of_another_task_are_refused(
    task: dict[str, object], message: str, made: DemonstrationSet
) -> None:
    with pytest.raises(UserError, match=message):
        DemonstrationSet.of_run(
            RunConfig.model_validate({"task": task, "rollout": {"demonstrations": str(made.folder)}})
        )


def test_training_refuses_demonstrations_out_of_distribution(tmp_path: Path) -> None:
    made = make_set(tmp_path / "ood", split="ood", trajectories=1)
    with pytest.raises(UserError, match="split ood"):
        DemonstrationSet.of_run(RunConfig.model_validate({"rollout": {"demonstrations": str(made.folder)}}))


# What is not a set


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no demonstrations there .*gflowvlm demonstrate TASK"):
        DemonstrationSet(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"request": {"task": {"name": "chess"}}}', '{"request": {"task": {}}, "more": 1}']
)
def test_a_manifest_that_tells_of_no_set_is_named(text: str, folder: Path) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=r"demonstrations\.json: tells of no demonstrations") as refusal:
        DemonstrationSet(folder)
    assert "\n" not in str(refusal.value)


def test_a_set_that_is_being_made_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "figures": None}))
    with pytest.raises(UserError, match="not finished"):
        DemonstrationSet(folder)


def test_missing_files_are_noticed(folder: Path) -> None:
    files(folder)[0].unlink()
    with pytest.raises(UserError, match=r"demonstrations of 0 instances, its demonstrations\.json tells of 6"):
        DemonstrationSet(folder)
    (folder / "trajectories").rmdir()
    with pytest.raises(UserError, match="its trajectories cannot be read"):
        DemonstrationSet(folder)


def test_a_truncated_file_is_named(folder: Path) -> None:
    truncate(files(folder)[0])
    with pytest.raises(UserError, match=r"00000000\.parquet: not a readable trajectory file"):
        DemonstrationSet(folder)


def test_a_file_of_another_schema_is_named(folder: Path) -> None:
    pq.write_table(pa.table({"instance_seed": list(range(2**31, 2**31 + 6))}), files(folder)[0])
    with pytest.raises(UserError, match=r"00000000\.parquet: not in the trajectory schema"):
        DemonstrationSet(folder)


def test_data_damaged_inside_a_file_is_named_when_it_is_read(folder: Path) -> None:
    damage(files(folder)[0])
    with pytest.raises(UserError, match=r"00000000\.parquet: "):
        list(DemonstrationSet(folder).trajectories())


def _without_pictures(t: Trajectory) -> Trajectory:
    return replace(t, images=[])


def _with_a_picture(picture: bytes) -> Callable[[Trajectory], Trajectory]:
    return lambda t: replace(t, images=[picture] * len(t.images))


WRONG: dict[str, tuple[Callable[[Trajectory], Trajectory], str]] = {
    "another task": (lambda t: replace(t, task="blackjack"), "blackjack"),
    "another split": (lambda t: replace(t, split="ood"), "ood"),
    "a policy's": (lambda t: replace(t, expert=False), "False"),
    "infinite rewards": (lambda t: replace(t, log_rewards=[math.inf] * len(t.log_rewards)), "not finite"),
    "no reward": (lambda t: replace(t, original_rewards=[math.nan] * len(t.steps)), "not finite"),
    "no picture": (_without_pictures, "a picture is missing"),
    "a negative picture": (lambda t: replace(t, steps=[replace(s, image=-1) for s in t.steps]), "is missing"),
    "no image": (_with_a_picture(b"not a picture"), "not PNG of 64 x 64"),
    "half an image": (lambda t: replace(t, images=[i[: len(i) // 2] for i in t.images]), "not PNG of 64 x 64"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_trajectories_that_the_command_never_writes_are_refused(
    change: Callable[[Trajectory], Trajectory], message: str, folder: Path
) -> None:
    first, *others = stored(folder)
    rewrite(folder, change(first), *others)
    found = DemonstrationSet(folder)
    for read in (lambda: list(found.trajectories()), lambda: found.find(first.instance_seed)):
        with pytest.raises(UserError, match=message) as refusal:
            read()
        assert "00000000.parquet: no demonstrations of this set" in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_rows_that_are_no_trajectories_are_refused(folder: Path) -> None:
    rows = to_record_batch(stored(folder)).to_pylist()
    rows[0]["end"] = "tired"
    write_parquet(pa.RecordBatch.from_pylist(rows, schema=to_record_batch([]).schema), files(folder)[0])
    with pytest.raises(UserError, match=r"'tired' is not a valid EndReason"):
        list(DemonstrationSet(folder).trajectories())


def test_a_runs_trajectories_are_no_set(tmp_path: Path) -> None:
    (tmp_path / "trajectories").mkdir()
    write_parquet([make_trajectory("t/0")], tmp_path / "trajectories" / "00000000.parquet")
    with pytest.raises(UserError, match="no demonstrations there"):
        DemonstrationSet(tmp_path)


def test_responses_are_read_as_the_episodes_had_them(made: DemonstrationSet) -> None:
    for trajectory in made.trajectories():
        assert [parse_response(step.response_text).action for step in trajectory.steps] == list(trajectory.actions)
