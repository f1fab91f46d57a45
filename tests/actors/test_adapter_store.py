"""The adapter store: whole adapters, numbered without reuse, found again after a restart."""

import asyncio
import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from safetensors.numpy import load_file, save_file

from gflowvlm.actors import adapter_store
from gflowvlm.actors.adapter_store import (
    LEASE_S,
    RESTARTED_S,
    AdapterStore,
    _AdapterStoreActor,
    find_adapter_store,
    staging_folder,
    start_adapter_store,
)
from gflowvlm.actors.sampling import UnknownVersionError
from gflowvlm.run.adapters import adapter_versions
from gflowvlm.run.folder import RunFolder
from gflowvlm.shared.errors import UserError
from tests.actors.local_ray import local_ray

LANGUAGE = "base_model.model.model.text_model.layers.0.self_attn.q_proj.lora_A.weight"


def make_adapter(folder: Path, name: str = LANGUAGE, value: float = 1.0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text('{"r": 2}')
    save_file({name: np.full((2, 3), value, dtype=np.float32)}, folder / "adapter_model.safetensors")
    return folder


def publish(store: AdapterStore, run: Path, value: float = 1.0, **settings: Any) -> int:
    """Publishes as the learner does: from a folder of the store, which is gone afterwards."""
    source = make_adapter(staging_folder(run), value=value)
    version = store.publish(source, **settings)
    assert not source.exists()
    return version


def weights(path: Path) -> float:
    return float(load_file(path / "adapter_model.safetensors")[LANGUAGE][0, 0])


def test_versions_count_from_one_and_the_adapter_is_moved_not_copied(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    assert store.newest() == (0, None)
    source = make_adapter(staging_folder(tmp_path))
    written = (source / "adapter_model.safetensors").stat().st_ino
    assert store.publish(source) == 1
    assert (store.path(1) / "adapter_model.safetensors").stat().st_ino == written
    assert publish(store, tmp_path, 2.0) == 2
    assert store.newest() == (2, RunFolder(tmp_path).adapter(2))
    assert weights(store.path(1)) == 1.0
    with pytest.raises(UnknownVersionError, match="version 3 was never published; there are 1-2"):
        store.path(3)


def test_a_reopened_store_counts_on_and_clears_what_a_crash_left(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    for _ in range(3):
        publish(store, tmp_path)
    # A crash leaves what was being written, and what was being removed; neither is a version.
    for name in (".staging-1", "..staging-1.x.partial", ".removed-v00000000"):
        shutil.copytree(store.path(3), RunFolder(tmp_path).adapters / name)
    reopened = AdapterStore(tmp_path)
    assert reopened.newest()[0] == 3
    assert publish(reopened, tmp_path) == 4
    assert sorted(path.name for path in RunFolder(tmp_path).adapters.iterdir()) == [f"v{n:08d}" for n in (1, 2, 3, 4)]


def test_a_repeated_call_publishes_once_also_when_the_store_died_in_between(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    first, second = (make_adapter(staging_folder(tmp_path)) for _ in range(2))
    assert [store.publish(first), store.publish(first), AdapterStore(tmp_path).publish(first)] == [1, 1, 1]
    # The same weights of another call are another version.
    make_adapter(second)
    assert [store.publish(second), store.publish(first), store.publish(second)] == [2, 1, 2]
    assert store.versions() == [1, 2]


def test_adapters_are_not_told_apart_by_time_or_size(tmp_path: Path) -> None:
    # Many file systems keep whole seconds, and all adapters of a run have the same size.
    store = AdapterStore(tmp_path)
    for step in range(4):
        source = make_adapter(staging_folder(tmp_path), value=step)
        os.utime(source / "adapter_model.safetensors", (1_800_000_000, 1_800_000_000))
        assert store.publish(source, step) == step + 1
    assert [weights(store.path(version)) for version in store.versions()] == [0.0, 1.0, 2.0, 3.0]
    published = [json.loads((store.path(v) / "publication.json").read_text()) for v in store.versions()]
    assert [publication["step"] for publication in published] == [0, 1, 2, 3]


def test_a_step_that_was_undone_is_published_anew(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    assert [publish(store, tmp_path, value, step=7) for value in (1.0, 2.0)] == [1, 2]
    assert [weights(store.path(version)) for version in (1, 2)] == [1.0, 2.0]


def test_the_newest_the_evaluated_and_those_in_use_stay_and_the_others_go(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path, keep_newest=2)
    for step in range(1, 8):
        publish(store, tmp_path, step=step, keep=step == 3)
    assert store.remove_unneeded(in_use={1}) == [2, 4, 5]
    assert store.versions() == [1, 3, 6, 7]
    assert not RunFolder(tmp_path).adapter(2).exists()
    with pytest.raises(UnknownVersionError, match=r"version 5 was removed .*; there are 1, 3, 6-7"):
        store.path(5)
    # What is kept and how numbers go on is found again; nothing goes by its age.
    reopened = AdapterStore(tmp_path, keep_newest=2)
    assert reopened.remove_unneeded() == [1]
    assert publish(reopened, tmp_path) == 8
    assert reopened.remove_unneeded() == [6]
    assert reopened.versions() == [3, 7, 8]


def test_without_a_number_and_from_another_release_everything_stays(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    for _ in range(4):
        publish(store, tmp_path)
    assert store.remove_unneeded() == []
    (store.path(1) / "publication.json").unlink()
    assert AdapterStore(tmp_path, keep_newest=2).remove_unneeded() == [2]


def test_a_version_that_cannot_be_removed_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AdapterStore(tmp_path, keep_newest=2)
    for _ in range(3):
        publish(store, tmp_path)

    def busy(path: Path, **_: Any) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", busy)
        assert store.remove_unneeded() == [1]
    assert publish(store, tmp_path) == 4
    assert [path.name for path in RunFolder(tmp_path).adapters.glob(".*")] == []


def run_actor(body: Callable[[_AdapterStoreActor], Coroutine[Any, Any, None]], run: Path) -> None:
    async def started() -> None:
        actor = _AdapterStoreActor(str(run), keep_newest=2)
        await body(actor)

    asyncio.run(asyncio.wait_for(started(), 30))


def test_what_a_reader_was_given_or_has_loaded_is_not_removed_under_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(adapter_store, "time", SimpleNamespace(monotonic=lambda: now[0]))

    async def body(actor: _AdapterStoreActor) -> None:
        async def more(count: int) -> None:
            for _ in range(count):
                await actor.publish(make_adapter(staging_folder(tmp_path)))

        # After its restart nothing goes before those who read had the time to say what they use.
        await more(2)
        assert adapter_versions(RunFolder(tmp_path)) == [1, 2, 3, 4]
        assert await actor.path(2, "a") == RunFolder(tmp_path).adapter(2)
        assert (await actor.newest("b"))[0] == 4
        now[0] += RESTARTED_S
        await actor.wait_newer(3, 0.01, "a", [2, 3])
        assert (await actor.newest("b"))[0] == 4
        await more(3)
        assert adapter_versions(RunFolder(tmp_path)) == [2, 3, 4, 6, 7]
        # What it names no more may go; what it is given stays.
        assert (await actor.wait_newer(3, 0.01, "a", [3])) == (7, RunFolder(tmp_path).adapter(7))
        await more(3)
        assert adapter_versions(RunFolder(tmp_path)) == [3, 4, 7, 9, 10]
        with pytest.raises(UnknownVersionError, match="was removed"):
            await actor.path(8, "a")
        # Readers that have died hold nothing for ever.
        now[0] += 2 * LEASE_S
        await more(1)
        assert adapter_versions(RunFolder(tmp_path)) == [10, 11]

    before = AdapterStore(tmp_path)
    for _ in range(2):
        publish(before, tmp_path)
    run_actor(body, tmp_path)


def test_a_new_run_removes_from_the_start(tmp_path: Path) -> None:
    async def body(actor: _AdapterStoreActor) -> None:
        for _ in range(5):
            await actor.publish(make_adapter(staging_folder(tmp_path)))
        assert adapter_versions(RunFolder(tmp_path)) == [4, 5]

    run_actor(body, tmp_path)


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
            ray.get(found.publish.remote(tmp_path / "run"), timeout=10)
