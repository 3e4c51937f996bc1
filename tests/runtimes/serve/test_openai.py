"""OpenAI's interface, asked by OpenAI's own client; what it answers is held against the model loaded here."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import serving
from serving import Server

from runtimes.load import load
from runtimes.tasks import Embedder, Generator

PROMPT = "hello"
MESSAGES: Any = [{"role": "user", "content": "hi"}]
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bundles")
    return {
        "llm": serving.write_decoder(root / "llm").path,
        "plain": serving.write_decoder(root / "plain", seed=1, template="").path,
        "enc": serving.write_encoder(root / "enc").path,
        "cls": serving.write_classifier(root / "cls").path,
    }


@pytest.fixture(scope="module")
def server(bundles: dict[str, Path]) -> Iterator[Server]:
    named = [word for name, path in bundles.items() for word in ("--name", f"{name}={path}")]
    with serving.serving(*named, "--workers", "1", "--watch", "0") as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30.0) as found:
        yield found


@pytest.fixture(scope="module")
def web(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30.0) as found:
        yield found


@pytest.fixture(scope="module")
def model(bundles: dict[str, Path]) -> Iterator[Generator]:
    with load(bundles["llm"], cache=False) as loaded:
        assert isinstance(loaded, Generator)
        yield loaded


@pytest.fixture(scope="module")
def embedder(bundles: dict[str, Path]) -> Iterator[Embedder]:
    with load(bundles["enc"], cache=False) as loaded:
        assert isinstance(loaded, Embedder)
        yield loaded


def refusal(caught: pytest.ExceptionInfo[openai.APIStatusError]) -> tuple[int, str | None, str | None]:
    """Status, the field it is about, and the code; the message is a line for people."""
    body: Any = caught.value.body
    assert set(body) == {"message", "type", "param", "code"}
    assert "\n" not in body["message"]
    return caught.value.status_code, body["param"], body["code"]


class TestEmbeddings:
    def test_vectors_are_those_of_the_model(self, client: openai.OpenAI, embedder: Embedder) -> None:
        texts = ["a cat", "paris is a city", "dog"]
        found = client.embeddings.create(model="enc", input=texts)  # the client asks for base64, and reads it
        assert [one.index for one in found.data] == [0, 1, 2]
        np.testing.assert_allclose([one.embedding for one in found.data], embedder.embed(texts), rtol=1e-6)
        assert found.model == "enc"
        assert found.usage.prompt_tokens == found.usage.total_tokens == 4 + 6 + 3

    def test_numbers_and_base64_are_the_same(self, web: httpx.Client) -> None:
        told = [
            web.post("/v1/embeddings", json={"model": "enc", "input": "a cat", "encoding_format": form}).json()
            for form in ("float", "base64")
        ]
        numbers, text = (one["data"][0]["embedding"] for one in told)
        np.testing.assert_array_equal(np.float32(numbers), np.frombuffer(base64.b64decode(text), "<f4"))

    def test_dimensions_are_taken_where_they_are_the_models(self, client: openai.OpenAI) -> None:
        assert len(client.embeddings.create(model="enc", input="a", dimensions=8).data[0].embedding) == 8
        with pytest.raises(openai.BadRequestError, match="has 8 dimensions") as caught:
            client.embeddings.create(model="enc", input="a", dimensions=4)
        assert refusal(caught) == (400, "dimensions", "invalid_value")

    @pytest.mark.parametrize("given", [[1, 2], [[1], [2]]])
    def test_token_ids_are_refused(self, client: openai.OpenAI, given: Any) -> None:
        with pytest.raises(openai.BadRequestError, match="token ids") as caught:
            client.embeddings.create(model="enc", input=given)
        assert refusal(caught) == (400, "input", "invalid_value")

    def test_no_texts(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match="no text"):
            client.embeddings.create(model="enc", input=[])

    def test_a_model_that_embeds_nothing(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match="text-generation"):
            client.embeddings.create(model="llm", input="a")
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="enc:adapter", input="a")

    def test_many_texts(self, client: openai.OpenAI, embedder: Embedder) -> None:
        texts = [f"cat {word} city" for word in ("the", "red", "paris")] * 3000
        found = client.embeddings.create(model="enc", input=texts)
        np.testing.assert_allclose([one.embedding for one in found.data], embedder.embed(texts), rtol=1e-5)


class TestCompletions:
    def test_a_text_goes_on(self, client: openai.OpenAI, model: Generator) -> None:
        found = client.completions.create(model="llm", prompt=PROMPT, max_tokens=12)
        wanted = model.generate(PROMPT, max_new_tokens=12)
        assert found.choices[0].text == wanted.text
        assert found.choices[0].finish_reason == wanted.finish
        assert found.object == "text_completion"
        assert found.usage is not None
        assert found.usage.completion_tokens == len(wanted.tokens)
        assert found.usage.prompt_tokens == wanted.prompt_tokens
        assert str(found.system_fingerprint).startswith("hasten-")

    def test_sixteen_tokens_where_no_number_is_named(self, client: openai.OpenAI, model: Generator) -> None:
        found = client.completions.create(model="llm", prompt=PROMPT)
        assert found.choices[0].text == model.generate(PROMPT, max_new_tokens=16).text

    def test_several_prompts_and_texts(self, client: openai.OpenAI) -> None:
        asked: Any = {"model": "llm", "max_tokens": 6, "n": 2, "temperature": 1.0, "seed": 7}
        both = client.completions.create(prompt=["one", "two"], **asked)
        assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
        for index, prompt in enumerate(("one", "two")):
            alone = client.completions.create(prompt=prompt, **asked)
            assert [one.text for one in alone.choices] == [one.text for one in both.choices[2 * index : 2 * index + 2]]
        assert both.choices[0].text != both.choices[1].text

    def test_token_ids(self, client: openai.OpenAI, model: Generator) -> None:
        ids = list(model.encoder.encode(PROMPT))
        found = client.completions.create(model="llm", prompt=ids, max_tokens=4)
        assert found.choices[0].text == model.generate(PROMPT, max_new_tokens=4).text
        with pytest.raises(openai.BadRequestError, match="token id"):
            client.completions.create(model="llm", prompt=[10**9], max_tokens=4)

    def test_echo(self, client: openai.OpenAI) -> None:
        plain = client.completions.create(model="llm", prompt=PROMPT, max_tokens=4).choices[0].text
        assert client.completions.create(model="llm", prompt=PROMPT, max_tokens=4, echo=True).choices[0].text == (
            PROMPT + plain
        )
        pieces = client.completions.create(model="llm", prompt=PROMPT, max_tokens=4, echo=True, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == PROMPT + plain

    def test_probabilities(self, client: openai.OpenAI, model: Generator) -> None:
        found = client.completions.create(model="llm", prompt=PROMPT, max_tokens=5, logprobs=3)
        wanted = model.generate(PROMPT, max_new_tokens=5, logprobs=3)
        told = found.choices[0].logprobs
        assert told is not None
        np.testing.assert_allclose(told.token_logprobs, [one.logprob for one in wanted.logprobs], atol=1e-4)
        assert told.tokens is not None
        said = b"".join(
            bytes.fromhex(one.removeprefix("bytes:").replace("\\x", "")) if one.startswith("bytes:") else one.encode()
            for one in told.tokens
        )
        assert said.decode("utf-8", "replace") == wanted.text
        lengths = [1 if one.startswith("bytes:") else len(one) for one in told.tokens]
        assert told.text_offset == [sum(lengths[:index]) for index in range(5)]
        assert told.top_logprobs is not None
        assert all(
            max(top, key=top.__getitem__) == token for top, token in zip(told.top_logprobs, told.tokens, strict=True)
        )

    def test_a_stream_says_the_same(self, client: openai.OpenAI) -> None:
        asked: Any = {"model": "llm", "prompt": ["one", "two"], "max_tokens": 8, "n": 2, "temperature": 1.0, "seed": 3}
        whole = client.completions.create(**asked)
        said = ["", "", "", ""]
        ends: list[str | None] = [None] * 4
        usage = None
        for piece in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
            usage = piece.usage
            for choice in piece.choices:
                said[choice.index] += choice.text
                ends[choice.index] = choice.finish_reason
        assert said == [one.text for one in whole.choices]
        assert ends == [one.finish_reason for one in whole.choices]
        assert usage == whole.usage

    @pytest.mark.parametrize(
        ("extra", "told"),
        [
            ({"suffix": "end"}, "suffix"),
            ({"best_of": 3}, "best_of"),
            ({"echo": True, "logprobs": 1}, "echo"),
            ({"n": 2, "temperature": 0}, "n is 2"),
            ({"top_p": 1.5}, "top_p"),
            ({"temperature": -1}, "temperature"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"logit_bias": {"x": 1}}, "logit_bias"),
            ({"logit_bias": {"999999": 1}}, "999999"),
            ({"stop": ["a"] * 10_000}, "stop"),
            ({"stop": [""]}, "stop"),
        ],
    )  # fmt: skip
    def test_what_is_refused(self, client: openai.OpenAI, extra: dict[str, Any], told: str) -> None:
        with pytest.raises(openai.BadRequestError, match=told):
            client.completions.create(**{"model": "llm", "prompt": PROMPT, "max_tokens": 4, **extra})

    def test_a_prompt_that_is_too_long_or_empty(self, client: openai.OpenAI) -> None:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="the model takes 128"):
                client.completions.create(model="llm", prompt="x" * 200, stream=stream)
        with pytest.raises(openai.BadRequestError, match="prompts"):
            client.completions.create(model="llm", prompt=[])
        for empty in ("", [""], [[]], ["a", ""]):
            with pytest.raises(openai.BadRequestError, match="a prompt is empty"):
                client.completions.create(model="llm", prompt=empty)  # type: ignore[arg-type]


class TestChat:
    def test_an_answer(self, client: openai.OpenAI, model: Generator) -> None:
        found = client.chat.completions.create(model="llm", messages=MESSAGES, max_completion_tokens=12)
        wanted = model.generate(MESSAGES, max_new_tokens=12)
        (choice,) = found.choices
        assert (choice.message.role, choice.message.content) == ("assistant", wanted.text)
        assert choice.finish_reason == wanted.finish
        assert found.object == "chat.completion"
        assert found.usage is not None
        assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (wanted.prompt_tokens, len(wanted.tokens))
        assert found.usage.total_tokens == wanted.prompt_tokens + len(wanted.tokens)

    def test_a_stream_says_the_same(self, client: openai.OpenAI) -> None:
        asked: Any = {"model": "llm", "messages": MESSAGES, "max_tokens": 10, "n": 2, "temperature": 1.0, "seed": 5}
        whole = client.chat.completions.create(**asked)
        said, ends, first = ["", ""], ["", ""], ["", ""]
        usage = None
        for piece in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
            assert piece.object == "chat.completion.chunk"
            usage = piece.usage
            for choice in piece.choices:
                first[choice.index] = first[choice.index] or str(choice.delta.role)
                said[choice.index] += choice.delta.content or ""
                ends[choice.index] = choice.finish_reason or ""
        assert said == [one.message.content for one in whole.choices]
        assert ends == [one.finish_reason for one in whole.choices]
        assert first == ["assistant", "assistant"]
        assert usage == whole.usage

    def test_a_stream_without_usage_says_none(self, web: httpx.Client) -> None:
        asked = {"model": "llm", "messages": MESSAGES, "max_tokens": 3, "stream": True}
        answer = web.post("/v1/chat/completions", json=asked)
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert events[-1] == "[DONE]"
        assert all("usage" not in json.loads(one) for one in events[:-1])

    def test_probabilities(self, client: openai.OpenAI, model: Generator) -> None:
        asked: Any = {"model": "llm", "messages": MESSAGES, "max_tokens": 5, "logprobs": True, "top_logprobs": 2}
        told = client.chat.completions.create(**asked).choices[0].logprobs
        wanted = model.generate(MESSAGES, max_new_tokens=5, logprobs=2)
        assert told is not None
        assert told.content is not None
        np.testing.assert_allclose(
            [one.logprob for one in told.content], [one.logprob for one in wanted.logprobs], atol=1e-4
        )
        data = b"".join(bytes(one.bytes or []) for one in told.content)
        assert data.decode("utf-8", "replace") == wanted.text
        assert all(one.top_logprobs[0].token == one.token for one in told.content)
        last = list(client.chat.completions.create(**asked, stream=True))[-1].choices[0]
        assert last.logprobs is not None
        assert [one.token for one in last.logprobs.content or ()] == [one.token for one in told.content]

    def test_a_stop_string(self, client: openai.OpenAI) -> None:
        asked: Any = {"model": "llm", "messages": MESSAGES, "max_tokens": 12}
        text = client.chat.completions.create(**asked).choices[0].message.content or ""
        stop = text[3:5]
        found = client.chat.completions.create(**asked, stop=stop).choices[0]
        assert (found.message.content, found.finish_reason) == (text[: text.index(stop)], "stop")

    def test_bias_and_penalties(self, client: openai.OpenAI, model: Generator) -> None:
        asked: Any = {"model": "llm", "messages": MESSAGES, "max_tokens": 4}
        token = model.generate(MESSAGES, max_new_tokens=1).tokens[0]
        plain = client.chat.completions.create(**asked).choices[0].message.content
        assert (
            client.chat.completions.create(**asked, logit_bias={str(token): -100}).choices[0].message.content != plain
        )
        options = {"frequency_penalty": 1.5, "presence_penalty": 1.0}
        found = client.chat.completions.create(**asked, **options, extra_body={"repetition_penalty": 1.3})
        wanted = model.generate(MESSAGES, max_new_tokens=4, repetition_penalty=1.3, **options)
        assert found.choices[0].message.content == wanted.text

    def test_our_own_options(self, client: openai.OpenAI, model: Generator) -> None:
        extra = {"top_k": 5, "min_p": 0.01, "priority": 3, "timeout": 30.0}
        asked: Any = {"messages": MESSAGES, "temperature": 1.0, "seed": 11}
        found = client.chat.completions.create(model="llm", max_tokens=6, **asked, extra_body=extra)
        wanted = model.generate(MESSAGES, max_new_tokens=6, temperature=1.0, seed=11, top_k=5, min_p=0.01)
        assert found.choices[0].message.content == wanted.text

    def test_parts_of_text_are_one_text(self, client: openai.OpenAI) -> None:
        parts: Any = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
        found = [
            client.chat.completions.create(model="llm", messages=one, max_tokens=6).choices[0].message.content
            for one in (parts, MESSAGES)
        ]
        assert found[0] == found[1]
        picture: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
        with pytest.raises(openai.BadRequestError, match="takes texts alone") as caught:
            client.chat.completions.create(model="llm", messages=picture)
        assert refusal(caught) == (400, "messages.0.content", "invalid_value")

    def test_tools_are_shown_to_the_template(self, client: openai.OpenAI, model: Generator) -> None:
        asked: Any = {"model": "llm", "messages": MESSAGES, "max_tokens": 3, "tools": [TOOL]}
        found = client.chat.completions.create(**asked)
        wanted = model.generate(MESSAGES, max_new_tokens=3, tools=[TOOL])
        plain = model.generate(MESSAGES, max_new_tokens=3)
        assert found.usage is not None
        assert found.usage.prompt_tokens == wanted.prompt_tokens > plain.prompt_tokens
        unused = client.chat.completions.create(**asked, tool_choice="none")
        assert unused.usage is not None
        assert unused.usage.prompt_tokens == plain.prompt_tokens
        with pytest.raises(openai.BadRequestError, match="no call can be forced"):
            client.chat.completions.create(**asked, tool_choice="required")

    def test_a_call_of_a_tool(self, client: openai.OpenAI) -> None:
        call = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
        asked: Any = {"model": "llm", "messages": MESSAGES, "tools": [TOOL], "extra_body": {"choices": [call]}}
        (choice,) = client.chat.completions.create(**asked).choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        (made,) = choice.message.tool_calls or ()
        assert (made.type, made.function.name, json.loads(made.function.arguments)) == (
            *("function", "weather"),
            {"city": "Paris"},
        )
        pieces = [piece.choices[0] for piece in client.chat.completions.create(**asked, stream=True)]
        (streamed,) = [one.delta.tool_calls[0] for one in pieces if one.delta.tool_calls]
        assert (streamed.index, streamed.function.name) == (0, "weather")
        assert "".join(one.delta.content or "" for one in pieces) == ""
        assert pieces[-1].finish_reason == "tool_calls"

    def test_a_conversation_with_calls_in_it(self, client: openai.OpenAI) -> None:
        call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
        messages: Any = [
            *MESSAGES,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        ]
        assert client.chat.completions.create(model="llm", messages=messages, tools=[TOOL], max_tokens=2).choices

    def test_forms(self, client: openai.OpenAI) -> None:
        schema = {
            "type": "object",
            "properties": {"n": {"enum": [1, 2]}},
            "required": ["n"],
            "additionalProperties": False,
        }
        asked: Any = {"model": "llm", "messages": MESSAGES, "max_tokens": 60}
        form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
        text = client.chat.completions.create(**asked, response_format=form).choices[0].message.content
        assert json.loads(text or "")["n"] in (1, 2)
        words = client.chat.completions.create(**asked, extra_body={"choices": ["yes", "no"]}).choices[0].message
        assert words.content in ("yes", "no")
        digits = client.chat.completions.create(**asked, extra_body={"regex": "[0-9]{4}"}).choices[0].message
        assert (digits.content or "").isdigit()
        for body in ({"regex": "("}, {"choices": ["a"], "regex": "a"}, {"choices": []}):
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(**asked, extra_body=body)
        broken: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**asked, response_format=broken)

    def test_a_model_without_a_template(self, client: openai.OpenAI) -> None:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="no chat template"):
                client.chat.completions.create(model="plain", messages=MESSAGES, stream=stream)

    @pytest.mark.parametrize("stream", [False, True])
    def test_messages_that_the_template_fails_on(self, client: openai.OpenAI, stream: bool) -> None:
        def ask(role: str) -> None:
            client.chat.completions.create(model="llm", messages=[{"role": role, "content": "x"}], stream=stream)  # type: ignore[call-overload]

        with pytest.raises(openai.BadRequestError, match="roles are user and assistant"):
            ask("strange")
        with pytest.raises(openai.BadRequestError, match="fails on these messages") as caught:
            ask("broken")
        assert refusal(caught) == (400, "messages", "chat_template_failed")

    def test_many_at_once(self, server: Server, model: Generator) -> None:
        async def ask() -> list[str]:
            async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
                asked = [
                    client.chat.completions.create(
                        model="llm", messages=[{"role": "user", "content": str(index)}], max_tokens=8
                    )
                    for index in range(24)
                ]
                return [one.choices[0].message.content or "" for one in await asyncio.gather(*asked)]

        wanted = [
            model.generate([{"role": "user", "content": str(index)}], max_new_tokens=8).text for index in range(24)
        ]
        assert asyncio.run(ask()) == wanted


class TestModels:
    def test_the_list(self, client: openai.OpenAI) -> None:
        found = client.models.list().data
        assert [one.id for one in found] == ["llm", "plain", "enc", "cls"]
        assert {(one.object, one.owned_by) for one in found} == {("model", "hasten")}
        assert client.models.retrieve("enc").id == "enc"

    @pytest.mark.parametrize(
        "name", ["none", "llm:none", "llm:", ":", "", "ll", "llm/../enc", "x" * 5000, "\u0000", "é"]
    )
    def test_no_such_model(self, client: openai.OpenAI, name: str) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=1)
        assert refusal(caught) == (404, "model", "model_not_found")

    def test_a_model_must_be_named_where_there_are_several(self, web: httpx.Client) -> None:
        answer = web.post("/v1/embeddings", json={"input": "a"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")
        assert web.get("/v1/models/none").status_code == 404

    def test_health(self, web: httpx.Client) -> None:
        assert web.get("/healthz").json() == {"status": "ok"}
        assert (web.get("/readyz").status_code, web.get("/readyz").json()) == (200, {"status": "ready"})


def test_the_log_says_what_it_took_and_nothing_of_what_was_said(server: Server, client: openai.OpenAI) -> None:
    secret = "what nobody may read"
    answer = client.chat.completions.with_raw_response.create(
        model="llm", messages=[{"role": "user", "content": secret}], max_tokens=4
    )
    line = server.wait_for("request", id=answer.headers["x-request-id"])
    assert (line["model"], line["status"], line["path"]) == ("llm", 200, "/v1/chat/completions")
    assert (line["tokens_in"] > len(secret), line["tokens_out"]) == (True, 4)
    assert not [one for one in server.lines if secret in one]
