"""The page in a real Chromium: it loads nothing, shows what was played, filters by keyboard, runs nothing of a run."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gflowvlm.cli.commands.report import run_page
from gflowvlm.shared.trajectory import Trajectory
from tests.studies.report.chromium import Chromium, find_chromium
from tests.studies.report.played import HOSTILE, hostile, numberline_group, write_run

PROGRAM = find_chromium()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium here; `apt-get install chromium` brings one"),
]

SHOWN = "document.querySelectorAll('#list li').length"
DETAIL = "document.getElementById('detail').innerText"


def in_browser(page: Path, look: Callable[[Chromium], Awaitable[None]]) -> Chromium:
    """Opens a page, looks at it, and returns the browser for what it has recorded."""

    async def all_of_it() -> Chromium:
        assert PROGRAM is not None
        async with Chromium(PROGRAM) as browser:
            await browser.open(page)
            await look(browser)
        return browser

    return asyncio.run(asyncio.wait_for(all_of_it(), 300))


def page_of(folder: Path, groups: list[list[Trajectory]]) -> Path:
    """Writes the page of a run with these trajectories."""
    page = folder / "page.html"
    page.write_text(run_page(write_run(folder / "run", groups).root, 1000, None), encoding="utf-8")
    return page


async def choose(browser: Chromium, control: str, value: str) -> None:
    """Chooses by hand: focus on the control, type the beginning of an entry."""
    await browser.value(f"document.getElementById('filter-{control}').focus()")
    await browser.press(*value)


def test_trajectories_are_browsed_and_filtered_by_keyboard(tmp_path: Path) -> None:
    groups = [numberline_group(n, seed=n, version=n) for n in range(4)]
    page, second_prompt = page_of(tmp_path, groups), groups[2][2].steps[1].prompt

    async def look(browser: Chromium) -> None:
        assert await browser.value(SHOWN) == 20
        assert await browser.value("document.querySelectorAll('#detail img').length") > 0
        await browser.until("[...document.images].every((image) => image.complete && image.naturalWidth === 64)")
        await choose(browser, "maker", "expert")
        assert await browser.value(SHOWN) == 4
        assert "made by the expert" in await browser.value(DETAIL)
        await browser.press("ArrowDown")
        assert await browser.value(SHOWN) == 16
        await choose(browser, "version", "2")
        assert await browser.value("document.getElementById('count').textContent") == "4 of 20 shown trajectories match"
        await choose(browser, "end", "invalid")
        assert await browser.value(SHOWN) == 1
        text = await browser.value(DETAIL)
        for said in (
            "g00000002-0a/2",
            "not solved",
            "fly",
            "inadmissible",
            "log P(action) -0.500",
            "-0.25",
            "thinking of it",
        ):
            assert said in text
        assert await browser.value("document.querySelectorAll('#detail details pre')[1].textContent") == second_prompt
        await browser.value("document.querySelector('#filters button').click()")
        await browser.until(f"{SHOWN} === 20")
        await browser.value("document.getElementById('filter-text').focus()")
        await browser.press(*"000003-0a/1")
        assert await browser.value(SHOWN) == 1
        await browser.value("document.querySelector('#filters button').click()")
        await browser.until(f"{SHOWN} === 20")
        await browser.value("document.querySelector('#list button').focus()")
        await browser.press("ArrowDown")
        assert "g00000003-0a/3" in await browser.value(DETAIL)
        await browser.press("ArrowDown", "ArrowUp", "ArrowUp")
        assert "g00000003-0a/4" in await browser.value(DETAIL)

    browser = in_browser(page, look)
    assert browser.requested == [page.resolve().as_uri()]
    assert browser.console == []


def test_every_control_is_reached_by_tab(tmp_path: Path) -> None:
    page = page_of(tmp_path, [numberline_group(0, seed=0)])

    async def look(browser: Chromium) -> None:
        reached = set()
        for _ in range(60):
            await browser.press("Tab")
            reached.add(await browser.value("document.activeElement.id || document.activeElement.closest('[id]')?.id"))
        controls = await browser.value("[...document.querySelectorAll('select, input')].map((element) => element.id)")
        assert {*controls, "instance-only", "list", "filters", "configuration"} <= reached

    in_browser(page, look)


def test_the_tree_shows_samples_beside_the_target(tmp_path: Path) -> None:
    page = page_of(tmp_path, [numberline_group(n, seed=n) for n in range(3)])

    async def look(browser: Chromium) -> None:
        assert await browser.value("document.getElementById('instance').value") == "numberline/id/2"
        text = await browser.value("document.getElementById('tree-part').innerText")
        assert "4 trajectories of the policy, by adapter version 3. Total variation" in text
        assert "fly (inadmissible)" in text
        assert await browser.value("document.querySelectorAll('#tree-rows .unseen').length") > 0
        assert await browser.value("document.querySelectorAll('#tree-rows rect.wanted').length") > 2
        await browser.value("document.getElementById('instance').focus()")
        await browser.press("ArrowUp")
        await browser.until("document.getElementById('instance').value === 'numberline/id/1'")
        await browser.value("document.getElementById('instance-only').click()")
        await browser.until(f"{SHOWN} === 5")
        assert "numberline/id/1" in await browser.value(DETAIL)

    in_browser(page, look)


def test_nothing_that_a_model_wrote_is_run_or_hidden(tmp_path: Path) -> None:
    page = page_of(tmp_path, [[hostile(t) for t in numberline_group(0, seed=0)]])

    async def look(browser: Chromium) -> None:
        assert await browser.value("document.title") == "run – GFlowVLM run"
        assert await browser.value("document.scripts.length") == 3
        assert await browser.value("document.querySelectorAll('[onerror], img:not([alt])').length") == 0
        text = await browser.value(DETAIL)
        assert HOSTILE.split("\u202e")[0].rstrip() in text
        assert "\\u202egnp.exe \\u2028 \\u001b[2J" in text
        await browser.value("document.getElementById('instance-only').click()")
        await browser.until(f"{SHOWN} === 5")

    browser = in_browser(page, look)
    assert browser.requested == [page.resolve().as_uri()]
    assert browser.console == []


def test_a_script_that_got_into_the_page_would_not_be_run(tmp_path: Path) -> None:
    page = page_of(tmp_path, [numberline_group(0, seed=0)])
    text = page.read_text(encoding="utf-8")
    run = "document.title='owned'"
    attack = f"<script>{run}</script><img src='https://example.org/x.png' onerror=\"{run}\">"
    page.write_text(text.replace("<main>", f"<main>{attack}"), encoding="utf-8")

    async def look(browser: Chromium) -> None:
        assert await browser.value("document.title") == "run – GFlowVLM run"
        assert await browser.value(SHOWN) == 5

    browser = in_browser(page, look)
    assert any("Content Security Policy" in message for message in browser.console)


def test_a_thousand_trajectories_are_small_and_browsable(tmp_path: Path) -> None:
    group = numberline_group(0, seed=0)
    copies = [
        [replace(t, trajectory_id=f"{n}/{at}", group_id=f"g{n:08d}-0a") for at, t in enumerate(group)]
        for n in range(200)
    ]
    page = page_of(tmp_path, copies)

    async def look(browser: Chromium) -> None:
        assert (
            await browser.value("document.getElementById('count').textContent")
            == "1000 of 1000 shown trajectories match"
        )
        assert await browser.value(SHOWN) == 100
        await browser.value("document.getElementById('more').click()")
        assert await browser.value(SHOWN) == 200

    in_browser(page, look)
    assert page.stat().st_size < 20e6
