"""The comparison with torchgfn: what is translated, averaged and reported, and, where it is installed, the whole."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gflowvlm.learner.losses import LOSSES
from gflowvlm.studies.proving.torchgfn.report import Agreement, Curve, from_curve, speed_comparisons, speed_table, write
from gflowvlm.studies.proving.torchgfn.trajectories import mean_over_transitions, to_rollouts, weigh_subtrajectories

ROOT = Path(__file__).resolve().parents[3]
VENV_PYTHON = ROOT / ".venv-torchgfn" / "bin" / "python"
needs_torchgfn = pytest.mark.skipif(
    not VENV_PYTHON.exists(), reason="needs .venv-torchgfn, which `make compare-torchgfn` makes"
)


def batch(seed: int) -> dict[str, Tensor]:
    """Random tensors of one batch, float64, with trajectories of 0 to 6 steps."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    length = torch.tensor([3, 0, 6, 1, 6])
    return {
        "log_pf": draw(5, 6),
        "log_p_stop": draw(5, 7),
        "log_reward": draw(5, 7),
        "length": length,
        "stopped": torch.ones(5, dtype=torch.bool),
        "instance": torch.zeros(5, dtype=torch.int64),
        "log_pb": draw(5, 6),
    }


def db_residual(inputs: dict[str, Tensor], k: int, i: int, j: int) -> Tensor:
    """log of R_i Π P_F P_⊤(j) / (R_j Π P_B P_⊤(i)) between states i and j of trajectory k."""
    path = (inputs["log_pf"] - inputs["log_pb"])[k, i:j].sum()
    state = inputs["log_reward"] - inputs["log_p_stop"]
    return state[k, i] + path - state[k, j]


def test_torchgfn_trajectories_become_ours_without_their_stop_actions() -> None:
    # Down, right, stop; and stop at once. Time comes first, the sink is −1, the padding action −1.
    coordinates = torch.tensor([[[0, 0], [0, 0]], [[1, 0], [-1, -1]], [[1, 1], [-1, -1]], [[-1, -1], [-1, -1]]])
    actions = torch.tensor([[0, 2], [1, -1], [2, -1]])
    rollouts = to_rollouts(coordinates, actions, torch.tensor([3, 1]), side=8)
    assert rollouts.state.tolist() == [[0, 8, 9], [0, 0, 0]]
    assert rollouts.action.tolist() == [[0, 1], [0, 0]]
    assert rollouts.length.tolist() == [2, 0]
    assert rollouts.stopped.all()


def test_mean_over_transitions_weighs_every_transition_alike() -> None:
    inputs = batch(0)
    residuals = [db_residual(inputs, k, t, t + 1) for k, n in enumerate(inputs["length"].tolist()) for t in range(n)]
    expected = torch.stack(residuals).square().mean()
    found = mean_over_transitions(lambda single: LOSSES["db"](**single).loss, inputs, stop_is_transition=False)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert not torch.isclose(LOSSES["db"](**inputs).loss, expected)


def test_mean_over_transitions_counts_the_stop_where_it_is_one() -> None:
    inputs = {**batch(1), "log_flow": torch.zeros(5, 7, dtype=torch.float64)}
    squares = []
    for k, n in enumerate(inputs["length"].tolist()):
        squares += [(inputs["log_pf"] - inputs["log_pb"])[k, t] ** 2 for t in range(n)]
        squares.append((inputs["log_p_stop"][k, n] - inputs["log_reward"][k, n]) ** 2)
    found = mean_over_transitions(lambda single: LOSSES["flow_db"](**single).loss, inputs, stop_is_transition=True)
    torch.testing.assert_close(found, torch.stack(squares).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("subtb_lambda", [0.1, 1.0, 2.0])
def test_weighed_subtrajectories_are_our_subtb(subtb_lambda: float) -> None:
    inputs = batch(2)
    longest = int(inputs["length"].max()) + 1  # With the stop action, as torchgfn counts.
    scores = []
    for k in range(1, longest + 1):
        score = torch.full((longest - k + 1, 5), math.nan, dtype=torch.float64)
        for trajectory, n in enumerate(inputs["length"].tolist()):
            for i in range(n - k + 1):
                score[i, trajectory] = db_residual(inputs, trajectory, i, i + k)
        scores.append(score)
    found = weigh_subtrajectories(scores, inputs["length"], subtb_lambda=subtb_lambda)
    expected = LOSSES["subtb"](**inputs, subtb_lambda=subtb_lambda).loss
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("in_loss", "in_gradient", "agrees"),
    [(1e-7, 1e-7, True), (0.0, None, True), (2e-6, 0.0, False), (0.0, 2e-6, False), (math.nan, 0.0, False)],
)
def test_a_difference_above_the_tolerance_or_not_a_number_is_no_agreement(
    in_loss: float, in_gradient: float | None, agrees: bool
) -> None:
    assert Agreement("tb", "TBGFlowNet", in_loss, in_gradient).agrees is agrees


