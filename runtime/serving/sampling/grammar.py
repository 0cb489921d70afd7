"""Answers that follow a JSON schema, by llguidance: which tokens may come next."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from uhd_export.runtime.errors import UhdError

if TYPE_CHECKING:
    import llguidance

ANY_JSON = {"type": "object"}
"""The schema of `response_format` json_object."""
_LARGEST = 64 << 10


class Grammars:
    """Compiles schemas for one tokenizer, which is read when the first is asked for."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, eos: Sequence[int]) -> None:
        self._tokenizer, self._vocab, self._eos = tokenizer, vocab, list(eos)
        self._ours: llguidance.LLTokenizer | None = None

    def json_schema(self, schema: dict[str, Any]) -> "Grammar":
        """The grammar of JSON documents that `schema` admits. Raises UhdError where it is none."""
        try:
            import llguidance
        except ImportError:
            raise UhdError(
                "response_format: this needs llguidance, which is not installed: "
                "pip install 'uhd-export[serve]'"
            ) from None
        text = json.dumps(schema)
        if len(text) > _LARGEST:
            raise UhdError(f"response_format: the schema has {len(text)} bytes; use at most {_LARGEST}")
        if self._ours is None:
            self._ours = llguidance.LLTokenizer(
                self._tokenizer.to_str(), n_vocab=self._vocab, eos_token=self._eos
            )
        try:
            # Without a bound on white space a model may write nothing else.
            grammar = llguidance.LLMatcher.grammar_from_json_schema(
                text, overrides={"whitespace_flexible": False}
            )
        except ValueError as error:
            raise UhdError(f"response_format: no JSON schema ({_first_line(error)})") from None
        grammar_object = Grammar(self._ours, grammar, self._vocab)
        grammar_object.follow()
        return grammar_object


class Grammar:
    """A compiled schema; `follow` begins an answer."""

    def __init__(self, tokenizer: "llguidance.LLTokenizer", grammar: str, vocab: int) -> None:
        self._tokenizer, self._grammar, self._vocab = tokenizer, grammar, vocab

    def follow(self) -> "Follower":
        """The state at an answer's beginning. Raises UhdError where the schema cannot be followed."""
        import llguidance

        matcher = llguidance.LLMatcher(self._tokenizer, self._grammar, log_level=0)
        if matcher.is_error():
            raise UhdError(f"response_format: {_first_line(matcher.get_error())}; simplify the schema")
        return Follower(matcher, self._vocab)


class Follower:
    """How far an answer has come in its grammar."""

    def __init__(self, matcher: "llguidance.LLMatcher", vocab: int) -> None:
        self._matcher, self._vocab = matcher, vocab

    def allowed(self) -> NDArray[Any]:
        """Bool (vocab,): the tokens that may come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask = np.unpackbits(bits, bitorder="little")[: self._vocab].astype(bool)
        if not mask.any():
            raise UhdError("response_format: no token may follow; simplify the schema")
        return mask

    def accept(self, token: int) -> None:
        """`token` was chosen."""
        if not self._matcher.consume_token(token):
            raise UhdError(f"response_format: {_first_line(self._matcher.get_error())}")

    @property
    def done(self) -> bool:
        """Whether nothing but the end may follow."""
        return self._matcher.is_stopped()


def _first_line(reason: object) -> str:
    return str(reason).strip().splitlines()[0] if str(reason).strip() else "refused"
