"""The cluster's door, above replicas that die at each point of an answer."""

import asyncio

import pytest
from starlette.requests import Request

from uhd_export.runtime.serving.http.front import HttpOptions

pytest.importorskip("ray")

BODY = b'{"image_url": {"url": "data:image/png;base64,AAAA"}}'


class Replicas:
    """A deployment's handle: each call plays the next of `answers`, a message or an error at a time."""

    def __init__(self, *answers):
        self.answers, self.keys = list(answers), []

    def options(self, *, stream, multiplexed_model_id):
        self.keys.append(multiplexed_model_id)
        return self

    @property
    def call(self):
        return self

    async def remote(self, call):
        for each in self.answers.pop(0):
            if isinstance(each, Exception):
                raise each
            yield each


def start(kind="application/json"):
    return {"status": 200, "headers": [(b"content-type", kind.encode())]}


def died():
    from ray.exceptions import ActorDiedError

    return ActorDiedError()


def ask(*answers):
    """Status and body of what comes of the door, and how often it called a replica."""
    from uhd_export.runtime.serving.cluster.serve import Door

    async def receive():
        return {"type": "http.request", "body": BODY, "more_body": False}

    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": []}
    sent, replicas = [], Replicas(*answers)

    async def send(message):
        sent.append(message)

    async def run():
        response = await Door(replicas, HttpOptions())(Request(scope | {"server": ("a", 1)}, receive))
        await response(scope | {"asgi": {"spec_version": "2.4"}}, receive, send)

    asyncio.run(run())
    assert len(set(replicas.keys)) == 1 and replicas.keys[0]
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent), len(replicas.keys)


def test_one_answer_is_passed_on():
    assert ask([start(), {"body": b"a"}, {"body": b"b"}]) == (200, b"ab", 1)


def test_a_replica_that_dies_before_or_in_the_middle_of_an_answer_leaves_it_to_another():
    assert ask([died()], [start(), {"body": b"half"}, died()], [start(), {"body": b"ok"}]) == (200, b"ok", 3)


def test_where_all_die_it_is_503():
    status, body, calls = ask([died()], [start(), died()], [died()])
    assert (status, calls) == (503, 3) and b"no replica could answer" in body


def test_a_stream_that_breaks_says_so():
    events = start("text/event-stream")
    status, body, calls = ask([events, {"body": b"data: {}\n\n"}, died()])
    assert (status, calls) == (200, 1)
    assert body.startswith(b"data: {}") and b"the replica was lost" in body and b"[DONE]" in body
