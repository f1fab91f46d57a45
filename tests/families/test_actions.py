"""Probabilities of actions and of the stop, by the learner's own scorer, on real classes with their tokenizers."""

import pytest
import torch

from gflowvlm.envs.registry import make_env
from gflowvlm.evaluation.action_tree import TreeState, expand_tree
from gflowvlm.evaluation.exact import state_probabilities
from gflowvlm.learner.learner import Learner
from gflowvlm.learner.model import load_base_model
from gflowvlm.learner.packing import ScoredStep
from gflowvlm.learner.scoring import Scorer
from gflowvlm.learner.sft import SftSettings, load_for_sft
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.response import DONE_TOKEN
from gflowvlm.shared.task_settings import default_settings
from gflowvlm.shared.trajectory import EndReason
from gflowvlm.studies.benchmarks.workload import made_groups

CPU = torch.device("cpu")
CABINETS = ("go to cabinet 1", "go to cabinet 10", "go to cabinet", "öffne Tür 1", "öffne Tür 12", "打开柜子", "😀")
every_format = pytest.mark.parametrize("answers", ["json", "tags"])


def states(answers: str) -> list[TreeState]:
    """Returns the first states of an instance, one of them with actions that begin others."""
    env = make_env(default_settings("numberline").model_copy(update={"max_steps": 2, "answer_format": answers}))
    env.reset(seed=3)
    first = expand_tree(env)[0]
    fields, thoughts = env.reading()
    written = {a: [env.answer_format.render(a, thought, fields) for thought in thoughts] for a in CABINETS}
    return [first, TreeState((), first.prompt, first.image, written, 0.0, "", False, False)]


@pytest.mark.parametrize(
    ("name", "done_token", "answers"),
    [
        ("gemma3", False, "json"),
        ("gemma3", True, "json"),
        ("gemma3", True, "tags"),
        ("llava_next", True, "json"),
        ("llava_next", False, "tags"),
        ("qwen2_5_vl", False, "json"),
        ("qwen2_5_vl", True, "tags"),
    ],
)
def test_actions_and_stop_have_the_models_own_probabilities_and_add_up_to_one_at_most(
    name, done_token, answers, family_folder, tmp_path
):
    folder = str(family_folder(name))
    if done_token:
        network, inputs = load_for_sft(folder, SftSettings(), answers, done_token=True)
        network.save_pretrained(tmp_path)
        inputs.processor.save_pretrained(tmp_path)
        folder = str(tmp_path)
    inputs = PolicyInputs.load(folder, answers)
    assert (inputs.done_id is not None) is done_token
    scorer = Scorer(load_base_model(folder, "float32").eval(), inputs, CPU, token_budget=4000)
    for state in states(answers):
        (given,) = state_probabilities([state], [1.0], scorer, inputs, None)
        assert set(given.of) == {*state.responses, DONE_TOKEN}
        assert 0 < sum(given.of.values()) <= 1 + 1e-5
        for thought in range(len(next(iter(state.responses.values())))):
            check_behind(state, thought, scorer, inputs)


def check_behind(state: TreeState, thought: int, scorer: Scorer, inputs: PolicyInputs) -> None:
    """Checks the scores of all actions behind one chain of thought against passes of those very tokens alone."""
    response = inputs.encode_response(next(iter(state.responses.values()))[thought])
    here = inputs.read(response).layout
    mass = 0.0
    for number, action in enumerate(state.responses):
        ids = inputs.with_action(response, action)
        layout = inputs.read(ids).layout
        step = ScoredStep(state.prompt, state.image, ids, layout.cot_end, layout.action_end, layout.stop_ids)
        with torch.no_grad():
            scores = scorer.score_steps(scorer.pack([step])[0])
        kept = response[: here.cot_end]
        assert ids[: layout.cot_end] == kept
        act = alone(state, kept, ids[layout.cot_end : layout.action_end], scorer)
        assert float(scores.log_act) == pytest.approx(act, abs=2e-4)
        assert float(scores.log_stop) == pytest.approx(alone(state, kept, layout.stop_ids, scorer), abs=2e-4)
        mass += float(scores.log_act.double().exp())
        if number == 0:
            mass += float(scores.log_stop.double().exp())
    assert 0 < mass <= 1 + 1e-5


def alone(state: TreeState, kept: list[int], branch: list[int], scorer: Scorer) -> float:
    """Returns log P of some tokens behind others, nats."""
    step = ScoredStep(state.prompt, state.image, [*kept, *branch], len(kept), len(kept) + len(branch))
    with torch.no_grad():
        return float(scorer.score_steps(scorer.pack([step])[0]).log_act)


@every_format
@pytest.mark.parametrize("loss", ["db", "subtb"])
def test_a_model_as_it_is_learns_from_state_wise_losses_without_a_token_for_done(loss, answers, family_folder):
    config = RunConfig.model_validate(
        {
            "task": {"name": "numberline", "max_steps": 3, "answer_format": answers},
            "objective": {"loss": loss, "residual_clip": None},
            "rollout": {"group_size": 2},
            "learner": {"steps": 4, "warmup_steps": 0},
        }
    )
    folder = str(family_folder("gemma3"))
    inputs = PolicyInputs.load(folder, answers)
    assert inputs.done_id is None
    batch = [t for group in made_groups(config, inputs, 2) for t in group]
    steps = [step for t in batch for step in t.steps]
    assert {step.action for step in steps} == {"+", "-", DONE_TOKEN}
    assert all(len(step.stop_ids) > 1 for step in steps)
    assert any(t.end is EndReason.DONE for t in batch)
    learner = Learner(config, folder)
    first = learner.step(batch)
    assert first["updated"] == 1
    assert first["trajectories_without_flow"] == 0
    assert learner.step(batch)["loss"] < first["loss"]
