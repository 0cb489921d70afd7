"""The HTTP API in process: OpenAI's words, limits, and errors in one form."""

import asyncio
import dataclasses
import json
import threading
import time

import pytest
from PIL import Image
from starlette.testclient import TestClient
from support.requests import about, data_uri
from tokenizers import Tokenizer, decoders, models

from uhd_export.runtime.language.prompt import encode_parts, encode_question
from uhd_export.runtime.serving.dialogue import Message
from uhd_export.runtime.serving.http.app import create_app
from uhd_export.runtime.serving.http.chat import Writer
from uhd_export.runtime.serving.http.front import HttpOptions
from uhd_export.runtime.serving.http.guard import AT_A_TIME, Guard
from uhd_export.runtime.serving.sampling.choice import Chosen
from uhd_export.runtime.serving.scheduling.queue import Busy
from uhd_export.runtime.serving.scheduling.request import Piece
from uhd_export.runtime.serving.scheduling.scheduler import Limits, Scheduler
from uhd_export.runtime.settings import Sampling


@pytest.fixture
def client(serve):
    """`client(http_options, **service_options)`: a client of the application in this process."""

    def run(options=None, **service):
        return TestClient(create_app(serve(**service), options), raise_server_exceptions=False)

    return run


def post(client, messages="Say it.", **fields):
    messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    return client.post("/v1/chat/completions", json={"messages": messages, **fields})


def user(text):
    return [{"role": "user", "content": text}]


def events(response) -> list[dict]:
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_an_answer_whole_and_streamed_are_one(client, cards):
    image, question, code = cards[0]
    client = client()
    whole = post(client, about(image, question), max_tokens=8)
    assert whole.status_code == 200, whole.text
    body = whole.json()
    assert body["object"] == "chat.completion" and body["model"] == "llava-uhd"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": code}
    assert body["choices"][0]["finish_reason"] == "stop"
    usage = body["usage"]
    assert usage["prompt_tokens"] > 1000 and usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert set(body["timings"]["seconds"]) == {"image", "queue", "vision", "prefill", "decode"}

    streamed = post(
        client, about(image, question), max_tokens=8, stream=True, stream_options={"include_usage": True}
    )
    assert streamed.headers["content-type"].startswith("text/event-stream")
    chunks = events(streamed)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    assert text == code
    assert [c["choices"][0]["finish_reason"] for c in chunks[-2:-1]] == ["stop"]
    assert (
        chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == usage["completion_tokens"]
    )
    assert chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 1000  # the slot had it


def test_finish_reasons_stop_texts_and_limits(client):
    client = client(context=256)
    eos = {"2": -100}
    long = post(client, max_tokens=5, logit_bias=eos).json()
    assert long["choices"][0]["finish_reason"] == "length" and long["usage"]["completion_tokens"] == 5
    text = post(client, max_tokens=30, logit_bias=eos).json()["choices"][0]["message"]["content"]
    stop = text[7:10]
    cut = post(client, max_tokens=30, logit_bias=eos, stop=["no such", stop]).json()["choices"][0]
    assert cut["finish_reason"] == "stop" and cut["message"]["content"] == text[: text.index(stop)]
    streamed = events(post(client, max_tokens=30, logit_bias=eos, stop=stop, stream=True))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in streamed) == text[: text.index(stop)]
    full = post(client, logit_bias=eos).json()
    assert full["choices"][0]["finish_reason"] == "length"
    assert full["usage"]["total_tokens"] == 256 + 1
    refused = post(client, "word " * 400)
    assert refused.status_code == 400 and "context of 256" in refused.json()["error"]["message"]


def test_a_prompt_that_the_released_code_would_cut_is_refused(client):
    client = client(context=512)
    service = client.app.state.front.service
    positions = post(client, max_tokens=1).json()["usage"]["prompt_tokens"]
    service.settings = dataclasses.replace(service.settings, prompt_limit=positions)
    assert post(client, max_tokens=1).status_code == 200
    refused = post(client, "Say it now.", max_tokens=1)
    assert refused.status_code == 400
    assert f"than tokenizer_model_max_length {positions}" in refused.json()["error"]["message"]


