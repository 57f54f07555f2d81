"""A page in a headless Chromium, driven by its DevTools protocol: what a person would do and see."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

FOUND = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
"""The program; None where there is none."""
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--remote-debugging-port=0",
)  # fmt: skip


class Page:
    """The page that `opened` opened."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.sent = socket, 0
        self.troubles: list[str] = []
        """Errors of its script, and what the console said of errors."""

    async def call(self, method: str, **given: Any) -> dict[str, Any]:
        """A command of the DevTools protocol."""
        self.sent += 1
        await self.socket.send_json({"id": self.sent, "method": method, "params": given})
        while True:
            told = await self.socket.receive_json()
            if told.get("id") == self.sent:
                assert "error" not in told, (method, told["error"])
                return told["result"]
            if told.get("method") == "Runtime.exceptionThrown":
                self.troubles.append(str(told["params"]["exceptionDetails"]))
            entry = told.get("params", {}).get("entry", {})
            if told.get("method") == "Log.entryAdded" and entry.get("level") == "error":
                self.troubles.append(entry["text"])

    async def value(self, script: str) -> Any:
        """What an expression gives in the page."""
        told = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    async def until(self, script: str, seconds: float = 30) -> None:
        """Wait for an expression to be true."""
        async with asyncio.timeout(seconds):
            while not await self.value(script):
                await asyncio.sleep(0.05)

    async def write(self, text: str) -> None:
        """Into the field that has the focus, once one has it: autofocus acts when the page is first drawn, after it has
        loaded."""
        await self.until("document.activeElement.matches('input, textarea')")
        await self.call("Input.insertText", text=text)

    async def enter(self, shift: bool = False) -> None:
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "modifiers": 8 if shift else 0}
        await self.call("Input.dispatchKeyEvent", type="keyDown", text="\r", **key)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    async def picture(self, path: Path) -> None:
        """A PNG file of what is to be seen."""
        path.write_bytes(base64.b64decode((await self.call("Page.captureScreenshot"))["data"]))


@contextlib.asynccontextmanager
async def opened(url: str, folder: Path, width: int = 1000, height: int = 640) -> AsyncIterator[Page]:
    """Open a page, with a new profile in `folder`."""
    assert FOUND is not None
    words = (*FLAGS, f"--user-data-dir={folder}", f"--window-size={width},{height}", "about:blank")
    quiet = asyncio.subprocess.DEVNULL
    browser = await asyncio.create_subprocess_exec(FOUND, *words, stdout=quiet, stderr=quiet)
    try:
        async with asyncio.timeout(60):
            port = folder / "DevToolsActivePort"
            while not (port.exists() and port.read_text().strip()):
                await asyncio.sleep(0.05)
        async with aiohttp.ClientSession() as client:
            async with client.get(f"http://127.0.0.1:{port.read_text().split()[0]}/json/list") as reply:
                (address,) = (tab["webSocketDebuggerUrl"] for tab in await reply.json() if tab["type"] == "page")
            async with client.ws_connect(address, max_msg_size=0) as socket:
                page = Page(socket)
                for domain in ("Runtime", "Log", "Page"):
                    await page.call(f"{domain}.enable")
                await page.call(
                    "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
                )
                await page.call("Emulation.setFocusEmulationEnabled", enabled=True)
                went = await page.call("Page.navigate", url=url)
                assert "errorText" not in went, went
                await page.until("document.readyState === 'complete' && location.href !== 'about:blank'")
                yield page
    finally:
        browser.terminate()
        await browser.wait()
