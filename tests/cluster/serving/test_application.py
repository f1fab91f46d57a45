"""What is served, and what is refused before anything starts."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from gflowvlm.cli.main import app as command_line
from gflowvlm.cluster.serving.application import DEPLOYMENT, api_key_for, app
from gflowvlm.cluster.serving.served_policy import API_KEY_VARIABLE, ServeArguments, served_policy
from gflowvlm.cluster.serving.session import Address, curl_example
from gflowvlm.run.models import resolve_model
from gflowvlm.run.setup import new_run
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError

LAYER = "model.text_model.layers.0.self_attn.q_proj"
INPUTS, OUTPUTS = 64, 128


def write_adapter(
    folder: Path, rank: int = 4, inputs: int = INPUTS, outputs: int = OUTPUTS, layer: str = LAYER
) -> Path:
    """Writes an adapter of one layer in PEFT format."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 8}))
    name = f"base_model.model.{layer}"
    weights = {f"{name}.lora_A.weight": (rank, inputs), f"{name}.lora_B.weight": (outputs, rank)}
    save_file({key: np.ones(shape, np.float32) for key, shape in weights.items()}, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with versions 1 to 3, of which 2 is the best."""
    folder = new_run(RunConfig(), tmp_path / "my-run")
    for version in (1, 2, 3):
        write_adapter(folder.adapter(version))
    folder.best.write_text('{"version": 2}')
    return folder.root


def arguments(policy: Path, **changes: object) -> ServeArguments:
    return ServeArguments.model_validate({"policy": str(policy), **changes})


def test_a_run_serves_its_best_adapter_beside_its_base_model(run: Path) -> None:
    policy = served_policy(arguments(run))
    assert (policy.version, policy.adapter) == (2, run / "adapters" / "v00000002")
    assert policy.model_names == ["my-run", "my-run-base"]
    assert policy.model == resolve_model("numberline-tiny")
    assert policy.require_api_key is True


def test_another_version_name_and_settings_can_be_asked_for(run: Path) -> None:
    asked = arguments(run, version=3, name="walker", replicas=3, settings=["sampler.max_num_seqs=5"])
    policy = served_policy(asked)
    assert (policy.version, policy.model_names) == (3, ["walker", "walker-base"])
    assert (policy.config.sampler.max_num_seqs, policy.config.sampler.replicas) == (5, 3)


def test_version_0_is_the_base_model_alone(run: Path) -> None:
    policy = served_policy(arguments(run, version=0))
    assert (policy.adapter, policy.model_names) == (None, ["my-run-base"])


def test_an_adapters_folder_is_served_on_the_model_that_is_named(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "an adapter", rank=12)
    policy = served_policy(arguments(adapter, model="numberline-tiny"))
    assert (policy.adapter, policy.version) == (adapter, None)
    assert (policy.config.policy.lora_rank, policy.config.policy.lora_targets) == (12, ["q_proj"])
    assert policy.model_names == ["an-adapter", "an-adapter-base"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"version": 9}, "adapter version 9 was never published; there are"),
        ({"name": "a b"}, "model name 'a b'"),
        ({"model": "./nowhere"}, "nowhere"),
        ({"settings": ["sampler.max_num_seq=5"]}, "did you mean 'sampler.max_num_seqs'"),
    ],
)
def test_what_a_run_does_not_have_is_one_line(run: Path, changes: dict[str, object], problem: str) -> None:
    with pytest.raises(UserError, match=problem) as raised:
        served_policy(arguments(run, **changes))
    assert "\n" not in str(raised.value)


def test_a_folder_that_is_neither_a_run_nor_an_adapter_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="neither a run folder"):
            served_policy(arguments(folder))


def test_an_adapters_folder_needs_a_model_and_has_no_versions(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    with pytest.raises(UserError, match="--model"):
        served_policy(arguments(adapter))
    with pytest.raises(UserError, match="no versions"):
        served_policy(arguments(adapter, model="numberline-tiny", version=1))


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing"):
        served_policy(arguments(adapter, model="numberline-tiny"))


@pytest.mark.parametrize(
    ("made", "problem"),
    [
        ({"inputs": 32}, r"lora_A.*64 inputs and 128 outputs"),
        ({"outputs": 32}, r"lora_B.*64 inputs and 128 outputs"),
        ({"layer": "model.text_model.layers.77.self_attn.q_proj"}, r"layers\.77.*does not have"),
        ({"layer": "model.text_model.layers.0.input_layernorm"}, r"input_layernorm.*does not have as a linear"),
        ({"layer": "model.vision_model.encoder.layers.0.self_attn.q_proj"}, "language model only"),
    ],
)
def test_an_adapter_that_does_not_fit_the_model_is_refused(
    tmp_path: Path, made: dict[str, object], problem: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", **made)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=problem):
        served_policy(arguments(adapter, model="numberline-tiny"))


def test_weights_that_vllm_would_not_apply_are_refused(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    save_file({"base_model.model.lm_head.weight": np.ones((4, 4), np.float32)}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="no LoRA weight"):
        served_policy(arguments(adapter, model="numberline-tiny"))


def test_the_application_has_the_replicas_and_resources_of_the_settings(run: Path) -> None:
    settings = ["sampler.cpus_per_replica=2", "sampler.gpus_per_replica=1", "sampler.resources_per_replica={h100: 1}"]
    application = app(arguments(run, replicas=2, settings=settings))
    deployment = application._bound_deployment
    assert (deployment.name, deployment.num_replicas) == (DEPLOYMENT, 2)
    assert deployment.ray_actor_options["num_cpus"] == 2
    assert deployment.ray_actor_options["num_gpus"] == 1
    assert deployment.ray_actor_options["resources"] == {"h100": 1}


def test_a_replica_without_the_key_that_it_needs_does_not_start(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "")
    with pytest.raises(UserError, match="require_api_key"):
        api_key_for(served_policy(arguments(run)))
    assert api_key_for(served_policy(arguments(run, require_api_key=False))) is None
    monkeypatch.setenv(API_KEY_VARIABLE, "a key")
    assert api_key_for(served_policy(arguments(run))) == "a key"


def test_an_unknown_argument_of_the_application_is_refused(run: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        arguments(run, trust_remote_code=True)


def test_only_loopback_addresses_count_as_this_machine_alone() -> None:
    assert [Address(h, 1).loopback for h in ("127.0.0.1", "127.0.0.2", "::1", "localhost")] == [True] * 4
    assert [Address(h, 1).loopback for h in ("0.0.0.0", "::", "10.0.0.5", "example.org")] == [False] * 4
    assert Address("::1", 80).url == "http://[::1]:80"
    assert Address("0.0.0.0", 80).url == "http://127.0.0.1:80"


def test_the_example_names_the_policy_and_the_key_only_where_there_is_one(run: Path) -> None:
    with_key = served_policy(arguments(run))
    without = served_policy(arguments(run, require_api_key=False))
    address = Address("127.0.0.1", 8000)
    assert '"model": "my-run"' in curl_example(without, address)
    assert API_KEY_VARIABLE not in curl_example(without, address)
    assert f"Bearer ${API_KEY_VARIABLE}" in curl_example(with_key, address)


def invoke(*words: str) -> UserError:
    result = CliRunner().invoke(command_line, ["serve", *words])
    assert isinstance(result.exception, UserError), result.output
    return result.exception


def test_a_port_in_use_and_an_address_of_another_machine_are_one_line(run: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert "in use" in str(invoke(str(run), "--port", port))
    assert "192.0.2.1" in str(invoke(str(run), "--host", "192.0.2.1"))


def test_wrong_paths_and_an_empty_key_are_one_line(tmp_path: Path, run: Path) -> None:
    assert "neither a run folder" in str(invoke(str(tmp_path)))
    assert "the key is empty" in str(invoke(str(run), "--api-key", " "))