def test_logprobs_tell_the_likeliest_tokens(client):
    client = client(context=256)
    body = post(client, max_tokens=4, logit_bias={"2": -100}, logprobs=True, top_logprobs=3).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert len(content) == 4
    for entry in content:
        assert len(entry["top_logprobs"]) == 3
        best = [one["logprob"] for one in entry["top_logprobs"]]
        assert best == sorted(best, reverse=True) and best[0] <= 0
        assert bytes(entry["bytes"]).decode() == entry["token"]
    assert post(client, top_logprobs=3).status_code == 400


def test_bytes_of_tokens_are_those_of_the_answer(client):
    """Also where a character is several tokens, each of which is a part of it."""
    form = {"type": "json_schema", "json_schema": {"schema": {"const": "漢字 é a card"}}}
    answer = post(client(context=256), max_tokens=60, logprobs=True, response_format=form).json()
    choice = answer["choices"][0]
    entries = choice["logprobs"]["content"]
    assert choice["message"]["content"] == '"漢字 é a card"'
    assert b"".join(bytes(entry["bytes"]) for entry in entries) == choice["message"]["content"].encode()
    assert any("\ufffd" in entry["token"] for entry in entries)


@pytest.mark.parametrize("strip", [True, False])
def test_bytes_of_sentencepiece_s_tokens_keep_their_spaces(strip):
    names = ["<unk>", "</s>", "▁red", "card", "▁", "<0xE6>", "<0xBC>", "<0xA2>", "<0x00>"]
    vocab = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * strip)
    tokenizer.add_special_tokens(["</s>"])
    tokens = [Chosen(number, -1.0) for number in (2, 3, 4, 2, 5, 6, 7)]
    piece = Writer("m", tokenizer).piece(Piece("", (*tokens, Chosen(1, -1.0), Chosen(99, -1.0))))
    *entries, end, unknown = json.loads(piece)["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries) == " redcard  red漢".encode()
    assert [entry["token"] for entry in entries] == [" red", "card", " ", " red", *"\ufffd\ufffd\ufffd"]
    assert (end["token"], end["bytes"]) == ("</s>", None)  # which is in no text
    assert (unknown["token"], unknown["bytes"]) == ("", [])


def test_sampling_is_seeded_and_penalties_matter(client):
    client = client(context=512)
    fields = {"max_tokens": 40, "logit_bias": {"2": -100}}

    def text(**more):
        return post(client, **fields, **more).json()["choices"][0]["message"]["content"]

    warm = {"temperature": 1.5, "top_p": 0.95, "top_k": 40, "min_p": 0.01}
    assert text(**warm, seed=1) == text(**warm, seed=1) != text(**warm, seed=2)
    greedy = text()
    assert text(top_k=1, temperature=3, seed=1) == greedy
    assert text(min_p=1, temperature=3, seed=1) == greedy
    for penalty in ({"repetition_penalty": 5}, {"presence_penalty": 2}, {"frequency_penalty": 2}):
        assert text(**penalty) != greedy


@pytest.mark.parametrize("kind", ["schema", "object"])
def test_an_answer_follows_a_json_schema(client, kind):
    schema = {
        "type": "object",
        "properties": {"code": {"type": "string", "pattern": "^[0-9]{3}$"}, "ok": {"type": "boolean"}},
        "required": ["code", "ok"],
        "additionalProperties": False,
    }
    formats = {
        "schema": {"type": "json_schema", "json_schema": {"name": "card", "schema": schema}},
        "object": {"type": "json_object"},
    }
    body = post(client(context=512), max_tokens=200, response_format=formats[kind]).json()
    choice = body["choices"][0]
    if kind == "schema":
        answer = json.loads(choice["message"]["content"])
        assert (
            set(answer) == {"code", "ok"} and len(answer["code"]) == 3 and choice["finish_reason"] == "stop"
        )
    else:
        assert choice["message"]["content"].startswith("{")


def test_models_health_metrics_plan_and_tokenize(client, cards):
    client = client()
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["llava-uhd"]
    assert client.get("/health").json() == {"status": "ok"}
    image = cards[0][0]
    plan = client.post("/v1/plan", json={"width": 1008, "height": 672}).json()
    assert plan == client.post("/v1/plan", json={"image_url": {"url": data_uri(image)}}).json()
    assert plan["slice_grid"] == [3, 2] and len(plan["boxes"]) == 6 and plan["overview_size"] == [406, 266]
    assert plan["boxes"][5] == pytest.approx([2 / 3, 1 / 2, 1, 1])
    assert plan["visual_tokens"] == 1014 and plan["crops"] == 7
    body = client.post("/v1/tokenize", json={"messages": about(image, "What?")}).json()
    assert body["ids"].count(-200) == 1 and body["positions"] == len(body["ids"]) - 1 + 1014
    usage = post(client, about(image, "What?"), max_tokens=1).json()["usage"]
    assert usage["prompt_tokens"] == body["positions"]
    post(client, "word " * 3000)
    text = client.get("/metrics").text
    for line in (
        'uhd_requests_total{outcome="length"} 1.0',
        'uhd_requests_total{outcome="refused"} 1.0',
        'uhd_images_total{encoded="now"} 1.0',
        f'uhd_tokens_total{{kind="prompt"}} {body["positions"]}.0',
        "uhd_slots 4.0",
        "uhd_busy_slots 0.0",
        'uhd_stage_seconds_count{stage="prefill"} 1.0',
    ):
        assert line in text, line
    assert "process_resident_memory_bytes" in text


def test_what_a_caller_spells_out_is_text(client, cards):
    """As in the pipeline: only images that are sent and the template's own control tokens count."""
    client = client(context=4096)
    tokenizer = client.app.state.front.service.tokenizer

    def ids(messages):
        answer = client.post("/v1/tokenize", json={"messages": messages})
        assert answer.status_code == 200, answer.text
        return answer.json()["ids"]

    odd = "What is </s> or <image>?"
    first = ids(about(cards[0][0], odd))
    assert first == encode_question(tokenizer, odd, "vicuna_v1", 1)
    assert first.count(-200) == 1 and 2 not in first
    again = ids([*about(cards[0][0], odd), {"role": "assistant", "content": odd}, *user(odd)])
    assert again[: len(first)] == first
    assert again[len(first) :] == [
        *encode_parts(tokenizer, [(odd, False)])[1:],
        *encode_question(tokenizer, odd, "vicuna_v1", follow_up=True),
    ]
    plain = ids([{"role": "system", "content": odd}, *user("Why?")])
    assert -200 not in plain and 2 not in plain


def test_what_a_request_leaves_out_is_as_the_bundle_says(client):
    client = client(context=512)
    service = client.app.state.front.service
    usual = Sampling(temperature=1.2, top_k=30, top_p=0.9, seed=4, repetition_penalty=1.3)
    fields = {"max_tokens": 30, "logit_bias": {"2": -100}}

    def text(**more):
        return post(client, **fields, **more).json()["choices"][0]["message"]["content"]

    greedy = text()
    stated = text(temperature=1.2, top_k=30, top_p=0.9, seed=4, repetition_penalty=1.3)
    service.settings = dataclasses.replace(service.settings, sampling=usual)
    assert text() == stated != greedy
    assert text(temperature=0, repetition_penalty=1) == greedy


def test_a_dialogue_of_several_images_and_turns(client, cards):
    client = client(context=4096)
    (first, question, code), (second, other, _), _ = cards
    messages = about(first, question)
    messages += [{"role": "assistant", "content": code}, *about(second, other)]
    body = post(client, messages, max_tokens=8).json()
    assert body["usage"]["prompt_tokens"] > 2000
    messages = [{"role": "system", "content": "Be brief."}, *about(first, question)]
    assert post(client, messages, max_tokens=2).status_code == 200
    for wrong, reason in (
        ([{"role": "assistant", "content": "x"}], "the user last"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": "y"}], "take turns"),
        ([{"role": "system", "content": about(first, "x")[0]["content"]}, *messages[1:]], "only the user"),
    ):
        answer = post(client, wrong)
        assert answer.status_code == 400 and reason in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temprature": 1}, "temprature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 2}, "n:"),
        ({"model": "gpt-4"}, "model: 'gpt-4' is not served"),
        ({"logit_bias": {"99999999": 1}}, "outside the vocabulary"),
        ({"logit_bias": {"a": 1}}, "token ids"),
        ({"logit_bias": {"1": 1000}}, "logit_bias"),
        ({"stop": ["", "x"]}, "stop"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
            "response_format",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client, fields, message):
    answer = post(client(context=256), **fields)
    assert answer.status_code == 400
    problem = answer.json()["error"]
    assert message in problem["message"] and problem["type"] == "invalid_request_error"
    assert "\n" not in problem["message"]


