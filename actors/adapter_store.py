"""Where the learner publishes adapters and the samplers find them: pulled by those who wait, pushed to no one.

The state is what stands in the run's folder, so a restarted or resumed store goes on where it was.
"""

import asyncio
import json
import logging
import re
import shutil
import time
import uuid
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from safetensors import SafetensorError, safe_open

from gflowvlm.actors.sampling import UnknownVersionError
from gflowvlm.run.adapters import adapter_versions, missing_version
from gflowvlm.run.folder import RunFolder
from gflowvlm.shared.cluster_settings import ClusterSettings
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.files import sync
from gflowvlm.shared.trajectory import BASE_VERSION

log = logging.getLogger(__name__)

NAMESPACE = "gflowvlm"
"""Ray namespace of the run's named actors: Serve replicas live in a namespace of their own."""

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

PUBLICATION_FILE = "publication.json"
"""In each published folder: the learner's step, and whether the version is kept for ever."""

LEASE_S = 300.0
"""How long a version stays for a reader that has not been heard of since it was given it or named it."""

RESTARTED_S = 60.0
"""How long a store that was restarted removes nothing: its readers have to say first what they use."""

_NOT_LANGUAGE = re.compile(
    r"(^|\.)(vision_tower|vision_model|vision_encoder|vision|visual|image_encoder|vit|"
    r"connector|multi_modal_projector|mm_projector|merger)\."
)


@dataclass(frozen=True)
class Publication:
    """What a published folder says of itself.

    Attributes:
        source: Name of the staging folder that became this version: one for each publication.
        step: The learner's step; None without one.
        keep: Whether the version is never removed.
    """

    source: str
    step: int | None
    keep: bool


def staging_folder(run_folder: Path) -> Path:
    """Returns the path for an adapter that shall be published: a new name on the store's file system.

    One at a time: publishing one removes what else is staged, as left over from a crash.
    """
    return RunFolder(run_folder).adapters / f".staging-{uuid.uuid4().hex}"


