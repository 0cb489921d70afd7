"""Generation: prompts as sequences in, tokens and answers out, one after the other."""

from collections.abc import Generator, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from uhd_export.runtime.engines.base import Array, Engine, Stop
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.language.answer import Answer, Progress
from uhd_export.runtime.language.decoder import EMBEDS, Decoder
from uhd_export.runtime.language.detokenizer import Detokenizer
from uhd_export.runtime.language.embeddings import EmbeddingTable
from uhd_export.runtime.language.encoded_images import EncodedImages
from uhd_export.runtime.language.prefix_cache import PrefixCache
from uhd_export.runtime.language.sampling import penalised, sample
from uhd_export.runtime.language.sequence import PlannedImage, PromptSequence
from uhd_export.runtime.settings import Sampling
from uhd_export.runtime.stopwatch import Stopwatch
from uhd_export.runtime.turns import Turn, Turns


class TextGenerator:
    """The language part of a pipeline: what a prompt shares with the one before is not computed again.

    `most` is the largest context that the bundle allows; `eos` are the tokens that end an answer.
    """

    def __init__(
        self,
        engine: Engine,
        images: EncodedImages,
        table: EmbeddingTable,
        tokenizer: Tokenizer,
        turns: Turns,
        *,
        context: int,
        most: int,
        eos: tuple[int, ...],
    ) -> None:
        self._engine, self._images, self._table, self._turns = engine, images, table, turns
        self.tokenizer = tokenizer
        self.decoder = Decoder(engine, context)
        self.prefix = PrefixCache(self.decoder)
        self._most, self._eos = most, eos
        self.sampling = Sampling()
        """How tokens are chosen where the caller does not say."""
        self.prompt_limit: int | None = None
        """Positions at which the released code cuts a prompt: longer ones are refused."""

    def sequence(self, ids: Sequence[int], images: Sequence[PlannedImage]) -> PromptSequence:
        """The positions of token `ids` with `images`. Raises UhdError where they exceed the context."""
        self._turns.check()
        sequence, context = PromptSequence(ids, images), self.decoder.context
        if len(sequence) > context:
            raise UhdError(
                f"prompt: {len(sequence)} positions are more than the context of {context}; shorten the "
                f"prompt, lower --max-slices, or {self.larger_context(len(sequence))}"
            )
        if self.prompt_limit is not None and len(sequence) > self.prompt_limit:
            raise UhdError(
                f"prompt: {len(sequence)} positions are more than tokenizer_model_max_length "
                f"{self.prompt_limit}, where the released code cuts it; shorten it, or lower --max-slices"
            )
        return sequence

    def end_answer(self) -> None:
        """Wait for the unfinished answer of another thread; this thread's own cannot go on afterwards."""
        with self._turns.call():
            pass

    def larger_context(self, positions: int) -> str:
        """What to do for a context of `positions`: the bundle may allow it."""
        return (
            f"give a larger --context, up to {self._most}"
            if positions <= self._most
            else "build with a larger --context"
        )

    def embeds(
        self,
        sequence: PromptSequence,
        start: int = 0,
        watch: Stopwatch | None = None,
        stop: Stop | None = None,
    ) -> Array:
        """(S, D) embeddings from position `start` on; images before it are not encoded."""
        watch = watch or Stopwatch()
        pieces = []
        for segment in sequence.segments:
            if segment.stop > start:
                content = segment.content
                rows = (
                    self._images.rows(content, watch, stop)
                    if isinstance(content, PlannedImage)
                    else self._table.rows(content)
                )
                pieces.append(rows[max(start - segment.start, 0) :])
        return self._engine.gather(pieces, self._engine.inputs[EMBEDS].dtype)

    def prefill(self, sequence: PromptSequence) -> NDArray[Any]:
        """float32 (vocab,) logits after `sequence`, running only what the cache does not hold."""
        return self.prefix.prefill(sequence.keys, self.embeds(sequence, self.prefix.match(sequence.keys)))

    def step(self, token: int) -> NDArray[Any]:
        """float32 (vocab,) logits after one more `token`."""
        return self.prefix.step(token, self._table.rows([token])[0])

    def tokens(
        self, sequence: PromptSequence, max_new_tokens: int, sampling: Sampling | None = None
    ) -> Generator[int, None, None]:
        """Tokens that continue `sequence`, until end of text (included), `max_new_tokens` or a full cache."""
        return self._checked(sequence, max_new_tokens, sampling, Progress(len(sequence), Stopwatch()))

    def answer(
        self,
        sequence: PromptSequence,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        watch: Stopwatch | None = None,
    ) -> Answer:
        """The answer to `sequence`; `watch` has what its images took so far. Nothing is run yet."""
        progress = Progress(len(sequence), watch or Stopwatch())
        tokens = self._checked(sequence, max_new_tokens, sampling, progress)
        return Answer(tokens, progress, Detokenizer(self.tokenizer), self._eos)

    def _checked(
        self, sequence: PromptSequence, max_new_tokens: int, sampling: Sampling | None, progress: Progress
    ) -> Generator[int, None, None]:
        if max_new_tokens < 1:
            raise UhdError(f"max_new_tokens: {max_new_tokens} is out of range; use 1 or more")
        return self._tokens(sequence, max_new_tokens, sampling or self.sampling, progress)

    def _tokens(
        self, sequence: PromptSequence, max_new_tokens: int, sampling: Sampling, progress: Progress
    ) -> Generator[int, None, None]:
        turn, random, watch, stop = Turn(), sampling.generator(), progress.watch, progress.stop
        try:
            with self._turns.begin(turn, stop):
                progress.started = True
                progress.cached_tokens = self.prefix.match(sequence.keys)
                embeds = self.embeds(sequence, progress.cached_tokens, watch, stop)
                with watch.stage("prefill"):
                    token = self._first(sequence.keys, embeds, sampling, random, stop)
            while not self._last(token, max_new_tokens, progress):
                yield token
                with self._turns.go_on(turn), watch.stage("decode"):
                    token = self._next(progress.ids, sampling, random, stop)
        finally:
            self._turns.end(turn)
        yield token

    def _first(
        self,
        keys: Sequence[Hashable],
        embeds: Array,
        sampling: Sampling,
        random: np.random.Generator,
        stop: Stop,
    ) -> int:
        """The token after the prompt `keys`, of which `embeds` are not in the cache."""
        if sampling.greedy:
            return self.prefix.prefill_greedy(keys, embeds, stop)
        return sample(self.prefix.prefill(keys, embeds, stop), sampling, random)

    def _next(self, ids: Sequence[int], sampling: Sampling, random: np.random.Generator, stop: Stop) -> int:
        """The token after the answer so far, `ids`."""
        token, embed = ids[-1], self._table.rows(ids[-1:])[0]
        if sampling.greedy:
            return self.prefix.step_greedy(token, embed, stop)
        return sample(penalised(self.prefix.step(token, embed, stop), ids, sampling), sampling, random)

    def _last(self, token: int, max_new_tokens: int, progress: Progress) -> bool:
        """Whether the answer ends with `token`, which joins it."""
        progress.ids.append(token)
        if token in self._eos:
            progress.finish_reason = "stop"
        elif len(progress.ids) == max_new_tokens:
            progress.finish_reason = "length"
        elif not self.decoder.remaining:
            progress.finish_reason = "context"
        return progress.finish_reason is not None
