"""The adapter store: whole adapters, numbered without reuse, found again after a restart."""

import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import ray
from safetensors.numpy import save_file

from gflowvlm.actors.adapter_store import AdapterStore, find_adapter_store, start_adapter_store
from gflowvlm.actors.sampling import UnknownVersionError
from gflowvlm.run.folder import RunFolder
from gflowvlm.shared.errors import UserError
from tests.actors.local_ray import local_ray

LANGUAGE = "base_model.model.model.text_model.layers.0.self_attn.q_proj.lora_A.weight"


def make_adapter(folder: Path, name: str = LANGUAGE, value: float = 1.0) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"r": 2}')
    save_file({name: np.full((2, 3), value, dtype=np.float32)}, folder / "adapter_model.safetensors")
    return folder


def test_versions_count_from_one_and_the_adapter_is_a_copy(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "run")
    assert store.newest() == (0, None)
    source = make_adapter(tmp_path / "a")
    assert store.publish(source) == 1
    first = (source / "adapter_model.safetensors").read_bytes()
    assert store.publish(make_adapter(source, value=2.0)) == 2
    assert store.newest() == (2, RunFolder(tmp_path / "run").adapter(2))
    assert (store.path(1) / "adapter_model.safetensors").read_bytes() == first
    with pytest.raises(UnknownVersionError, match="no adapter version 3"):
        store.path(3)


def test_a_reopened_store_counts_on_and_clears_what_a_crash_left(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    for number in range(3):
        store.publish(make_adapter(tmp_path / f"a{number}"))
    # A crash in the middle of a copy leaves a partial folder that is no version.
    partial = RunFolder(tmp_path).adapters / ".partial-4"
    shutil.copytree(store.path(3), partial)
    reopened = AdapterStore(tmp_path)
    assert reopened.newest()[0] == 3
    assert reopened.publish(make_adapter(tmp_path / "next")) == 4
    assert not partial.exists()


def test_a_repeated_call_publishes_once(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    source = make_adapter(tmp_path / "a")
    assert [store.publish(source), AdapterStore(tmp_path).publish(source)] == [1, 1]
    assert store.versions() == [1]


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_an_adapter_is_refused(tmp_path: Path, missing: str) -> None:
    source = make_adapter(tmp_path / "a")
    (source / missing).unlink()
    with pytest.raises(UserError, match=missing):
        AdapterStore(tmp_path).publish(source)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    source = make_adapter(tmp_path / "a")
    weights = source / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(UserError, match="not readable"):
        AdapterStore(tmp_path).publish(source)
    assert AdapterStore(tmp_path).newest() == (0, None)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.vision_tower.layers.0.q_proj.lora_A.weight",
        "base_model.model.visual.blocks.0.attn.qkv.lora_A.weight",
        "base_model.model.model.connector.modality_projection.proj.lora_A.weight",
    ],
)
def test_weights_outside_the_language_model_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="language model only"):
        AdapterStore(tmp_path).publish(make_adapter(tmp_path / "a", name))


@pytest.mark.slow
def test_waiting_ends_at_a_publication_and_versions_survive_kill_9(tmp_path: Path) -> None:
    with local_ray():
        store = start_adapter_store("run-a", tmp_path / "run")
        waiting = store.wait_newer.remote(0, 60.0)
        assert ray.wait([waiting], timeout=0.5)[0] == []
        assert ray.get(store.publish.remote(make_adapter(tmp_path / "a")), timeout=30) == 1
        assert ray.get(waiting, timeout=10)[0] == 1
        started = time.monotonic()
        assert ray.get(store.wait_newer.remote(1, 0.3), timeout=10) is None
        assert time.monotonic() - started >= 0.3
        # A second start finds the running store; so does a look-up by name.
        again = start_adapter_store("run-a", tmp_path / "run")
        assert ray.get(again.newest.remote(), timeout=10)[0] == 1

        pid = ray.get(store.__ray_call__.remote(lambda actor: os.getpid()), timeout=10)
        os.kill(pid, signal.SIGKILL)
        found = find_adapter_store("run-a")
        assert ray.get(found.publish.remote(make_adapter(tmp_path / "b", value=3.0)), timeout=60) == 2
        # Errors reach the caller as what they are.
        with pytest.raises(UnknownVersionError):
            ray.get(found.path.remote(7), timeout=10)
        with pytest.raises(UserError, match="missing"):
            ray.get(found.publish.remote(tmp_path), timeout=10)