PART = {"type": "text", "text": "What?"}


@pytest.mark.parametrize(
    ("content", "fields", "where", "reason"),
    [
        (
            [{"type": "image_url", "image_url": {"url": "x", "detial": "low"}}, PART],
            {},
            "messages.0.content.0.image_url.detial",
            "not permitted",
        ),
        ([{"type": "image_url", "image_url": "x"}], {}, "messages.0.content.0.image_url", "dictionary"),
        ([PART, {"type": "image", "image": "x"}], {}, "messages.0.content.1", "'image' found"),
        ([{"type": "text"}], {}, "messages.0.content.0.text", "required"),
        ([{"type": "image_url", "image_url": {}}], {}, "messages.0.content.0.image_url.url", "required"),
        ("x" * (1 << 19), {}, "messages.0.content", "at most"),
        ("x", {"stop": ["a"] * 17}, "stop", "at most 16"),
        ("x", {"stop": ["a", 5]}, "stop.1", "string"),
        (
            "x",
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format.json_schema.schema",
            "required",
        ),
    ],
)
def test_what_is_wrong_is_named_where_it_is(client, content, fields, where, reason):
    """Also where a field may be of several kinds, each of which finds something else wrong."""
    answer = post(client(context=256), [{"role": "user", "content": content}], **fields)
    problem = answer.json()["error"]
    assert answer.status_code == 400 and problem["param"] == where
    assert problem["message"].startswith(f"{where}: ") and reason in problem["message"]


