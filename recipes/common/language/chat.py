"""A chat in the browser with a fine-tuned language model, its base beside it. For one person, on their own machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch
from aiohttp import web

from ..errors import DataError, OutputError
from .answers import generate
from .dialogues import Messages, prompt_ids

LOG = logging.getLogger(__name__)
HOST = "127.0.0.1"
SIDES = ("base", "adapter")
MOST_BYTES = 256 * 1024
NAMES = ("127.0.0.1", "localhost", "[::1]")
"""Under another name a page from elsewhere may be asking (DNS rebinding)."""


class BadRequest(Exception):
    """The message says what is wrong with a request."""


@dataclass
class Talk:
    """A model that can answer as trained and as it was before.

    Args:
        off: of the trained parameters, the values that make the model its base.
        new: tokens of an answer at most.
        limit: tokens of a conversation at most.
    """

    model: Any
    tokenizer: Any
    off: dict[torch.nn.Parameter, torch.Tensor]
    new: int
    limit: int
    precision: str = "no"
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def answer(self, side: str, turns: Messages) -> str:
        """The next turn.

        Raises:
            BadRequest: the conversation is too long, or not one for the model's template.
        """
        try:
            ids = prompt_ids(turns, self.tokenizer)
        except DataError as error:
            raise BadRequest(str(error)) from error
        if len(ids) >= self.limit:
            raise BadRequest(f"the conversation has {len(ids)} tokens, the model reads {self.limit}; clear it")
        with self.base() if side == "base" else contextlib.nullcontext():
            return generate(self.model, [ids], self.tokenizer, self.new, self.limit, self.precision)[0]

    @contextlib.contextmanager
    def base(self) -> Iterator[None]:
        """The model without what it was taught."""
        trained = {p: p.detach().clone() for p in self.off}
        _put(self.off)
        try:
            yield
        finally:
            _put(trained)


def application(talk: Talk, title: str) -> web.Application:
    """`/` is the page; `/answer` takes {"side": ..., "messages": [...]} and gives {"answer": ...} or {"error": ...}."""
    page = PAGE.replace("{{title}}", escape(title))

    async def show(request: web.Request) -> web.Response:
        inline = "img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
        policy = f"default-src 'none'; connect-src 'self'; {inline}"
        headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
        return web.Response(text=page, content_type="text/html", headers=headers)

    async def answer(request: web.Request) -> web.Response:
        try:
            side, turns = _read(request.content_type, await request.read())
            async with talk.turn:  # one at a time: the two sides share their weights
                return web.json_response({"answer": await asyncio.to_thread(talk.answer, side, turns)})
        except BadRequest as error:
            return web.json_response({"error": str(error)}, status=400)
        except (ConnectionError, web.RequestPayloadError):  # aiohttp would log a traceback
            LOG.warning("a browser left before its question was read")
            return web.Response(status=400)

    app = web.Application(client_max_size=MOST_BYTES, middlewares=[_only_here])
    app.add_routes([web.get("/", show), web.post("/answer", answer)])
    return app


def listen(port: int) -> socket.socket:
    """The port, for `serve`: to be had before a large model is loaded in vain.

    Raises:
        OutputError: it is taken, or not for this user.
    """
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        raise OutputError(f"port {port} of {HOST} cannot be had: {reason}; give another --port") from error


def serve(talk: Talk, door: socket.socket, title: str) -> None:
    """Answer until Ctrl-C."""
    web.run_app(application(talk, title), sock=door)


@web.middleware
async def _only_here(request: web.Request, handler: Any) -> web.StreamResponse:
    name = request.host.rpartition(":")[0] if not request.host.endswith("]") else request.host
    if (name or request.host) not in NAMES:
        raise web.HTTPForbidden(text=f"this page is at http://{HOST}, not at {request.host}")
    return await handler(request)


def _read(kind: str, body: bytes) -> tuple[str, Messages]:
    """Side and conversation of a request.

    Raises:
        BadRequest: it is not in the form of one.
    """
    if kind != "application/json":  # another site's form could send any other
        raise BadRequest(f"expected application/json, got {kind}")
    try:
        given = json.loads(body)
        side, turns = given["side"], given["messages"]
        said = [(turn["role"], turn["content"]) for turn in turns]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadRequest('expected {"side": "adapter", "messages": [{"role": "user", "content": "..."}]}') from error
    if side not in SIDES:
        raise BadRequest(f"there is no side {side!r}, only {' and '.join(SIDES)}")
    if not said or any(role not in ("system", "user", "assistant") or not isinstance(c, str) for role, c in said):
        raise BadRequest("messages need the role system, user or assistant, and text as content")
    if said[-1][0] != "user" or not said[-1][1].strip():
        raise BadRequest("there is nothing to answer: write something")
    # Half of a surrogate pair cannot be written as UTF-8, and tokenizers refuse it.
    return side, [{"role": role, "content": c.encode("utf-8", "replace").decode().strip()} for role, c in said]


def _put(values: dict[torch.nn.Parameter, torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in values.items():
            parameter.copy_(value)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{{title}}</title>
<style>
:root { --page: #f6f7f9; --panel: #fff; --ink: #1f2933; --soft: #5b6774; --line: #dde2e8; --mine: #e3edf8;
  --accent: #1f5fa8; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --panel: #1d232a; --ink: #e6eaee; --soft: #9fabb8;
  --line: #323b45; --mine: #22364b; --accent: #8ab8ee; --bad: #ff8f85; } }
* { box-sizing: border-box; }
body { margin: 0; height: 100dvh; display: flex; flex-direction: column; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.1rem; margin: 0; padding: .8rem 1.25rem; }
main { flex: 1; min-height: 0; display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; padding: 0 1.25rem; }
section { display: flex; flex-direction: column; min-height: 0; min-width: 0; background: var(--panel);
  border: 1px solid var(--line); border-radius: 10px; }
h2 { font-size: .9rem; font-weight: 550; color: var(--soft); margin: 0; padding: .5rem .9rem;
  border-bottom: 1px solid var(--line); }
ol { flex: 1; overflow-y: auto; list-style: none; margin: 0; padding: .9rem; }
li { white-space: pre-wrap; overflow-wrap: anywhere; margin-bottom: .7rem; }
.user { background: var(--mine); border-radius: 8px; padding: .45rem .7rem; }
.wait, .empty { color: var(--soft); } .error { color: var(--bad); }
form { display: flex; gap: .6rem; padding: 1rem 1.25rem; }
textarea { flex: 1; resize: none; font: inherit; color: inherit; background: var(--panel); padding: .55rem .7rem;
  border: 1px solid var(--line); border-radius: 8px; }
button { font: inherit; padding: 0 1.1rem; border-radius: 8px; border: 1px solid var(--line); cursor: pointer;
  background: var(--panel); color: var(--ink); }
button[type=submit] { background: var(--accent); color: var(--page); border-color: var(--accent); }
button:disabled { opacity: .5; cursor: default; }
@media (max-width: 640px) { main { grid-template-columns: 1fr; grid-template-rows: 1fr 1fr; } }
</style>
</head>
<body>
<h1>{{title}}</h1>
<main>
<section aria-label="With adapter"><h2>With what it was taught</h2><ol id="adapter" aria-live="polite"></ol></section>
<section aria-label="Base"><h2>Base, without it</h2><ol id="base" aria-live="polite"></ol></section>
</main>
<form>
<textarea rows="2" aria-label="Message" placeholder="Message; Enter sends it" autofocus></textarea>
<button type="submit">Send</button>
<button type="button" id="clear">Clear</button>
</form>
<script>
const sides = ["adapter", "base"], said = {adapter: [], base: []};
const form = document.querySelector("form"), text = document.querySelector("textarea");
const send = document.querySelector("[type=submit]"), clear = document.querySelector("#clear");

function line(side, kind, content) {
  const item = document.createElement("li");
  item.className = kind;
  item.textContent = content;
  const list = document.getElementById(side);
  list.append(item);
  list.scrollTop = list.scrollHeight;
  return item;
}

async function ask(side, content) {
  line(side, "user", content);
  const item = line(side, "wait", "...");
  const turns = [...said[side], {role: "user", content}];
  try {
    const reply = await fetch("/answer", {method: "POST", headers: {"Content-Type": "application/json"},
      body: JSON.stringify({side, messages: turns})});
    const found = await reply.json().catch(() => ({error: `${reply.status} ${reply.statusText}`}));
    if (found.error !== undefined) throw new Error(found.error);
    said[side] = [...turns, {role: "assistant", content: found.answer}];
    item.className = found.answer ? "" : "empty";
    item.textContent = found.answer || "(it says nothing)";
  } catch (error) {
    item.className = "error";
    item.textContent = error.message;
  }
  item.parentElement.scrollTop = item.parentElement.scrollHeight;
}

form.addEventListener("submit", async event => {
  event.preventDefault();
  const content = text.value.trim();
  if (!content || send.disabled) return;
  text.value = "";
  send.disabled = clear.disabled = true;
  await Promise.all(sides.map(side => ask(side, content)));
  send.disabled = clear.disabled = false;
  text.focus();
});
text.addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); form.requestSubmit(); }
});
clear.addEventListener("click", () => {
  for (const side of sides) { said[side] = []; document.getElementById(side).replaceChildren(); }
  text.focus();
});
</script>
</body>
</html>
"""
