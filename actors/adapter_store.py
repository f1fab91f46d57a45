"""Where the learner publishes adapters and the samplers find them: pulled by those who wait, pushed to no one.

The state is what stands in the run's folder, so a restarted or resumed store goes on where it was.
"""

import asyncio
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import ray
from safetensors import SafetensorError, safe_open

from gflowvlm.actors.sampling import UnknownVersionError
from gflowvlm.run.folder import RunFolder
from gflowvlm.shared.config import ClusterSettings
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.trajectory import BASE_VERSION

NAMESPACE = "gflowvlm"
"""Ray namespace of the run's named actors: Serve replicas live in a namespace of their own."""

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_VERSION_FOLDER = re.compile(r"v(\d{8,})")
_PARTIAL = ".partial-"
_NOT_LANGUAGE = re.compile(
    r"(^|\.)(vision_tower|vision_model|vision_encoder|vision|visual|image_encoder|vit|"
    r"connector|multi_modal_projector|mm_projector|merger)\."
)


class AdapterStore:
    """The published adapters of one run: immutable, numbered from 1 upward without reuse."""

    def __init__(self, run_folder: Path) -> None:
        """Opens the store of a run.

        Args:
            run_folder: The run's folder; adapters stand in its ``adapters`` folder.
        """
        self._folder = RunFolder(Path(run_folder))
        self._folder.adapters.mkdir(parents=True, exist_ok=True)
        self._newest = max(self.versions(), default=BASE_VERSION)

    def versions(self) -> list[int]:
        """Returns the published versions, oldest first."""
        found = (_VERSION_FOLDER.fullmatch(path.name) for path in self._folder.adapters.iterdir())
        return sorted(int(match[1]) for match in found if match is not None)

    def newest(self) -> tuple[int, Path | None]:
        """Returns the newest version and its folder: ``(0, None)`` before the first."""
        if self._newest == BASE_VERSION:
            return BASE_VERSION, None
        return self._newest, self._folder.adapter(self._newest)

    def path(self, version: int) -> Path:
        """Returns the folder of one version.

        Raises:
            UnknownVersionError: No such version.
        """
        path = self._folder.adapter(version)
        if not path.is_dir():
            raise UnknownVersionError(f"{self._folder.adapters}: no adapter version {version}")
        return path

    def publish(self, source: Path) -> int:
        """Copies an adapter into the store, whole or not at all, and gives it the next version.

        A repeated call for the same saved file (same time of change and size as the newest version's)
        returns the newest version again: a call that Ray retries publishes once.

        Args:
            source: Folder in PEFT format.

        Returns:
            The version.

        Raises:
            UserError: The folder holds no adapter that samplers can apply, or the disk is full.
        """
        source = Path(source)
        check_adapter(source)
        if self._newest != BASE_VERSION and _same_file(source, self._folder.adapter(self._newest)):
            return self._newest
        version = self._newest + 1
        for left_over in self._folder.adapters.glob(f"{_PARTIAL}*"):
            shutil.rmtree(left_over)
        partial = self._folder.adapters / f"{_PARTIAL}{version}"
        try:
            partial.mkdir()
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                # Keeps the time of change, by which a repeated call is known.
                shutil.copy2(source / name, partial / name)
                _sync(partial / name)
            _sync(partial)
            partial.rename(self._folder.adapter(version))
            _sync(self._folder.adapters)
        except OSError as error:
            raise UserError(f"{self._folder.adapters}: adapter {version} cannot be written ({error})") from None
        self._newest = version
        return version


def check_adapter(path: Path) -> None:
    """Checks that a folder holds an adapter in PEFT format that samplers apply in full.

    Raises:
        UserError: A file is missing or unreadable, or weights touch more than the language model: vLLM
            would leave those out without a word.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise UserError(f"adapter {path}: {name} is missing; give a folder in PEFT format")
    try:
        json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        with safe_open(path / WEIGHTS_FILE, framework="numpy") as weights:
            names = list(weights.keys())
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"adapter {path}: not readable ({error})") from None
    if not names:
        raise UserError(f"adapter {path}: {WEIGHTS_FILE} holds no weights")
    for name in names:
        if _NOT_LANGUAGE.search(name) is not None:
            raise UserError(
                f"adapter {path}: it adapts {name!r}, but samplers apply adapters to the language model only; "
                "leave the vision tower and its connector out of policy.lora_targets"
            )


class _AdapterStoreActor:
    """`AdapterStore` as a Ray actor; waiting for a newer version costs nothing."""

    def __init__(self, run_folder: str) -> None:
        self._store = AdapterStore(Path(run_folder))
        self._published = asyncio.Condition()

    async def publish(self, source: str | Path) -> int:
        """Publishes an adapter; see `AdapterStore.publish`."""
        async with self._published:
            version = await asyncio.to_thread(self._store.publish, Path(source))
            self._published.notify_all()
        return version

    async def newest(self) -> tuple[int, Path | None]:
        """Returns the newest version and its folder."""
        return self._store.newest()

    async def path(self, version: int) -> Path:
        """Returns the folder of one version; see `AdapterStore.path`."""
        return self._store.path(version)

    async def wait_newer(self, version: int, timeout_s: float) -> tuple[int, Path] | None:
        """Returns the newest version and its folder once it is newer than `version`; None at the timeout."""
        try:
            async with asyncio.timeout(timeout_s), self._published:
                await self._published.wait_for(lambda: self._store.newest()[0] > version)
        except TimeoutError:
            return None
        newest, path = self._store.newest()
        return None if path is None else (newest, path)


def start_adapter_store(name: str, run_folder: Path, cluster: ClusterSettings | None = None) -> Any:
    """Returns the handle of the run's store, a named Ray actor, started if it is not running.

    Methods (remote): ``publish(source)``, ``newest()``, ``path(version)``, ``wait_newer(version, timeout_s)``.

    Args:
        name: The store's name, one per run.
        run_folder: The run's folder.
        cluster: Where its control actors are placed; anywhere by default.
    """
    cluster = ClusterSettings() if cluster is None else cluster
    actor = ray.remote(_AdapterStoreActor).options(
        name=name,
        namespace=NAMESPACE,
        get_if_exists=True,
        num_cpus=0,
        resources=dict(cluster.control_resources),
        label_selector=dict(cluster.control_node_labels),
        max_restarts=-1,
        max_task_retries=-1,
        # Every replica waits in a call of its own.
        max_concurrency=1000,
    )
    return actor.remote(str(Path(run_folder).resolve()))


def find_adapter_store(name: str) -> Any:
    """Returns the handle of a running store; raises ValueError when there is none of this name."""
    return ray.get_actor(name, namespace=NAMESPACE)


def _same_file(source: Path, published: Path) -> bool:
    first, second = (source / WEIGHTS_FILE).stat(), (published / WEIGHTS_FILE).stat()
    return (first.st_mtime_ns, first.st_size) == (second.st_mtime_ns, second.st_size)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
