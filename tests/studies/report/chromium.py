"""A real Chromium without a window, driven over its DevTools protocol."""

import asyncio
import base64
import contextlib
import itertools
import json
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TIMEOUT_S = 30.0


def find_chromium() -> str | None:
    """Returns the program of an installed Chromium, None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name)) is not None), None)


class Chromium:
    """One page in one browser; everything that waits ends after `TIMEOUT_S`.

    Attributes:
        requested: Every address that the browser was asked for, `data:` left out.
        console: Errors and messages of the page, violations of its policy among them.
    """

    def __init__(self, program: str, width: int = 1366, height: int = 900) -> None:
        self.requested: list[str] = []
        self.console: list[str] = []
        self._program = program
        self._size = (width, height)
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._loaded = asyncio.Event()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as opened:
            profile = opened.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            await self._start(profile)
            opened.push_async_callback(self._stop)
            session = await opened.enter_async_context(aiohttp.ClientSession())
            port = await self._port(Path(profile) / "DevToolsActivePort")
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                pages = [target for target in await answer.json() if target["type"] == "page"]
            connection = session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)
            self._socket = await opened.enter_async_context(connection)
            self._reader = asyncio.create_task(self._read())
            opened.callback(self._reader.cancel)
            for domain in ("Page", "Network", "Runtime", "Log"):
                await self.call(f"{domain}.enable")
            width, height = self._size
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            await self.call("Emulation.setDeviceMetricsOverride", **metrics)
            self._opened = opened.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._opened.aclose()

    async def open(self, file: Path) -> None:
        """Loads a file and waits until its script has ended."""
        self._loaded.clear()
        await self.call("Page.navigate", url=file.resolve().as_uri())
        await asyncio.wait_for(self._loaded.wait(), TIMEOUT_S)
        await self.until("document.documentElement.dataset.readyMs !== undefined")

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result."""
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        answer = await asyncio.wait_for(self._answers[number], TIMEOUT_S)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]  # type: ignore[no-any-return]

    async def value(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression in the page."""
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, condition: str) -> None:
        """Waits until a JavaScript condition holds."""
        async with asyncio.timeout(TIMEOUT_S):
            while not await self.value(f"Boolean({condition})"):
                await asyncio.sleep(0.05)

    async def press(self, *keys: str) -> None:
        """Presses keys, named as in KeyboardEvent.key; a single character is typed."""
        for key in keys:
            text = {"text": key} if len(key) == 1 else {}
            codes = {"Tab": 9, "Enter": 13, "ArrowUp": 38, "ArrowDown": 40}
            code = {"windowsVirtualKeyCode": codes[key], "code": key} if key in codes else {}
            if key == "Enter":
                text = {"text": "\r"}
            for kind in ("keyDown", "keyUp"):
                typed = text if kind == "keyDown" else {}
                await self.call("Input.dispatchKeyEvent", type=kind, key=key, **code, **typed)

    async def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Saves what is seen, or the whole page, as a PNG."""
        result = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(result["data"]))

    async def _start(self, profile: str) -> None:
        self._process = await asyncio.create_subprocess_exec(
            self._program,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--remote-debugging-port=0",
            f"--user-data-dir={profile}",
            "about:blank",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )

    async def _stop(self) -> None:
        self._process.terminate()
        await asyncio.wait_for(self._process.wait(), TIMEOUT_S)

    async def _port(self, file: Path) -> str:
        async with asyncio.timeout(TIMEOUT_S):
            while not (file.exists() and "\n" in file.read_text()):
                assert self._process.returncode is None, "Chromium has ended"
                await asyncio.sleep(0.05)
        return file.read_text().splitlines()[0]

    async def _read(self) -> None:
        async for message in self._socket:
            event = json.loads(message.data)
            if "id" in event:
                self._answers.pop(event["id"]).set_result(event)
            elif event["method"] == "Page.loadEventFired":
                self._loaded.set()
            elif event["method"] == "Network.requestWillBeSent":
                url = event["params"]["request"]["url"]
                if not url.startswith("data:"):
                    self.requested.append(url)
            elif event["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                self.console.append(json.dumps(event["params"]))
