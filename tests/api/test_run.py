"""`gflowvlm.Run` and `gflowvlm.Policy` on a small finished run."""

import asyncio
import io
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import gflowvlm
from gflowvlm.learner.learner import Learner
from gflowvlm.run.log import append_row
from gflowvlm.run.models import resolve_model
from gflowvlm.run.setup import new_run
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.trajectory import Validity

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(finished_run: Path) -> gflowvlm.Run:
    return gflowvlm.Run(finished_run)


def test_a_folder_without_a_run_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run there"):
        gflowvlm.Run(tmp_path)


def test_metrics_are_a_row_a_learner_step_without_what_was_undone(run: gflowvlm.Run, tmp_path: Path) -> None:
    frame = run.metrics()
    assert frame.index.tolist() == [1, 2]
    assert frame["version"].tolist() == [1, 2]
    assert (frame["loss"] > 0).all()
    assert str(frame["time"].dtype).endswith("UTC]")
    assert "kind" not in frame
    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    log = copy / "metrics.jsonl"
    append_row(log, "learner", {"step": 1, "version": 2})
    append_row(log, "step", {"step": 2, "version": 3, "loss": 7.0})
    again = gflowvlm.Run(copy).metrics()
    assert again["version"].tolist() == [1, 3]
    assert again["loss"].iloc[1] == 7.0
    assert run.metrics("rollout")["rollout_success"].between(0, 1).all()
    with pytest.raises(UserError, match="metrics 'nothing'"):
        run.metrics("nothing")  # type: ignore[arg-type]


def test_evaluations_tell_the_final_ones_apart(run: gflowvlm.Run) -> None:
    frame = run.evaluations()
    assert frame["final"].tolist() == [False] * 2 + [True] * 4
    assert frame["version"].tolist() == [0, 2, 0, 2, 0, 2]
    assert frame["split"].tolist() == ["id"] * 4 + ["ood"] * 2
    assert frame["success"].between(0, 1).all()


def test_a_run_that_has_only_begun_can_be_read(tmp_path: Path) -> None:
    new_run(gflowvlm.load_config(), tmp_path / "run")
    run = gflowvlm.Run(tmp_path / "run")
    assert not run.finished
    assert len(run.metrics()) == len(run.evaluations()) == len(run.trajectories()) == 0
    assert "loss" in run.metrics()
    assert "success" in run.evaluations()
    assert run.versions == []
    assert run.adapter() is None
    assert len(run.plot().axes) == 3
    assert "step 0 of 60, not finished" in repr(run)


def test_adapters_are_found_by_number_and_by_name(run: gflowvlm.Run) -> None:
    assert run.versions == [1, 2]
    assert run.adapter() == run.adapter("best") == run.adapter("newest") == run.adapter(2)
    assert run.adapter(0) is None
    with pytest.raises(UserError, match="adapter version 7 was never published; there are 1-2"):
        run.policy(7)
    with pytest.raises(UserError, match="version 'last'"):
        run.adapter("last")  # type: ignore[arg-type]


def test_a_score_is_what_the_sampler_had_for_its_own_trajectories(run: gflowvlm.Run) -> None:
    weight = run.config.policy.cot_weight
    for version in (0, 1):
        played = run.trajectories(version=version)
        assert len(played) == 8
        for trajectory, score in zip(played, run.policy(version).score(played), strict=True):
            assert score.trajectory_id == trajectory.trajectory_id
            for step, found in zip(trajectory.steps, score.steps, strict=True):
                assert found.token_log_probs == pytest.approx(step.sampler_log_probs, abs=1e-4)
                assert found.log_pf == pytest.approx(found.log_p_act + weight * found.log_p_cot)
                if step.validity is Validity.VALID and step.action == "[DONE]":
                    assert found.log_p_stop == pytest.approx(found.log_pf, abs=1e-5)
            assert score.log_pf == pytest.approx(sum(step.log_pf for step in score.steps))


def test_the_versions_of_a_run_score_differently(run: gflowvlm.Run) -> None:
    newest = run.trajectories().newest(3)
    before, after = (run.policy(version).score(newest) for version in (0, 2))
    assert [s.log_pf for s in before] != pytest.approx([s.log_pf for s in after], abs=1e-3)
    assert run.policy(0).score([]) == []


def test_loss_inputs_give_the_loss_that_the_learner_reports(run: gflowvlm.Run) -> None:
    first = run.trajectories(version=0)
    output = gflowvlm.losses.var_tb(
        **run.policy(0).loss_inputs(first), residual_clip=run.config.objective.residual_clip
    )
    assert float(output.loss) == pytest.approx(run.metrics().loc[1, "loss"], rel=1e-4)
    learner = Learner(run.config, resolve_model(run.config.policy.model))
    learner.step(list(first))
    second = run.trajectories(version=1)
    output = gflowvlm.losses.var_tb(
        **run.policy(1).loss_inputs(second), residual_clip=run.config.objective.residual_clip
    )
    assert float(output.loss) == pytest.approx(learner.step(list(second))["loss"], rel=1e-3)
    with pytest.raises(UserError, match="loss 'tb': its inputs are not of the policy alone"):
        run.policy(0).loss_inputs(first, "tb")  # type: ignore[arg-type]


