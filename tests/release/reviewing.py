"""A rater's browser: headless Chromium driven by its DevTools protocol, with nothing but a websocket."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--mute-audio",
    "--remote-debugging-port=0", "--window-size=1360,900",
]  # fmt: skip
KEYS = {"ArrowDown": 40, "ArrowUp": 38, "ArrowLeft": 37, "ArrowRight": 39, "Enter": 13, "Escape": 27, "Tab": 9}


def chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


class Browser:
    """`async with Browser(folder) as page`: one page whose downloads land in the folder, and what it asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[str] = []
        self.errors: list[dict[str, Any]] = []
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def __aenter__(self) -> Browser:
        profile = Path(tempfile.mkdtemp(prefix="profile-", dir=self.folder))  # a used one names a port of before
        program = chromium()
        assert program is not None
        command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            await self._connect(profile)
        except BaseException:
            self._stop()
            raise
        return self

    async def _connect(self, profile: Path) -> None:
        port = (await asyncio.to_thread(_text_of, profile / "DevToolsActivePort")).split()[0]
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            target = next(one for one in await answer.json() if one["type"] == "page")
        self._socket = await self._session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0)
        self._reader = asyncio.create_task(self._read())
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            await self.call(f"{domain}.enable")
        await self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.folder))

    def _stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._reader.cancel()
        await self._socket.close()
        await self._session.close()
        self._stop()

    async def _read(self) -> None:
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                self._answers.pop(said["id"]).set_result(said)
            elif said["method"] == "Network.requestWillBeSent":
                self.requests.append(said["params"]["request"]["url"])
            elif said["method"] == "Runtime.exceptionThrown" or said["method"] == "Log.entryAdded":
                self.errors.append(said["params"])

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        said = await asyncio.wait_for(self._answers[number], 60)
        assert "error" not in said, said
        return dict(said["result"])

    async def open(self, page: Path) -> None:
        await self.call("Page.navigate", url=page.as_uri())
        await self.until("document.readyState === 'complete'")

    async def value(self, expression: str) -> Any:
        """What an expression is in the page."""
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, expression: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not await self.value(expression):
            assert time.monotonic() < end, f"{expression} did not come true; the page said {self.errors}"
            await asyncio.sleep(0.1)

    async def press(self, *keys: str) -> None:
        """Real key presses, as a keyboard sends them."""
        for key in keys:
            code = KEYS.get(key) or ord(key.upper())
            text = {} if key in KEYS and key != "Enter" else {"text": "\r" if key == "Enter" else key}
            known = {"key": key, "windowsVirtualKeyCode": code}
            await self.call("Input.dispatchKeyEvent", type="keyDown", **known, **text)
            await self.call("Input.dispatchKeyEvent", type="keyUp", **known)

    async def type(self, text: str) -> None:
        await self.call("Input.insertText", text=text)

    async def choose(self, file: Path) -> None:
        """Gives the page's file field a file, as its dialog would."""
        root = await self.call("DOM.getDocument")
        node = await self.call("DOM.querySelector", nodeId=root["root"]["nodeId"], selector="#file")
        await self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node["nodeId"])

    async def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode((await self.call("Page.captureScreenshot"))["data"]))

    async def downloaded(self, pattern: str) -> Path:
        """The file of that pattern, once it is whole."""
        end = time.monotonic() + 30
        while time.monotonic() < end:
            for file in self.folder.glob(pattern):
                if file.stat().st_size and not list(self.folder.glob("*.crdownload")):
                    return file
            await asyncio.sleep(0.1)
        raise AssertionError(f"no {pattern} in {[p.name for p in self.folder.iterdir()]}")


def _text_of(file: Path) -> str:
    end = time.monotonic() + 60
    while not (file.exists() and file.read_text().strip()):
        assert time.monotonic() < end, "Chromium did not start within a minute"
        time.sleep(0.1)
    return file.read_text()
