"""A browser drops its connection to the chat before it has sent its question: one line in the log, and no traceback."""

from __future__ import annotations

import asyncio
import logging
import socket
from types import SimpleNamespace

import pytest
from aiohttp import web
from common.language import chat

HEAD = b"POST /answer HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
BODIES = {
    "in the body": b"Content-Length: 500\r\n\r\n{",
    "in a chunk": b"Transfer-Encoding: chunked\r\n\r\n50\r\n{",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=list(BODIES))
def test_is_one_line_in_the_log(body: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def go() -> None:
        talk = SimpleNamespace(turn=asyncio.Lock())
        runner = web.AppRunner(chat.application(talk, "test"))  # type: ignore[arg-type]
        await runner.setup()
        door = chat.listen(0)
        await web.SockSite(runner, door).start()
        with socket.create_connection(door.getsockname()) as browser:
            browser.sendall(HEAD + body)
            await asyncio.sleep(0.3)
        for _ in range(100):
            await asyncio.sleep(0.05)
            if caplog.records:
                break
        await runner.cleanup()

    with caplog.at_level(logging.WARNING):
        asyncio.run(go())
    (record,) = caplog.records
    assert record.getMessage() == "a browser left before its question was read"
    assert record.exc_info is None
