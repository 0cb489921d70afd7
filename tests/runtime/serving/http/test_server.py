"""A real server on loopback: the official client, clients that go away, dawdle or send garbage."""

import json
import socket
import threading
import time
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from support.live_server import live
from support.requests import about, data_uri

from uhd_export.runtime.serving.http.app import create_app
from uhd_export.runtime.serving.http.front import HttpOptions
from uhd_export.runtime.serving.http.server import TimelyProtocol, address_of, make_server
from uhd_export.runtime.serving.scheduling.scheduler import Limits

ENDLESS = {"2": -100}


@pytest.fixture
def served(serve):
    """A service of two slots, and its address."""
    service = serve(slots=2)
    with live(service, HttpOptions(keys=("secret",), body_seconds=0.5)) as address:
        yield service, address


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served[1]}/v1", api_key="secret", max_retries=0) as client:
        yield client


def test_the_official_client(client, cards):
    image, question, code = cards[0]
    assert [model.id for model in client.models.list()] == ["llava-uhd"]
    answer = client.chat.completions.create(model="llava-uhd", messages=about(image, question), max_tokens=8)
    assert answer.choices[0].message.content == code and answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens > 1000
    chunks = list(
        client.chat.completions.create(
            model="llava-uhd",
            messages=about(image, question),
            max_completion_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
            top_logprobs=2,
            extra_body={"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.0},
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == code
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 1000
    assert sum(len(c.choices[0].logprobs.content) for c in chunks if c.choices and c.choices[0].logprobs) >= 3


def test_the_official_client_understands_errors(client, served):
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.chat.completions.create(
            model="llava-uhd", messages=[{"role": "user", "content": "x"}], max_tokens=0
        )
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served[1]}/v1", api_key="wrong", max_retries=0).models.list()


def test_structured_answers_through_the_official_client(client):
    import pydantic

    class Card(pydantic.BaseModel):
        code: int
        clear: bool

    parsed = client.chat.completions.parse(
        model="llava-uhd",
        messages=[{"role": "user", "content": "Describe a card."}],
        response_format=Card,
        max_tokens=300,
        logit_bias={},
        frequency_penalty=2,
    )
    message = parsed.choices[0].message
    assert isinstance(message.parsed, Card)
    # As its documentation has it, the message goes on in the next request.
    asked = [{"role": "user", "content": "Describe a card."}, message, {"role": "user", "content": "Sure?"}]
    assert client.chat.completions.create(model="llava-uhd", messages=asked, max_tokens=2).choices


def test_requests_of_evaluation_harnesses(served, cards):
    """The bodies that VLMEvalKit's GPT wrapper and lmms-eval's openai-compatible model post."""
    image, question, code = cards[0]
    _, address = served
    headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
    vlmevalkit = {
        "model": "llava-uhd",
        "messages": [
            {"role": "system", "content": "You answer questions about cards."},
            {
                "role": "user",
                "content": [
                    {
                        "type": "image_url",
                        "image_url": {"url": data_uri(image, "JPEG"), "detail": "low"},
                    },
                    {"type": "text", "text": question},
                ],
            },
        ],
        "max_tokens": 16,
        "n": 1,
        "temperature": 0,
    }
    lmms_eval = {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": question},
                    {"type": "image_url", "image_url": {"url": data_uri(image)}},
                ],
            }
        ],
        "model": "llava-uhd",
        "max_tokens": 16,
        "temperature": 0,
    }
    for body in (vlmevalkit, lmms_eval):
        answer = httpx.post(
            f"{address}/v1/chat/completions", headers=headers, content=json.dumps(body), timeout=60
        )
        assert answer.status_code == 200, answer.text
        text = answer.json()["choices"][0]["message"]["content"]
        assert text == code or body is vlmevalkit  # nano never saw another system prompt


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_slot_within_half_a_second(served, stream):
    service, address = served
    body = {"messages": [{"role": "user", "content": "Go."}], "logit_bias": ENDLESS, "stream": stream}
    headers = {"Authorization": "Bearer secret"}
    ended = []
    service.scheduler.listeners.append(ended.append)
    # An answer of 2,000 tokens takes nano less than a second: each step is made to last.
    rows, step = service.scheduler._rows, service.scheduler._rows.step
    rows.step = lambda *rest: (time.sleep(0.01), step(*rest))[1]
    if stream:
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, headers=headers) as answer:
            lines = answer.iter_lines()
            while not service.scheduler.busy_slots:  # the first lines may come before its turn
                next(lines)
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/chat/completions", json=body, headers=headers, timeout=0.5)
    start = time.monotonic()
    while service.scheduler.busy_slots and time.monotonic() - start < 3:
        time.sleep(0.005)
    assert time.monotonic() - start < 0.5
    while not ended and time.monotonic() - start < 3:  # told of a moment after the slot is free
        time.sleep(0.005)
    assert ended[-1].reason == "cancelled"


