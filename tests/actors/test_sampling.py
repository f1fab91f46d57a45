"""Bookkeeping of adapter versions: fixed at admission, dropped only when no request names them."""

import asyncio
from pathlib import Path

import pytest

from gflowvlm.actors.sampling import AdapterVersions, UnknownVersionError
from gflowvlm.shared.errors import UserError


class Engine:
    """Notes what is loaded and dropped."""

    def __init__(self) -> None:
        self.held: set[int] = set()
        self.loads: list[int] = []
        self.versions = AdapterVersions(self.add, self.remove, self.path_of, capacity=2)

    async def add(self, version: int, path: Path) -> None:
        await asyncio.sleep(0)
        self.held.add(version)
        assert len(self.held) <= 2
        self.loads.append(version)

    async def remove(self, version: int) -> None:
        await asyncio.sleep(0)
        self.held.remove(version)

    async def path_of(self, version: int) -> Path:
        if version > 5:
            raise UnknownVersionError(str(version))
        return Path(f"v{version}")


def test_a_request_keeps_the_version_it_was_admitted_with() -> None:
    async def run() -> None:
        engine = Engine()
        await engine.versions.load(1, Path("v1"))
        async with engine.versions.admit(None) as admitted:
            await engine.versions.load(2, Path("v2"))
            assert admitted == 1
            assert engine.versions.newest == 2

    asyncio.run(run())


def test_a_version_in_flight_is_not_retired_and_goes_once_its_request_ends() -> None:
    async def run() -> None:
        engine = Engine()
        await engine.versions.load(1, Path("v1"))
        async with engine.versions.admit(None):
            await engine.versions.load(2, Path("v2"))
            await engine.versions.retire()
            assert engine.held == {1, 2}
        await engine.versions.retire()
        assert engine.held == {2}

    asyncio.run(run())


def test_an_adapter_that_is_removed_while_it_is_loaded_is_an_unknown_version_and_no_fault_of_the_user(
    tmp_path: Path,
) -> None:
    async def add(version: int, path: Path) -> None:
        if version == 1:
            path.rmdir()
        raise UserError(f"{path}: the sampler cannot apply it")

    async def remove(version: int) -> None:
        raise AssertionError("nothing was loaded")

    async def run() -> None:
        versions = AdapterVersions(add, remove)
        for version in (1, 2):
            (tmp_path / str(version)).mkdir()
        with pytest.raises(UnknownVersionError, match="version 1 was removed"):
            await versions.load(1, tmp_path / "1")
        with pytest.raises(UserError, match="cannot apply"):
            await versions.load(2, tmp_path / "2")
        assert versions.newest == 0

    asyncio.run(run())


def test_the_newest_version_stays_without_requests() -> None:
    async def run() -> None:
        engine = Engine()
        await engine.versions.load(3, Path("v3"))
        await engine.versions.retire()
        assert engine.held == {3}

    asyncio.run(run())


def test_a_pinned_version_is_fetched_once_for_many_requests_and_does_not_become_the_newest() -> None:
    async def run() -> None:
        engine = Engine()
        await engine.versions.load(4, Path("v4"))

        async def pinned() -> int:
            async with engine.versions.admit(2) as version:
                assert 2 in engine.held
                return version

        assert set(await asyncio.gather(*(pinned() for _ in range(8)))) == {2}
        assert engine.loads == [4, 2]
        assert engine.versions.newest == 4

    asyncio.run(run())


def test_retiring_while_a_pinned_version_is_being_fetched_keeps_it() -> None:
    async def run() -> None:
        engine = Engine()
        await engine.versions.load(4, Path("v4"))

        async def pinned() -> bool:
            async with engine.versions.admit(2):
                await asyncio.sleep(0)
                return 2 in engine.held

        held, *_ = await asyncio.gather(pinned(), *(engine.versions.retire() for _ in range(5)))
        assert held

    asyncio.run(run())


def test_a_full_engine_loads_the_next_version_once_one_is_free() -> None:
    async def run() -> None:
        engine = Engine()
        await engine.versions.load(1, Path("v1"))
        async with engine.versions.admit(1):
            await engine.versions.load(2, Path("v2"))
            async with engine.versions.admit(2):
                loading = asyncio.create_task(engine.versions.load(3, Path("v3")))
                await asyncio.sleep(0.02)
                assert not loading.done()
                assert engine.versions.newest == 2
            await asyncio.sleep(0.02)
            # Version 2 was the newest until now, so it made no room; version 1 does when its request ends.
            assert not loading.done()
        await asyncio.wait_for(loading, 1)
        assert engine.held == {2, 3}
        assert engine.versions.newest == 3

    asyncio.run(run())


def test_more_pinned_versions_than_fit_are_answered_in_turn() -> None:
    async def run() -> None:
        engine = Engine()
        await engine.versions.load(5, Path("v5"))

        async def pinned(version: int) -> int:
            async with engine.versions.admit(version) as admitted:
                assert version in engine.held
                await asyncio.sleep(0.001)
                return admitted

        asked = [1, 2, 3, 4, 5] * 4
        assert await asyncio.wait_for(asyncio.gather(*map(pinned, asked)), 5) == asked

    asyncio.run(run())


def test_an_unknown_version_is_refused_and_leaves_nothing_in_flight() -> None:
    async def run() -> None:
        engine = Engine()
        with pytest.raises(UnknownVersionError):
            async with engine.versions.admit(9):
                pass
        assert engine.versions.stats()["in_flight"] == 0

    asyncio.run(run())


def test_the_base_model_needs_no_adapter() -> None:
    async def run() -> None:
        engine = Engine()
        async with engine.versions.admit(None) as version:
            assert version == 0
        assert engine.loads == []

    asyncio.run(run())


def test_busy_time_is_the_time_with_requests_in_flight() -> None:
    async def run() -> None:
        engine = Engine()
        await asyncio.sleep(0.1)
        async with engine.versions.admit(0), engine.versions.admit(0):
            await asyncio.sleep(0.05)
        engine.versions.count(7)
        stats = engine.versions.stats()
        assert 0.05 <= stats["busy_s"] <= stats["up_s"] - 0.1 + 0.001
        assert (stats["responses"], stats["tokens"]) == (1, 7)

    asyncio.run(run())


def test_a_renewed_engine_gets_the_newest_adapter_again_and_others_when_they_are_asked_for() -> None:
    async def run() -> None:
        engine = Engine()
        await engine.versions.load(1, Path("v1"))
        await engine.versions.load(2, Path("v2"))
        await engine.versions.renew()
        assert engine.held == {2}
        assert engine.loads == [1, 2, 2]
        async with engine.versions.admit(1) as version:
            assert version == 1
            assert engine.held == {1, 2}

    asyncio.run(run())