def test_a_body_that_is_no_json_is_told_what_it_lacks(client):
    client = client(context=256)
    kind = {"content-type": "application/json"}
    broken = client.post("/v1/chat/completions", content=b'{"messages": [}', headers=kind).json()["error"]
    assert broken["message"] == "body: not JSON at character 14 (Expecting value)"
    assert broken["param"] == "body"
    form = {"content-type": "application/x-www-form-urlencoded"}
    other = client.post("/v1/chat/completions", content=b'{"messages": []}', headers=form)
    assert other.status_code == 400
    assert other.json()["error"]["message"] == "body: not read as JSON; send Content-Type: application/json"


def test_what_the_official_client_adds_to_an_answer_is_taken_where_it_says_nothing(client):
    client = client(context=256)
    nothing = dict.fromkeys(("refusal", "tool_calls", "function_call", "audio", "annotations"))

    def ask(**more):
        said = {"role": "assistant", "content": "Yes.", **nothing, **more}
        return post(client, [*user("Is it?"), said, *user("Sure?")], max_tokens=1)

    assert ask().status_code == ask(annotations=[]).status_code == 200
    refused = ask(tool_calls=[{"id": "1"}])
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "messages.1.tool_calls"
    assert ask(annotations=[{}]).status_code == 400


@pytest.mark.parametrize("slots", [1, 3])
def test_requests_for_whom_slots_are_free_do_not_wait(serve, cards, slots):
    """Though their images are read and encoded first; one more than slots and line is refused."""
    service = serve(slots=slots, limits=Limits(waiting=1))
    encode = service.scheduler._vision.encode
    gate = threading.Event()
    service.scheduler._vision.encode = lambda image: (gate.wait(20), encode(image))[1]
    image = cards[0][0].resize((200, 200))
    wish = service.prepare([Message("user", ("", "What?"))], [image], max_tokens=1)
    streams = [service.submit(wish) for _ in range(slots + 1)]
    with pytest.raises(Busy):
        service.submit(wish)
    gate.set()
    assert [stream.text() is not None for stream in streams] == [True] * (slots + 1)