FAST: Curve = [(0, 0.0, 0.8), (50, 1.0, 0.04), (100, 2.0, 0.06), (150, 3.0, 0.01)]
SLOW: Curve = [(0, 0.0, 0.8), (50, 2.0, 0.2), (100, 4.0, 0.05), (150, 6.0, 0.02)]
NEVER: Curve = [(0, 0.0, 0.8), (150, 6.0, 0.2)]


def test_a_race_counts_to_the_first_measurement_at_the_threshold() -> None:
    training = from_curve("tb", "TBGFlowNet", "ours", 0, FAST)
    assert (training.trajectories, training.seconds) == (50, 1.0)
    assert (training.total_trajectories, training.total_seconds, training.total_variation) == (150, 3.0, 0.01)
    never = from_curve("tb", "TBGFlowNet", "ours", 0, NEVER)
    assert never.seconds is None
    assert never.trajectories is None


@pytest.mark.parametrize(
    ("ours", "theirs", "ratio", "met"),
    [
        ([FAST, FAST], [SLOW, SLOW], 0.25, True),
        ([SLOW, SLOW], [FAST, FAST], 4.0, False),
        ([FAST, NEVER], [SLOW, SLOW], None, False),
        ([FAST, FAST], [SLOW, NEVER], None, True),
    ],
)
def test_the_bar_is_met_where_all_of_ours_got_there_no_later(
    ours: list[Curve], theirs: list[Curve], ratio: float | None, met: bool
) -> None:
    trainings = [from_curve("tb", "TBGFlowNet", "ours", seed, curve) for seed, curve in enumerate(ours)]
    trainings += [from_curve("tb", "TBGFlowNet", "torchgfn", seed, curve) for seed, curve in enumerate(theirs)]
    (comparison,) = speed_comparisons(trainings)
    assert comparison.ratio == ratio
    assert comparison.bar_met is met
    assert ("**NO**" in speed_table(trainings)) is not met


def test_the_report_holds_every_comparison_and_race(tmp_path: Path) -> None:
    trainings = [from_curve("tb", "TBGFlowNet", side, 0, FAST) for side in ("ours", "torchgfn")]
    agreements = [Agreement("tb", "TBGFlowNet", 1e-9, 2e-9), Agreement("db", "ModifiedDBGFlowNet", 0.5, 0.1)]
    write(tmp_path / "new", {"torch": "2.13.0"}, agreements, trainings)
    found = json.loads((tmp_path / "new" / "comparison.json").read_text())
    assert [row["agrees"] for row in found["agreement"]] == [True, False]
    assert [training["seconds"] for training in found["trainings"]] == [1.0, 1.0]
    assert found["comparisons"] == [{"loss": "tb", "ratio": 1.0, "bar_met": True}]
    page = (tmp_path / "new" / "comparison.md").read_text()
    assert page.count("**NO**") == 1
    assert "2.13.0" in page


def test_losses_and_proving_ground_need_nothing_but_torch() -> None:
    """They are imported in torchgfn's environment, which has none of our other dependencies."""
    code = (
        "import sys\n"
        "for name in ('pydantic', 'pyarrow', 'ray', 'transformers', 'peft', 'rich', 'typer', 'matplotlib', 'yaml'):\n"
        "    sys.modules[name] = None\n"
        "import gflowvlm.studies.proving.experiments, gflowvlm.studies.proving.training\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def compare(code: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in torchgfn's environment."""
    return subprocess.run(
        [VENV_PYTHON, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@needs_torchgfn
@pytest.mark.slow
def test_every_loss_agrees_with_torchgfn(tmp_path: Path) -> None:
    arguments = ["--seeds", "0", "--out", str(tmp_path)]
    done = compare(f"from gflowvlm.studies.proving.torchgfn.__main__ import main\nexit(main({arguments}))")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "comparison.json").read_text())["agreement"]
    assert {row["ours"].split(",")[0] for row in found} >= set(LOSSES)
    assert all(row["agrees"] for row in found)


@needs_torchgfn
@pytest.mark.slow
def test_a_loss_that_is_slightly_off_is_found(tmp_path: Path) -> None:
    done = compare(
        "from gflowvlm.studies.proving.torchgfn import agreement\n"
        "from gflowvlm.studies.proving.torchgfn.__main__ import main\n"
        "right = agreement.batch_loss\n"
        "def wrong(name, inputs, **others):\n"
        "    return right(name, inputs, **others) * (1.00001 if name == 'subtb' else 1)\n"
        "agreement.batch_loss = wrong\n"
        f"exit(main({['--seeds', '0', '--out', str(tmp_path)]}))\n"
    )
    assert done.returncode == 1, done.stderr
    found = json.loads((tmp_path / "comparison.json").read_text())["agreement"]
    assert [row["ours"].split(",")[0] for row in found if not row["agrees"]] == ["subtb"]
    assert "FAILED" in done.stdout
