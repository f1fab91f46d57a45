"""What speaks against training a model is found before a run, one line each."""

from pathlib import Path

import pytest

from gflowvlm.actors.samplers import make_sampler
from gflowvlm.evaluation.memory_plan import GIB, Memory
from gflowvlm.evaluation.model_check import inputs as of_inputs
from gflowvlm.evaluation.model_check import report as reports
from gflowvlm.evaluation.model_check.report import check_model, require_trainable
from gflowvlm.evaluation.model_check.states import probed_states
from gflowvlm.learner.tiny_policy import build_tiny_policy
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.findings import Status
from gflowvlm.shared.policy_inputs import PolicyInputs
from tests.actors.misbehaving import SEEDS, MisbehavingSettings

ENOUGH = Memory(main=64 * GIB)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(build_tiny_policy(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def states():
    return probed_states(RunConfig(), instances=1, limit_s=60)


def config(model, **sections):
    sections["policy"] = {"model": model, **sections.get("policy", {})}
    return RunConfig.model_validate(sections)


def found(report, name):
    return next(check for check in report.checks if check.name == name)


def quick(run, memory=ENOUGH, implied=False):
    return check_model(run, memory, lambda what: None, whole=False, implied=implied)


def test_a_tiny_policy_passes_every_finding_that_needs_no_weights(model):
    report = quick(config(model))
    assert report.trainable, report.broken
    assert {check.status for check in report.checks} == {Status.OK}
    assert report.round_trip == 1.0
    assert report.action_mass_max is None
    assert found(report, "lengths").detail.endswith("of sampler.max_model_len = 512")
    assert [device.name for device in report.memory.devices] == ["main memory"]


def test_weights_and_sampler_agree_without_an_adapter_and_with_one(model):
    run = config(model, sampler={"engine": "transformers"})
    report = check_model(run, ENOUGH, lambda what: None, whole=True)
    assert report.trainable, report.broken
    assert 0.0 < report.action_mass_max <= 1.0 + 1e-5
    assert report.mismatch_mean <= report.mismatch_max < 1e-4
    assert report.mismatch_mean_adapter <= report.mismatch_max_adapter < 1e-4


def test_an_adapter_that_the_sampler_does_not_apply_is_found(model, monkeypatch):
    monkeypatch.setattr("gflowvlm.learner.learner.Learner.save_adapter", saved_without_changes)
    report = check_model(config(model, sampler={"engine": "transformers"}), ENOUGH, lambda what: None, whole=True)
    assert report.mismatch_max < 1e-4 < report.mismatch_max_adapter
    assert found(report, "sampler").detail.startswith("with an adapter, sampler and learner disagree")


def saved_without_changes(learner, directory):
    from gflowvlm.learner.checkpoint import save_adapter
    from gflowvlm.learner.model import load_policy

    fresh = load_policy(learner.config.policy, learner.config.policy.model, seed=0, device=learner.device)
    save_adapter(fresh, Path(directory))


def test_what_vllm_cannot_do_is_a_note_where_nobody_asked_for_it_and_the_other_engine_can(model, monkeypatch):
    def without_vllm(config, path, engine):
        if engine == "vllm":
            raise UserError("model: vLLM cannot serve it under these settings (no LoRA)")
        return make_sampler(config, path, engine)

    monkeypatch.setattr("gflowvlm.evaluation.model_check.engine.make_sampler", without_vllm)
    report = check_model(config(model), ENOUGH, lambda what: None, whole=True, implied=True)
    assert report.trainable, report.broken
    assert (found(report, "vLLM").status, found(report, "sampler").status) == (Status.NOTE, Status.OK)
    assert report.settings == ["sampler.engine=transformers"]
    assert report.mismatch_max < 1e-4
    chosen = check_model(config(model), ENOUGH, lambda what: None, whole=True)
    assert found(chosen, "sampler").status is Status.BROKEN


@pytest.mark.parametrize(
    ("sections", "name", "detail", "advice"),
    [
        ({"sampler": {"max_model_len": 128}}, "lengths", "sampler.max_model_len is 128", "sampler.max_model_len="),
        (
            {"policy": {"max_response_tokens": 4}},
            "lengths",
            "policy.max_response_tokens is 4",
            "max_response_tokens=64",
        ),
        ({"policy": {"lora_targets": ["none"]}}, "LoRA targets", "'none' names no linear layer", "choose from"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_one_line_each(model, sections, name, detail, advice):
    report = quick(config(model, **sections))
    check = found(report, name)
    assert check.status is Status.BROKEN
    assert detail in check.detail
    assert advice in check.advice
    with pytest.raises(UserError, match=advice):
        require_trainable(config(model, **sections), ENOUGH)


def test_settings_that_nobody_chose_are_made_to_fit(model):
    report = quick(config(model, sampler={"max_model_len": 128}, policy={"max_response_tokens": 4}), implied=True)
    assert report.trainable, report.broken
    assert [setting.partition("=")[0] for setting in report.settings] == [
        "policy.max_response_tokens",
        "sampler.max_model_len",
    ]


def test_a_run_that_does_not_fit_is_refused_and_settings_that_nobody_chose_are_a_note(model):
    little = Memory(main=GIB)
    assert found(quick(config(model), little), "memory").status is Status.BROKEN
    assert found(quick(config(model), little, implied=True), "memory").status is Status.NOTE
    with pytest.raises(UserError, match="main memory needs"):
        require_trainable(config(model), little)


def test_what_does_not_fit_here_is_not_started(model, monkeypatch):
    monkeypatch.setattr(reports, "Learner", None)
    report = check_model(config(model), Memory(main=GIB), lambda what: None, whole=True, implied=True)
    assert "not looked at" in report.checks[-1].detail
    assert report.trainable


def test_a_folder_without_a_processor_is_one_finding(tmp_path, model):
    (tmp_path / "config.json").write_text((Path(model) / "config.json").read_text())
    report = quick(config(str(tmp_path)))
    assert [check.name for check in report.checks] == ["processor"]
    assert "its processor cannot be loaded" in report.checks[0].detail


def test_a_template_that_leaves_the_prompt_out_is_found(model, states):
    inputs = PolicyInputs.load(model)
    inputs.processor.chat_template = "{{ '<image>hello' }}"
    check = of_inputs.check_template(inputs, states[0])
    assert (check.status, check.detail) == (Status.BROKEN, "the prompt's text is not in what the template makes of it")


def test_a_beginning_that_stands_twice_is_found(model, states):
    inputs = PolicyInputs.load(model)
    template = inputs.processor.chat_template
    inputs.processor.chat_template = "{{ '<start>' }}" + template
    check = of_inputs.check_start_token(inputs, states[0])
    assert (check.status, check.detail) == (Status.BROKEN, "stands 2 times at the start of a prompt")


def test_answers_that_do_not_come_back_are_counted(model, states, monkeypatch):
    inputs = PolicyInputs.load(model)
    monkeypatch.setattr(inputs, "encode_if_possible", lambda text: None)
    trip = of_inputs.round_trip(inputs, states)
    assert trip.share == 0.0
    check = of_inputs.check_round_trip(trip)
    assert check.status is Status.BROKEN
    assert f"{trip.answers} of {trip.answers} do not come back" in check.detail


def test_states_are_the_experts_and_those_of_one_who_never_stops(states):
    lengths = [state.prompt.count("Action ") for state in states]
    assert max(lengths) == RunConfig().task.max_steps - 1
    assert all({"+", "-", "[DONE]"} >= set(state.demonstrations) for state in states)
    assert all('"action": "[DONE]"' in state.demonstrations["[DONE]"] for state in states)


def test_a_task_whose_instances_fail_is_one_finding(model):
    run = config(model, evaluation={"seed": next(iter(SEEDS.values()))})
    run = run.model_copy(update={"task": MisbehavingSettings()})
    check = quick(run).checks[-1]
    assert (check.name, check.status) == ("task", Status.BROKEN)
    assert "none of its evaluation instances can be played" in check.detail
