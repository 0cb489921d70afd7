"""Many requests of all kinds: each is answered or refused properly, and nothing is left behind."""

import asyncio
import gc
import os
import random
import threading
from collections import Counter
from collections.abc import Callable

import httpx
import pytest
from PIL import Image
from support.live_server import live
from support.requests import data_uri

from uhd_export.runtime.serving.http.front import HttpOptions
from uhd_export.runtime.serving.scheduling.scheduler import Limits

REQUESTS, CALLERS = 2000, 12


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def pictures() -> list[str]:
    sizes = random.Random(0)
    return [
        data_uri(Image.effect_noise((sizes.randint(30, 250), sizes.randint(30, 250)), 40).convert("RGB"))
        for _ in range(8)
    ]


async def one(client: httpx.AsyncClient, number: int, images: list[str]) -> str:
    """Make request `number`, whose kind is drawn, and tell what became of it."""
    draw = random.Random(number)
    kind = draw.choices(["text", "image", "cancelled", "bad"], [60, 12, 14, 14])[0]
    content: list | str = "word " * draw.randint(1, 150)
    if kind == "image":
        content = [
            {"type": "image_url", "image_url": {"url": draw.choice(images)}},
            {"type": "text", "text": content},
        ]
    body: dict = {"messages": [{"role": "user", "content": content}], "max_tokens": draw.randint(1, 24)}
    if draw.random() < 0.5:
        body["logit_bias"] = {"2": -100}
    if draw.random() < 0.3:
        body |= {"temperature": 1.0, "top_p": 0.9, "seed": number}
    if kind == "cancelled":
        body |= {"stream": True, "max_tokens": 400, "logit_bias": {"2": -100}}
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for _ in answer.aiter_lines():
                break
        return f"cancelled {answer.status_code}"
    if kind == "bad":
        wrong = {
            "max_tokens": draw.choice([0, -1, "many"]),
            "messages": draw.choice([[], "x", [{"role": "robot", "content": "x"}]]),
            "unknown": 1,
            "stop": [""],
        }
        name = draw.choice(list(wrong))
        if draw.random() < 0.2:
            answer = await client.post("/v1/chat/completions", content=b"{" * draw.randint(1, 500_000))
            return f"bad {answer.status_code}"
        body[name] = wrong[name]
    if draw.random() < 0.3:
        body["stream"] = True
    answer = await client.post("/v1/chat/completions", json=body)
    if answer.status_code == 200 and not body.get("stream"):
        assert answer.json()["usage"]["completion_tokens"] <= body["max_tokens"]
    if answer.status_code == 429:
        assert int(answer.headers["retry-after"]) >= 1
    return f"{'bad' if kind == 'bad' else 'good'} {answer.status_code}"


async def many(address: str, numbers: range, images: list[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    todo = iter(numbers)

    async def caller(client: httpx.AsyncClient) -> None:
        for number in todo:
            found[await one(client, number, images)] += 1

    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        await asyncio.gather(*(caller(client) for _ in range(CALLERS)))
    return found


@pytest.mark.slow
def test_two_thousand_requests_leave_nothing_behind(serve):
    images = pictures()
    serve(slots=1, context=64).close()  # what is opened once and for all
    outer = threading.active_count(), descriptors()
    service = serve(slots=4, context=1024, image_cache=1 << 20, limits=Limits(waiting=7))
    with live(service, HttpOptions(max_bytes=300_000)) as address:
        warm = asyncio.run(many(address, range(300), images))
        inner = threading.active_count(), descriptors()
        memory = resident()
        found = asyncio.run(many(address, range(300, REQUESTS), images))
        assert sum((warm + found).values()) == REQUESTS
        assert set(found) <= {
            *("good 200", "good 429", "cancelled 200", "cancelled 429"),
            *("bad 400", "bad 413", "bad 429"),
        }, found
        assert found["good 200"] > 200 and found["bad 400"] > 100 and found["cancelled 200"] > 50, found
        assert eventually(lambda: service.scheduler.busy_slots == 0)
        assert service.scheduler.waiting == 0
        gc.collect()
        assert resident() - memory < 40 << 20
        assert threading.active_count() <= inner[0]
        # The server closes its ends of the callers' connections when it comes to it.
        assert eventually(lambda: descriptors() <= inner[1] + 2)
        assert service.encoded.nbytes <= 1 << 20
    service.close()
    gc.collect()
    assert threading.active_count() <= outer[0] and descriptors() <= outer[1] + 2


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether `condition` comes true within seconds."""
    for _ in range(500):
        if condition():
            return True
        threading.Event().wait(0.01)
    return False
