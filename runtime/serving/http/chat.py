"""From a chat request to the service's, and from its answer to OpenAI's words."""

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.language.detokenizer import TokenBytes
from uhd_export.runtime.serving.dialogue import Message
from uhd_export.runtime.serving.http.schema import (
    ChatMessage,
    ChatRequest,
    ImagePart,
    JsonFormat,
    SchemaFormat,
    TextPart,
)
from uhd_export.runtime.serving.sampling.choice import Choosing, Chosen
from uhd_export.runtime.serving.sampling.grammar import ANY_JSON
from uhd_export.runtime.serving.scheduling.request import Piece, Summary
from uhd_export.runtime.settings import Sampling

FINISH = {"stop": "stop", "length": "length", "context": "length"}
"""OpenAI's finish reasons of an answer that came to its end."""


def dialogue(messages: Sequence[ChatMessage]) -> tuple[list[Message], list[str]]:
    """The turns, and the images' URLs in their order.

    Where a message has one text, its images come before it, as the model was trained; among several texts
    they stay where they are.
    """
    turns, urls = [], []
    for message in messages:
        content = message.content
        parts = [TextPart(type="text", text=content)] if isinstance(content, str) else content
        images = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
        texts = [part.text for part in parts if isinstance(part, TextPart)]
        if len(texts) > 1:
            between = [""]
            for number, part in enumerate(parts):
                between[-1] += "\n" if number else ""
                if isinstance(part, ImagePart):
                    between.append("")
                else:
                    between[-1] += part.text
        else:
            between = ["", *["\n"] * len(images)]
            between[-1] += "".join(texts)
        turns.append(Message(message.role, tuple(between)))
        urls += images
    return turns, urls


def choosing(body: ChatRequest, usual: Sampling) -> Choosing:
    """How tokens are chosen, as `usual` where nothing is said. Raises UhdError naming a wrong field."""
    if body.top_logprobs is not None and not body.logprobs:
        raise UhdError("top_logprobs: needs logprobs to be true")
    try:
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    except ValueError:
        raise UhdError("logit_bias: the names must be token ids") from None
    return Choosing(
        usual.changed(
            temperature=body.temperature,
            top_k=None if body.top_k is None else max(body.top_k, 0),  # vLLM's clients write -1 for all
            top_p=body.top_p,
            min_p=body.min_p,
            seed=None if body.seed is None else body.seed % 2**63,
            repetition_penalty=body.repetition_penalty,
        ),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=bias,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


def stop_texts(body: ChatRequest) -> tuple[str, ...]:
    """Texts that end the answer."""
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if any(not text or len(text) > 256 for text in stop):
        raise UhdError("stop: each must have 1 to 256 characters")
    return tuple(stop)


def schema(body: ChatRequest) -> dict[str, Any] | None:
    """The JSON schema that the answer follows, if any."""
    if isinstance(body.response_format, SchemaFormat):
        return body.response_format.json_schema.schema_
    return ANY_JSON if isinstance(body.response_format, JsonFormat) else None


class Writer:
    """The objects of one answer, whole or in chunks."""

    def __init__(self, model: str, tokenizer: Tokenizer) -> None:
        self._tokens = TokenBytes(tokenizer)
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def answer(self, text: str, tokens: Sequence[Chosen], summary: Summary) -> dict[str, Any]:
        """The whole answer."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": FINISH[summary.reason],
            "logprobs": self._logprobs(tokens),
        }
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage(summary),
            "timings": timings(summary),
        }

    def first(self) -> str:
        """The first chunk, which names the role."""
        return self._chunk({"role": "assistant", "content": ""}, None)

    def piece(self, piece: Piece) -> str:
        """A chunk with text."""
        return self._chunk({"content": piece.text}, None, self._logprobs(piece.tokens))

    def last(self, summary: Summary) -> str:
        """The chunk that says why the answer ended."""
        return self._chunk({}, FINISH[summary.reason], timings=timings(summary))

    def usage(self, summary: Summary) -> str:
        """The chunk of `stream_options.include_usage`."""
        return json.dumps(
            {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(summary)}
        )

    def _chunk(
        self, delta: dict[str, str], reason: str | None, logprobs: dict[str, Any] | None = None, **more: Any
    ) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
        return json.dumps({**self._head, "object": "chat.completion.chunk", "choices": [choice], **more})

    def _logprobs(self, tokens: Sequence[Chosen]) -> dict[str, Any] | None:
        told = [chosen for chosen in tokens if chosen.logprob is not None]
        if not told:
            return None
        entries = [
            {
                **self._token(chosen.token, chosen.logprob),
                "top_logprobs": [self._token(token, value) for token, value in chosen.top],
            }
            for chosen in told
        ]
        return {"content": entries, "refusal": None}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text, known = self._tokens.read(token)
        return {"token": text, "logprob": logprob, "bytes": None if known is None else list(known)}


def usage(summary: Summary) -> dict[str, Any]:
    """Positions of the prompt, images included, and tokens of the answer, its end included."""
    return {
        "prompt_tokens": summary.prompt_tokens,
        "completion_tokens": summary.completion_tokens,
        "total_tokens": summary.prompt_tokens + summary.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": summary.cached_tokens},
    }


def timings(summary: Summary) -> dict[str, Any]:
    """Where the time went; beyond OpenAI's fields."""
    return {
        "seconds": {stage: round(seconds, 6) for stage, seconds in summary.seconds.items()},
        "first_token_seconds": summary.first_token,
        "total_seconds": summary.total,
        "images": summary.images,
        "images_encoded_before": summary.cached_images,
    }