def test_a_policy_answers_as_it_is_scored(run: gflowvlm.Run) -> None:
    seen = run.trajectories().newest(1)[0]
    prompt, picture = seen.steps[0].prompt, seen.images[0]
    with run.policy(2) as policy:
        first = policy.respond(prompt, picture, seed=3)
        assert policy.respond(prompt, Image.open(io.BytesIO(picture)), seed=3) == first
        greedy = policy.respond(prompt, picture, temperature=0)
        short = policy.respond(prompt, picture, max_tokens=1)
    assert first.version == 2
    assert first.action in ("+", "-", "[DONE]")
    assert set(first.fields) == {"current", "target"}
    assert first.log_prob == pytest.approx(math.fsum(first.log_probs))
    assert max(greedy.log_probs) <= 0
    assert len(short.token_ids) == 1
    assert short.action is None


def test_a_policy_answers_again_after_it_was_closed_and_inside_a_running_loop(run: gflowvlm.Run) -> None:
    seen = run.trajectories().newest(1)[0]
    policy = run.policy()

    async def as_in_a_notebook() -> tuple[gflowvlm.Policy, object]:
        answer = policy.respond(seen.steps[0].prompt, seen.images[0], temperature=0)
        figures = run.evaluate(instances=1, samples=1, engine="transformers")
        return answer, figures

    answer, figures = asyncio.run(as_in_a_notebook())
    assert figures["version"] == 2
    policy.close()
    assert policy.respond(seen.steps[0].prompt, seen.images[0], temperature=0) == answer
    policy.close()
    policy.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "temperature -1.0: must be from 0"),
        ({"max_tokens": 0}, "max_tokens 0: must be from 1"),
        ({"image": b"no picture"}, "image: cannot be read"),
        ({"image": "no/such/file.png"}, "image: cannot be read"),
        ({"prompt": "5 " * 5000}, "sampler.max_model_len"),
    ],
)
def test_what_cannot_be_answered_is_said_in_one_line(
    changes: dict[str, object], message: str, run: gflowvlm.Run
) -> None:
    seen = run.trajectories().newest(1)[0]
    arguments = {"prompt": seen.steps[0].prompt, "image": seen.images[0], **changes}
    with run.policy() as policy, pytest.raises(UserError, match=message):
        policy.respond(**arguments)  # type: ignore[arg-type]


def test_an_evaluation_has_the_columns_of_the_runs_own(run: gflowvlm.Run) -> None:
    figures = run.evaluate(split="ood", instances=2, samples=2, version=1, engine="transformers")
    assert (figures["version"], figures["split"], figures["instances"]) == (1, "ood", 2)
    assert set(figures.index) <= set(run.evaluations().columns)


@pytest.mark.slow
def test_an_exact_evaluation_stands_beside_the_sampled_one(run: gflowvlm.Run) -> None:
    figures = run.evaluate(instances=1, samples=1, version=0, engine="transformers", exact=True, exact_instances=1)
    assert 0 < figures["exact_total_variation"] <= 1
    assert figures["exact_total_variation"] == figures["exact_base_total_variation"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "test"}, "split 'test'"),
        ({"engine": "magic"}, "engine 'magic'"),
        ({"instances": 0}, "instances 0: must be at least 1"),
        ({"temperature": 0.0}, "temperature 0.0: must be above 0"),
        ({"seed": -1}, "seed -1: must be from 0"),
        ({"version": 9}, "adapter version 9 was never published"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused_at_once(
    changes: dict[str, object], message: str, run: gflowvlm.Run
) -> None:
    with pytest.raises(UserError, match=message):
        run.evaluate(**changes)  # type: ignore[arg-type]


def test_the_learning_curve_is_a_figure_that_a_notebook_shows(run: gflowvlm.Run) -> None:
    figure = run.plot()
    shown = figure._repr_png_()
    assert Image.open(io.BytesIO(shown)).size[0] > 1000
    assert [axes.get_title() for axes in figure.axes][:1] == ["success"]


def test_a_finished_run_is_not_resumed(run: gflowvlm.Run) -> None:
    with pytest.raises(UserError, match="this run has ended"):
        run.resume()


def test_scoring_leaves_nothing_to_differentiate(run: gflowvlm.Run) -> None:
    tensors = run.policy(0).loss_inputs(run.trajectories(version=0), "subtb")
    assert not any(t.requires_grad for t in tensors.values())
    assert tensors["log_pf"].dtype == torch.float64


def test_opening_a_run_and_its_log_needs_no_torch(run: gflowvlm.Run) -> None:
    code = (
        f"import sys, gflowvlm; run = gflowvlm.Run({str(run.path)!r}); "
        "print(len(run.metrics()), len(run.trajectories()), [m for m in ('torch', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "2 16 []", done.stderr


def test_a_policy_that_nobody_closes_ends_with_its_process(run: gflowvlm.Run) -> None:
    code = (
        f"import gflowvlm; run = gflowvlm.Run({str(run.path)!r}); seen = run.trajectories().newest(1)[0]; "
        "print(run.policy().respond(seen.steps[0].prompt, seen.images[0]).version)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "2", done.stderr
    assert "pending" not in done.stderr
