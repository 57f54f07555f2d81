"""The chat with a trained language model beside its base."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
import chromium
import llm_instruct
import pytest
from aiohttp.test_utils import TestServer
from common.command.choices import Method
from common.language import chat
from common.language.dialogues import prompt_ids
from llm_runs import loaded, pretrained, questions
from recipe_runs import without_pictures


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return questions(tmp_path_factory.mktemp("questions"))


@pytest.fixture(scope="session")
def talks(backbone: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, chat.Talk]:
    """A chat with a run of each kind, trained so hard that it answers otherwise than its base."""
    found = {}
    for method, lr in (("uora", 0.3), ("lora", 0.1), ("full", 0.05)):
        folder = tmp_path_factory.mktemp(method)
        options = llm_instruct.Options(
            method=Method(method), rank=8, lr=lr, data=str(data), model=str(backbone), validation=0.25, samples=0,
            epochs=4, batch=12, quiet=True, eval_every=4, output=folder / "out",
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            without_pictures(patch)
            llm_instruct.run(options)
        adapted, tokenizer, off = llm_instruct.restore(options, folder / "out")
        found[method] = chat.Talk(adapted.base, tokenizer, off, 6, 64)
    return found


def ask(talk: chat.Talk, *bodies: Any, **options: Any) -> list[tuple[int, Any]]:
    """Status and content of the replies to requests, in order."""

    async def go() -> list[tuple[int, Any]]:
        async with TestServer(chat.application(talk, "a <test>")) as server, aiohttp.ClientSession() as client:
            out = []
            for body in bodies:
                given = {"data": body} if isinstance(body, str | bytes) else {"json": body}
                async with client.post(server.make_url("/answer"), **{**given, **options}) as reply:
                    out.append((reply.status, await (reply.json() if "json" in reply.content_type else reply.text())))
            async with client.get(server.make_url("/")) as page:
                out.append((page.status, await page.text()))
            return out

    talk.turn = asyncio.Lock()
    return asyncio.run(go())


class TestChat:
    SAID: ClassVar[dict[str, Any]] = {"messages": [{"role": "user", "content": "what colour is the fox ?"}]}

    @pytest.mark.parametrize("method", ["uora", "lora", "full"])
    @pytest.mark.slow
    def test_base_and_adapter_answer_side_by_side(
        self, method: str, talks: dict[str, chat.Talk], backbone: Path
    ) -> None:
        talk = talks[method]
        asked = [{**self.SAID, "side": side} for side in ("adapter", "base", "adapter")]
        *answers, (status, page) = ask(talk, *asked)
        first, base, again = (reply["answer"] for code, reply in answers if code == 200)
        assert first == again != base
        model, tokenizer, _ = loaded(backbone)
        prompt = prompt_ids(self.SAID["messages"], tokenizer)
        assert base == llm_instruct.generate(model, [prompt], tokenizer, 6, 64)[0]
        assert status == 200 and "a &lt;test&gt;" in page and "http" not in page

    @pytest.mark.slow
    def test_a_conversation_goes_on(self, talks: dict[str, chat.Talk]) -> None:
        turns = [*self.SAID["messages"], {"role": "assistant", "content": "red"}, {"role": "user", "content": "owl ?"}]
        assert ask(talks["uora"], {"side": "adapter", "messages": turns})[0][0] == 200

    @pytest.mark.slow
    def test_bad_prompts(self, talks: dict[str, chat.Talk]) -> None:
        user = {"role": "user", "content": "x"}
        bodies = {
            b"{": "expected {", b"\xff": "expected {", b"[" * 5000: "expected {", "[]": "expected {", "3": "expected {",
            '{"side": "adapter"}': "expected {",
            json.dumps({"side": "left", "messages": [user]}): "no side 'left'",
            json.dumps({"side": ["base"], "messages": [user]}): "no side",
            json.dumps({"side": "base", "messages": []}): "messages need",
            json.dumps({"side": "base", "messages": [{**user, "role": ["user"]}]}): "messages need",
            json.dumps({"side": "base", "messages": [{**user, "content": 3}]}): "messages need",
            json.dumps({"side": "base", "messages": [{**user, "content": " \n"}]}): "nothing to answer",
            json.dumps({"side": "base", "messages": [user, {**user, "role": "assistant"}]}): "nothing to answer",
            json.dumps({"side": "base", "messages": [{**user, "content": "the " * 70}]}): "tokens, the model reads 64",
        }  # fmt: skip
        replies = ask(talks["uora"], *bodies, headers={"Content-Type": "application/json"})
        for (status, reply), words in zip(replies, bodies.values(), strict=False):
            assert status == 400 and words in reply["error"], reply
        odd = [{**user, "content": text} for text in ("\ud800", "\x00 the", "[END] [PAD] [UNK]", "🦊")]
        replies = ask(talks["uora"], *({"side": "base", "messages": [turn]} for turn in odd))
        assert [status for status, _ in replies] == [200] * 5

    def test_only_this_machine_and_this_page(self, talks: dict[str, chat.Talk]) -> None:
        body = {**self.SAID, "side": "base"}
        assert ask(talks["uora"], body, headers={"Host": "evil.example:8000"})[0][0] == 403
        status, reply = ask(talks["uora"], json.dumps(body), headers={"Content-Type": "text/plain"})[0]
        assert status == 400 and "application/json" in reply["error"]
        assert ask(talks["uora"], "x" * (chat.MOST_BYTES + 1))[0][0] == 413


@pytest.mark.slow
@pytest.mark.skipif(chromium.FOUND is None, reason="no Chromium is installed")
def test_a_person_asks_in_a_browser_and_both_sides_answer(talks: dict[str, chat.Talk], tmp_path: Path) -> None:
    talk = talks["uora"]
    question = TestChat.SAID["messages"][0]["content"]
    expected = [talk.answer(side, TestChat.SAID["messages"]) for side in ("adapter", "base")]
    rows = "['adapter', 'base'].map(side => [...document.querySelectorAll(`#${side} li`)].map(row => row.textContent))"
    free = "!document.querySelector('[type=submit]').disabled"
    answered = f"{free} && document.querySelectorAll('li').length === 4"

    async def go() -> None:
        async with (
            TestServer(chat.application(talk, "a <test>"), host="127.0.0.1") as server,
            chromium.opened(str(server.make_url("/")), tmp_path) as page,
        ):
            assert await page.value("document.title") == "a <test>"
            await page.write(question)
            await page.enter()
            await page.until(answered)
            assert await page.value(rows) == [[question, answer] for answer in expected]
            assert page.troubles == []
            await page.write("the")
            await page.enter(shift=True)
            await page.write("owl " * 70)
            await page.enter()
            await page.until(f"{free} && document.querySelectorAll('.error').length === 2")
            assert [len(side) for side in await page.value(rows)] == [4, 4]
            assert all("tokens, the model reads 64; clear it" in side[-1] for side in await page.value(rows))
            await page.value("document.querySelector('#clear').click()")
            assert await page.value(rows) == [[], []]
            await page.write(question)
            await page.enter()
            await page.until(answered)
            assert await page.value(rows) == [[question, answer] for answer in expected]

    talk.turn = asyncio.Lock()
    asyncio.run(go())
