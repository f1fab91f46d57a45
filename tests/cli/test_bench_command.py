"""`gflowvlm bench`: every part measures what it says, and starts only what it needs."""

import asyncio
import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from gflowvlm.actors.sampling import SampleRequest, SampleResponse
from gflowvlm.cli.commands import bench, presets
from gflowvlm.learner.tiny_policy import build_tiny_policy
from gflowvlm.run.folder import RunFolder
from gflowvlm.run.log import append_row
from gflowvlm.shared.cluster_settings import ClusterSettings
from gflowvlm.shared.config import PolicySettings, RunConfig, SamplerSettings
from gflowvlm.shared.config_io import dump_config
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.trajectory import EndReason, to_record_batch
from gflowvlm.studies.benchmarks.finished_run import bench_run
from gflowvlm.studies.benchmarks.measurement import QUICK, Measurement, Scale
from gflowvlm.studies.benchmarks.quiet import quiet_stderr
from gflowvlm.studies.benchmarks.serving import sample_all
from gflowvlm.studies.benchmarks.suite import run_parts
from gflowvlm.studies.benchmarks.workload import copied_groups, made_groups, made_requests

BRIEF = Scale(rounds=2, requests_per_slot=2, publishes=3, learner_steps=1, seconds=0.2, replay_groups=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny policy with random weights."""
    return str(build_tiny_policy(tmp_path_factory.mktemp("model"), seed=0))


@pytest.fixture
def config(model: str) -> RunConfig:
    """A small run of it, sampled by transformers."""
    return RunConfig(
        policy=PolicySettings(model=model, lora_rank=4, max_response_tokens=16),
        sampler=SamplerSettings(engine="transformers", max_num_seqs=4),
        cluster=ClusterSettings(dashboard=False, object_store_mib=80),
    )


def _command() -> typer.Typer:
    app = typer.Typer()
    bench.register(app)
    presets.register(app)
    return app


@quiet_stderr()
def _fail_loudly() -> None:
    os.write(2, b"the root cause")
    raise UserError("the engine cannot start")


def _measured(config: RunConfig, *parts: str) -> dict[str, float]:
    return {
        measurement.name: measurement.value for measurement in run_parts(config, set(parts), BRIEF, Console(quiet=True))
    }


def test_an_unknown_part_is_named_with_those_that_exist() -> None:
    result = CliRunner().invoke(_command(), ["bench", "--parts", "environment,gpu"])
    assert isinstance(result.exception, UserError)
    assert "gpu" in str(result.exception)
    assert "environment" in str(result.exception)


def test_a_missing_model_is_told_before_anything_is_started() -> None:
    result = CliRunner().invoke(_command(), ["bench", "--parts", "replay", "policy.model=/nowhere/model"])
    assert isinstance(result.exception, UserError)
    assert "no such directory" in str(result.exception)
    assert "starting" not in result.output


def test_one_part_is_measured_alone_and_written_as_json(tmp_path: Path) -> None:
    path = tmp_path / "measurements.json"
    arguments = ["bench", "--quick", "--parts", "environment", "--json", str(path), "task.n_max=7"]
    result = CliRunner().invoke(_command(), arguments)
    assert result.exit_code == 0, result.output
    content = json.loads(path.read_text())
    assert {measurement["part"] for measurement in content["measurements"].values()} == {"environment"}
    assert content["measurements"]["environment_steps_per_s"]["value"] > 10
    assert content["measurements"]["environment_steps_per_s"]["unit"] == "steps/s"
    assert content["machine"]["cores"] >= 1
    assert content["overrides"] == ["task.n_max=7"]
    assert "environment_steps_per_s" in result.output


def test_parts_without_an_engine_do_not_import_vllm() -> None:
    code = (
        "import sys\n"
        "from rich.console import Console\n"
        "from gflowvlm.studies.benchmarks.measurement import Scale\n"
        "from gflowvlm.studies.benchmarks.suite import run_parts\n"
        "import gflowvlm.studies.benchmarks.replay, ray\n"
        "from gflowvlm.shared.config import RunConfig\n"
        "run_parts(RunConfig(), {'environment'}, Scale(seconds=0.1), Console(quiet=True))\n"
        "assert 'vllm' not in sys.modules and not ray.is_initialized()\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=120)


def test_made_groups_that_never_stop_go_on_to_the_step_limit(config: RunConfig, model: str) -> None:
    groups = made_groups(config, PolicyInputs.load(model), 2, stops=False)
    assert {t.end for group in groups for t in group} == {EndReason.STEP_LIMIT}


def test_made_groups_are_groups_of_one_instance_with_the_runs_size(config: RunConfig, model: str) -> None:
    groups = made_groups(config, PolicyInputs.load(model), 2, first=5)
    assert [len(group) for group in groups] == [config.rollout.group_size] * 2
    assert [{t.instance_seed for t in group} for group in groups] == [{5}, {6}]
    assert len({t.trajectory_id for t in chain(*groups)}) == 2 * config.rollout.group_size
    assert len({t.actions for t in groups[0]}) > 1
    assert to_record_batch(groups[0]).num_rows == config.rollout.group_size


def test_copied_groups_have_ids_of_their_own(config: RunConfig, model: str) -> None:
    made = made_groups(config, PolicyInputs.load(model), 2)
    copies = copied_groups(made, 5)
    assert len({t.trajectory_id for t in chain(*copies)}) == 5 * config.rollout.group_size
    assert len({t.group_id for t in chain(*copies)}) == 5
    assert copies[2][0].steps == made[0][0].steps


def test_rounds_of_requests_differ_and_are_as_many_as_asked(config: RunConfig, model: str) -> None:
    inputs = PolicyInputs.load(model)
    first, again, second = (made_requests(config, inputs, 30, first=f) for f in (0, 0, 1000))
    assert len(first) == len(second) == 30
    assert first == again
    assert not {request.image for request in first} & {request.image for request in second}


def test_sampling_keeps_so_many_requests_in_flight_and_asks_each_once() -> None:
    class Source:
        in_flight = most = 0
        asked: list[str] = []  # noqa: RUF012

        async def sample(self, request: SampleRequest) -> SampleResponse:
            self.in_flight += 1
            self.most = max(self.most, self.in_flight)
            self.asked.append(request.prompt)
            await asyncio.sleep(0.001)
            self.in_flight -= 1
            return SampleResponse([1, 2, 3], [0.0] * 3, "", 1)

    source = Source()
    requests = [SampleRequest(str(i), b"", 4, 1.0) for i in range(10)]
    assert asyncio.run(sample_all(source, requests, in_flight=4)) == 30
    assert source.most == 4
    assert sorted(source.asked) == sorted(str(i) for i in range(10))


def test_a_bar_is_met_or_missed_or_absent() -> None:
    assert Measurement("serve", "serve_ratio", 0.9, "ratio", "", at_least=0.9).met is True
    assert Measurement("serve", "serve_ratio", 0.89, "ratio", "", at_least=0.9).met is False
    assert Measurement("learner", "share", 0.02, "share", "", at_most=0.02).met is True
    assert Measurement("learner", "share", 0.03, "share", "", at_most=0.02).met is False
    assert Measurement("serve", "other", 0.0, "ratio", "").met is None


def test_quick_still_publishes_at_least_twenty_adapters() -> None:
    assert QUICK.publishes >= 20


def test_a_finished_run_tells_who_waited(tmp_path: Path, config: RunConfig) -> None:
    folder = RunFolder(tmp_path)
    folder.config.write_text(dump_config(config))
    for step, wait in ((1, 3.0), (2, 0.0), (3, 0.0)):
        append_row(folder.metrics, "step", {"step": step, "wait_s": wait, "step_s": 4.0})
    for share in (0.25, 0.75):
        append_row(folder.metrics, "rollout", {"step": 1, "sampler_idle_share": share})
    measurements = {measurement.name: measurement.value for measurement in bench_run(tmp_path)}
    assert measurements["run_learner_wait_share"] == pytest.approx(0.25)
    assert measurements["run_sampler_idle_share"] == pytest.approx(0.5)
    assert measurements["run_learner_steps_per_s"] == pytest.approx(0.25)


def test_a_run_without_steps_is_refused(tmp_path: Path, config: RunConfig) -> None:
    RunFolder(tmp_path).config.write_text(dump_config(config))
    with pytest.raises(UserError, match="no learner step"):
        bench_run(tmp_path)


def test_what_an_engine_prints_is_shown_only_when_it_fails(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet_stderr():
        os.write(2, b"loading weights")
    with pytest.raises(UserError):
        _fail_loudly()
    assert capfd.readouterr().err == "the root cause"


@pytest.mark.slow
def test_the_learner_is_timed_on_its_own(config: RunConfig) -> None:
    measurements = _measured(config, "learner")
    assert measurements["learner_trajectories_per_s"] > 0
    assert measurements["learner_tokens_per_s"] > measurements["learner_trajectories_per_s"]


@pytest.mark.slow
def test_the_replay_buffer_is_timed_alone_and_through_ray(config: RunConfig) -> None:
    measurements = _measured(config, "replay")
    for name in ("replay_append", "replay_sample", "replay_actor_append", "replay_actor_sample"):
        assert measurements[f"{name}_trajectories_per_s"] > 0
        assert measurements[f"{name}_mb_per_s"] > 0


@pytest.mark.slow
def test_serve_is_compared_with_the_bare_engine_and_new_adapters_answer(config: RunConfig) -> None:
    measurements = _measured(config, "sampler", "serve", "adapter")
    ratio = measurements["serve_tokens_per_s"] / measurements["sampler_tokens_per_s"]
    assert measurements["serve_ratio"] == pytest.approx(ratio)
    for load in ("idle", "busy"):
        assert 0 < measurements[f"adapter_{load}_p50_s"] <= measurements[f"adapter_{load}_p95_s"]