def test_a_full_line_answers_429_with_retry_after(serve, monkeypatch):
    service = serve(slots=1, limits=Limits(waiting=1))
    client = TestClient(create_app(service))
    monkeypatch.setattr(Scheduler, "waiting", 2)
    answer = post(client, max_tokens=1)
    monkeypatch.undo()
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["type"] == "rate_limit_error"
    service.close()
    assert client.get("/health").status_code == 503
    assert post(client, max_tokens=1).status_code == 503


def test_a_full_line_is_told_before_images_are_read(serve, cards, monkeypatch):
    service = serve(slots=1, context=2048, limits=Limits(waiting=1))
    client = TestClient(create_app(service), raise_server_exceptions=False)
    cut = []
    monkeypatch.setattr(service, "cut", lambda image: cut.append(image) or 1 / 0)
    monkeypatch.setattr(Scheduler, "waiting", 2)
    assert post(client, about(cards[0][0], "What?")).status_code == 429 and not cut
    monkeypatch.setattr(Scheduler, "waiting", 0)
    assert post(client, about(cards[0][0], "What?")).status_code == 500 and len(cut) == 1


def test_bodies_that_come_together_have_a_limit():
    """Whoever is within it is served; a body counts until its request is answered, as long as it is kept."""
    answered, held = [], []

    async def app(scope, receive, send):
        size, more = 0, True
        while more:
            message = await receive()
            size, more = size + len(message["body"]), message["more_body"]
        answered.append(size)
        held.append(guard.held)

    guard = Guard(app, keys=(), max_bytes=100, body_seconds=5)

    async def ask(gate, first, rest=b""):
        sent, pieces = [], [first, rest]

        async def receive():
            if len(pieces) == 1:
                await gate.wait()
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

        async def send(message):
            sent.append(message)

        await guard({"type": "http", "headers": [], "path": "/x", "method": "POST"}, receive, send)
        return sent[0]["status"] if sent else 200

    async def run():
        gate = asyncio.Event()
        early = [asyncio.create_task(ask(gate, bytes(90))) for _ in range(AT_A_TIME)]
        await asyncio.sleep(0.01)
        assert guard.held == 90 * AT_A_TIME
        assert await ask(gate, bytes(90)) == 429
        gate.set()
        assert [await task for task in early] == [200] * AT_A_TIME
        assert guard.held == 0 and await ask(gate, bytes(90)) == 200
        assert await ask(gate, bytes(90), bytes(90)) == 413 and guard.held == 0

    asyncio.run(run())
    assert answered == [90] * (AT_A_TIME + 1) and min(held) >= 90


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_late_says_so(client, stream):
    """With 504, or as the last event of a stream, whose status went out before."""
    client = client(HttpOptions(seconds=0.2))
    step = client.app.state.front.service.scheduler._rows.step
    client.app.state.front.service.scheduler._rows.step = lambda *rest: (time.sleep(0.02), step(*rest))[1]
    answer = post(client, logit_bias={"2": -100}, stream=stream)
    body = events(answer)[-1] if stream else answer.json()
    assert answer.status_code == (200 if stream else 504)
    assert body["error"]["type"] == "server_error" and "the time for this request" in body["error"]["message"]