class AdapterStore:
    """The published adapters of one run: immutable, numbered from 1 upward without reuse."""

    def __init__(self, run_folder: Path, keep_newest: int | None = None) -> None:
        """Opens the store of a run.

        Args:
            run_folder: The run's folder; adapters stand in its ``adapters`` folder.
            keep_newest: How many of the newest versions `remove_unneeded` leaves; None: all.
        """
        self._folder = RunFolder(Path(run_folder))
        self._keep_newest = keep_newest
        self._folder.adapters.mkdir(parents=True, exist_ok=True)
        self._published = {v: _publication(self._folder.adapter(v)) for v in adapter_versions(self._folder)}
        self._newest = max(self._published, default=BASE_VERSION)

    def versions(self) -> list[int]:
        """Returns the published versions that are there, oldest first."""
        return sorted(self._published)

    def newest(self) -> tuple[int, Path | None]:
        """Returns the newest version and its folder: ``(0, None)`` before the first."""
        newest = self._newest
        return newest, None if newest == BASE_VERSION else self._folder.adapter(newest)

    def path(self, version: int) -> Path:
        """Returns the folder of one version.

        Raises:
            UnknownVersionError: No such version was published, or it is removed.
        """
        path = self._folder.adapter(version)
        if version not in self._published or not path.is_dir():
            raise UnknownVersionError(f"{self._folder.adapters}: {missing_version(version, self.versions())}")
        return path

    def publish(self, source: Path, step: int | None = None, *, keep: bool = False) -> int:
        """Takes a folder into the store by renaming it, whole or not at all, and gives it the next version.

        A repeated call for a folder that the store has taken already returns its version again: a call that
        Ray retries publishes once.

        Args:
            source: Folder in PEFT format on the store's file system, best a `staging_folder`; it is gone afterwards.
            step: The learner's step that it was made at.
            keep: Whether the version is never removed, because it is evaluated.

        Returns:
            The version.

        Raises:
            UserError: The folder holds no adapter that samplers can apply, or the disk is full.
        """
        source = Path(source)
        if not source.exists():
            for version in reversed(self.versions()):
                if self._published[version].source == source.name:
                    return version
        check_adapter(source)
        version = self._newest + 1
        publication = Publication(source.name, step, keep)
        try:
            self._clear_leftovers(source)
            (source / PUBLICATION_FILE).write_text(json.dumps(asdict(publication)), encoding="utf-8")
            for name in (CONFIG_FILE, WEIGHTS_FILE, PUBLICATION_FILE):
                sync(source / name)
            sync(source)
            source.rename(self._folder.adapter(version))
            sync(self._folder.adapters)
        except OSError as error:
            raise UserError(f"{self._folder.adapters}: adapter {version} cannot be written ({error})") from None
        self._published[version] = publication
        self._newest = version
        return version

    def remove_unneeded(self, in_use: Collection[int] = ()) -> list[int]:
        """Removes old versions; the newest `keep_newest`, those published with `keep`, and `in_use` stay.

        What cannot be removed is tried again by the next call.

        Args:
            in_use: Versions that a reader still needs.

        Returns:
            The versions that are gone.
        """
        if self._keep_newest is None:
            return []
        removed = []
        for version in self.versions()[: -self._keep_newest]:
            if self._published[version].keep or version in in_use:
                continue
            path = self._folder.adapter(version)
            # Under another name first: a version is there in full, or not at all.
            aside = path.with_name(f".removed-{path.name}")
            try:
                path.rename(aside)
                del self._published[version]
                removed.append(version)
                shutil.rmtree(aside)
            except OSError as error:
                log.warning("adapter version %d cannot be removed: %s", version, error)
        return removed

    def _clear_leftovers(self, source: Path) -> None:
        """Removes what a crash has left half-written or half-removed."""
        for path in self._folder.adapters.glob(".*"):
            if path.name != source.name:
                # Where a reader still has a file open, NFS cannot; then the next publication does.
                shutil.rmtree(path, ignore_errors=True)


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
    """`AdapterStore` as a Ray actor; waiting for a newer version costs nothing.

    Readers (policy server replicas) name themselves: what one was given, or says that it has loaded, stays until it
    says otherwise or has not been heard of for `LEASE_S`.
    """

    def __init__(self, run_folder: str, keep_newest: int | None = None) -> None:
        self._store = AdapterStore(Path(run_folder), keep_newest)
        self._changing = asyncio.Lock()
        self._published = asyncio.Condition()
        self._leases: dict[str, _Lease] = {}
        self._removes_from = time.monotonic() + (RESTARTED_S if self._store.versions() else 0.0)

    async def publish(self, source: str | Path, step: int | None = None, *, keep: bool = False) -> int:
        """Publishes an adapter, then removes what is no longer needed; see `AdapterStore`."""
        async with self._changing:
            version = await asyncio.to_thread(self._store.publish, Path(source), step, keep=keep)
            async with self._published:
                self._published.notify_all()
            if time.monotonic() >= self._removes_from:
                await asyncio.to_thread(self._store.remove_unneeded, self._leased())
        return version

    async def newest(self, reader: str | None = None) -> tuple[int, Path | None]:
        """Returns the newest version and its folder."""
        newest = self._store.newest()
        self._renew_lease(reader, [newest[0]])
        return newest

    async def path(self, version: int, reader: str | None = None) -> Path:
        """Returns the folder of one version; see `AdapterStore.path`."""
        # Not in the middle of a removal.
        async with self._changing:
            path = self._store.path(version)
            self._renew_lease(reader, [version])
        return path

    async def wait_newer(
        self, version: int, timeout_s: float, reader: str | None = None, loaded: Sequence[int] = ()
    ) -> tuple[int, Path] | None:
        """Returns the newest version and its folder once it is newer than `version`; None at the timeout.

        Args:
            version: The newest that the reader has.
            timeout_s: Longest wait, seconds.
            reader: Who asks.
            loaded: All versions that the reader has: those that its requests in flight name.
        """
        if reader is not None:
            self._leases[reader] = _Lease(set(loaded), time.monotonic() + timeout_s + LEASE_S)
        try:
            async with asyncio.timeout(timeout_s), self._published:
                await self._published.wait_for(lambda: self._store.newest()[0] > version)
        except TimeoutError:
            return None
        newest, path = await self.newest(reader)
        return None if path is None else (newest, path)

    def _renew_lease(self, reader: str | None, versions: Sequence[int]) -> None:
        if reader is not None:
            lease = self._leases.setdefault(reader, _Lease(set(), 0.0))
            lease.versions.update(versions)
            lease.until = max(lease.until, time.monotonic() + LEASE_S)

    def _leased(self) -> set[int]:
        now = time.monotonic()
        self._leases = {reader: lease for reader, lease in self._leases.items() if lease.until > now}
        return {version for lease in self._leases.values() for version in lease.versions}


@dataclass
class _Lease:
    """Versions that a reader needs, and until when that is believed of one that is silent (monotonic seconds)."""

    versions: set[int]
    until: float


def start_adapter_store(
    name: str, run_folder: Path, cluster: ClusterSettings | None = None, keep_newest: int | None = None
) -> Any:
    """Returns the handle of the run's store, a named Ray actor, started if it is not running.

    Methods (remote): ``publish(source, step)``, ``newest()``, ``path(version)``, ``wait_newer(version, timeout_s)``.

    Args:
        name: The store's name, one per run.
        run_folder: The run's folder.
        cluster: Where its control actors are placed; anywhere by default.
        keep_newest: How many of the newest versions stay beside those that are kept; None: all.
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
    return actor.remote(str(Path(run_folder).resolve()), keep_newest)


def find_adapter_store(name: str) -> Any:
    """Returns the handle of a running store; raises ValueError when there is none of this name."""
    return ray.get_actor(name, namespace=NAMESPACE)


def _publication(path: Path) -> Publication:
    """Returns what a published folder says of itself; one that says nothing is kept."""
    try:
        return Publication(**json.loads((path / PUBLICATION_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Publication(source="", step=None, keep=True)