def connection(address):
    parts = urlsplit(address)
    return socket.create_connection((parts.hostname, parts.port), timeout=5)


def closed_after(sock) -> float:
    start = time.monotonic()
    while sock.recv(4096):
        pass
    return time.monotonic() - start


def test_dawdlers_are_shown_out(served, monkeypatch):
    _, address = served
    monkeypatch.setattr(TimelyProtocol, "header_seconds", 0.3)
    with connection(address) as silent, connection(address) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")

        def drip():
            for _ in range(20):
                try:
                    slow.sendall(b"X-A: b\r\n")
                except OSError:
                    return
                time.sleep(0.05)

        thread = threading.Thread(target=drip)
        thread.start()
        assert closed_after(silent) < 2 and closed_after(slow) < 2
        thread.join()
    with connection(address) as late:  # a body that never comes
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
        late.sendall(head + b"Content-Length: 1000\r\n\r\n{")
        start = time.monotonic()
        assert b"408" in late.recv(4096).split(b"\r\n")[0]
        assert time.monotonic() - start < 2
    with connection(address) as garbage:
        garbage.sendall(b"\x16\x03\x01\x00\xff nonsense\r\n\r\n")
        assert b"400" in garbage.recv(4096).split(b"\r\n")[0]
    # A connection may rest between two requests, and others are served all the while.
    with httpx.Client(base_url=address) as client:
        assert client.get("/health").status_code == 200
        time.sleep(0.5)
        assert client.get("/health").status_code == 200


def test_addresses_of_both_kinds():
    assert address_of("127.0.0.1", 80) == "http://127.0.0.1:80" and address_of("::1", 80) == "http://[::1]:80"


def test_the_line_may_be_as_long_as_it_is_asked_for(serve):
    app = create_app(serve(slots=3, limits=Limits(waiting=2000)))
    assert make_server(app).config.limit_concurrency > 2003


def test_what_is_under_way_at_the_end_is_answered(serve):
    service = serve(slots=1)
    results = []
    with live(service) as address:
        body = {"messages": [{"role": "user", "content": "Go."}], "logit_bias": ENDLESS, "max_tokens": 60}

        def ask():
            results.append(httpx.post(f"{address}/v1/chat/completions", json=body, timeout=20))

        thread = threading.Thread(target=ask)
        thread.start()
        while not service.scheduler.busy_slots:
            time.sleep(0.002)
    thread.join()
    assert results[0].status_code == 200 and results[0].json()["usage"]["completion_tokens"] == 60


def test_what_takes_longer_than_the_end_is_cut_off(serve):
    service = serve(slots=1)
    step = service.scheduler._rows.step
    service.scheduler._rows.step = lambda *rest: (time.sleep(0.01), step(*rest))[1]
    problems = []
    with live(service) as address:  # which gives a second
        body = {"messages": [{"role": "user", "content": "Go."}], "logit_bias": ENDLESS, "stream": True}

        def ask():
            try:
                with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=20) as answer:
                    problems.append("[DONE]" not in answer.read().decode())
            except httpx.TransportError as error:
                problems.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        while not service.scheduler.busy_slots:
            time.sleep(0.002)
        start = time.monotonic()
    thread.join()
    assert time.monotonic() - start < 5 and problems and problems[0]
    deadline = time.monotonic() + 2
    while service.scheduler.busy_slots:
        assert time.monotonic() < deadline
        time.sleep(0.005)