def test_several_images_of_a_message_stay_among_its_texts(client, cards):
    client = client(context=4096)
    images = [{"type": "image_url", "image_url": {"url": data_uri(image)}} for image, *_ in cards[:2]]
    texts = [{"type": "text", "text": text} for text in ("First:", "then:", "which?")]
    content = [texts[0], images[0], texts[1], images[1], texts[2]]
    body = client.post("/v1/tokenize", json={"messages": [{"role": "user", "content": content}]}).json()
    tokenizer = client.app.state.front.service.tokenizer
    between = [tokenizer.decode(part) for part in split(body["ids"], -200)]
    assert between[0].strip().endswith("First:") and between[1].strip() == "then:" and "which?" in between[2]
    sizes = [client.post("/v1/plan", json={"image_url": image["image_url"]}).json() for image in images]
    assert body["positions"] == len(body["ids"]) - 2 + sum(size["visual_tokens"] for size in sizes)
    # With one text its images come first, as the model was trained.
    message = [{"role": "user", "content": [images[0], texts[2], images[1]]}]
    ids = client.post("/v1/tokenize", json={"messages": message}).json()["ids"]
    assert "which?" in tokenizer.decode(split(ids, -200)[2])


def split(ids, mark):
    parts = [[]]
    for one in ids:
        parts[-1].append(one) if one != mark else parts.append([])
    return parts


def test_keys_are_asked_for(client):
    client = client(HttpOptions(keys=("first", "second"), cors=("https://page.example",)), context=256)
    assert client.get("/health").status_code == 200 and client.get("/").status_code == 200
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic first"},
        {"Authorization": "Bearer "},
    ):
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            answer = client.get(path, headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["type"] == "authentication_error"
    for key in ("first", "second"):
        assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    allowed = client.options("/v1/chat/completions", headers=asked)
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    other = client.options("/v1/chat/completions", headers={**asked, "Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


def test_large_bodies_bombs_and_strange_files_are_refused(client):
    client = client(HttpOptions(max_bytes=200_000, max_pixels=1_000_000), context=256)
    answer = post(client, "x" * 300_000)
    assert answer.status_code == 413 and "MiB" in answer.json()["error"]["message"]
    chunked = client.post("/v1/chat/completions", content=(b"x" * 10_000 for _ in range(50)))
    assert chunked.status_code == 413
    bomb = Image.new("1", (20_000, 20_000))  # 400 megapixels in 50 kB
    uri = data_uri(bomb)
    assert len(uri) < 100_000
    cases = {
        uri: "megapixels",
        "data:image/png;base64,AAAA": "no image of a known format",
        "data:image/png;base64,!!!!": "not base64",
        "data:text/html;base64,AAAA": "data URI",
        "data:image/png,raw": "data URI",
        data_uri(Image.new("RGB", (60, 60)), "EPS"): "no image of a known format",
        data_uri(Image.effect_noise((200, 200), 50))[:-20000]: "cannot be read",
        "https://example.com/a.png": "--allow-urls",
        "file:///etc/passwd": "data URI",
        "http://127.0.0.1/": "data URI",
    }
    for url, message in cases.items():
        part = {"type": "image_url", "image_url": {"url": url}}
        answer = post(client, [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}])
        assert answer.status_code == 400, (url[:40], answer.text)
        assert message in answer.json()["error"]["message"], (url[:40], answer.text)
    many = [{"type": "image_url", "image_url": {"url": data_uri(Image.new("RGB", (40, 40)))}}] * 17
    assert "at most 16" in post(client, [{"role": "user", "content": many}]).json()["error"]["message"]
