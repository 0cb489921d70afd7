"""Stage 2: the language model learns to look up a card's code among the visual tokens.

Sequences are whole conversations, several questions about one image in the runtime's own words, with
the loss on the answers only (digits, then `</s>`). From one slice to whole images of seven crops.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F

from uhd_export.model.language import LanguageModel, SelfAttention, rotary_tables
from uhd_export.nano.cards import NAMES, TRAIN_SEED, question
from uhd_export.nano.token_pool import GRID, SLICES, Crop, TokenPool
from uhd_export.nano.tokenizer import TEMPLATE
from uhd_export.nano.windows import SIDE
from uhd_export.runtime.image.layout import Separators, layout_indices
from uhd_export.runtime.language.prompt import FOLLOW_UPS, IMAGE_ID, encode, render

IGNORE = -100


class Conversations:
    """Turns crops into (embeddings, targets) of a conversation about all their codes."""

    def __init__(self, tokenizer: Tokenizer, separators: Separators) -> None:
        self.separators = separators
        vocabulary = tokenizer.get_vocab()
        self.eos = vocabulary["</s>"]
        self.digit = [vocabulary[str(d)] for d in range(10)]
        self.first: dict[int, list[int]] = {}
        self.next: dict[int, list[int]] = {}
        self.words = torch.tensor(
            [tokenizer.encode(f" {name}", add_special_tokens=False).ids[-1] for name in NAMES]
        )
        for i, name in enumerate(NAMES, 1):
            self.first[i] = encode(tokenizer, render(question(name), TEMPLATE))
            text = FOLLOW_UPS[TEMPLATE].replace("{question}", question(name))
            self.next[i] = tokenizer.encode(text, add_special_tokens=False).ids

    def ids(self, codes: dict[int, str], order: list[int]) -> tuple[list[int], list[bool]]:
        """Token ids with IMAGE_ID in place, and which of them are answers."""
        out: list[int] = []
        answer: list[bool] = []
        for turn, colour in enumerate(order):
            text = self.next[colour] if turn else self.first[colour]
            out += text
            # The follow-up opens with the `</s>` that ends the answer before it.
            answer += [turn > 0] + [False] * (len(text) - 1)
            out += [self.digit[int(d)] for d in codes[colour]]
            answer += [True] * len(codes[colour])
        return [*out, self.eos], [*answer, True]

    def build(
        self, crops: list[Crop], grid: tuple[int, int] | None, order: list[int], table: nn.Embedding
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (S, D) and next-token targets (S,) with IGNORE outside answers."""
        codes = {colour: code for crop in crops for colour, code in crop.codes.items()}
        ids, answer = self.ids(codes, order)
        at = ids.index(IMAGE_ID)
        if grid is None:  # one crop, perhaps thinned
            return self._join(ids, answer, at, crops[0].tokens.float(), table)
        source, tokens = layout_indices(grid, layout="flat", side=SIDE, separators=self.separators)
        visual = torch.cat([crop.tokens for crop in crops]).float()[torch.from_numpy(source).clamp(min=0)]
        separators = torch.from_numpy(source) < 0
        visual = torch.where(separators[:, None], table(torch.from_numpy(tokens).clamp(min=0)), visual)
        return self._join(ids, answer, at, visual, table)

    def _join(
        self, ids: list[int], answer: list[bool], at: int, visual: torch.Tensor, table: nn.Embedding
    ) -> tuple[torch.Tensor, torch.Tensor]:
        text = table(torch.tensor(ids[:at] + ids[at + 1 :]))
        embeds = torch.cat([text[:at], visual, text[at:]])
        targets = torch.full((len(embeds),), IGNORE)
        after = torch.tensor([t if a else IGNORE for t, a in zip(ids, answer, strict=True)][at + 1 :])
        targets[-len(after) - 1 : -1] = after
        return embeds, targets


def draw(
    rng: np.random.Generator, pool: TokenPool, slices: int, real: float, windows: int
) -> tuple[list[Crop], tuple[int, int] | None]:
    """Crops and grid of one training image: `slices` 0 is one slice alone, as if an overview,
    of which `windows` are kept."""
    if slices == 0:
        return [pool.slices[rng.integers(len(pool.slices))].thinned(rng, windows)], None
    if slices == SLICES:
        if rng.random() < real:
            return pool.images[rng.integers(len(pool.images))], GRID
        return pool.compose(rng, slices), GRID
    return pool.compose(rng, slices), (slices, 1)


@dataclass(frozen=True)
class LanguageStage:
    """One length of the curriculum, trained on sequences of `slices` (0: one alone, without overview).

    `windows` of a slice alone are kept; `real` is the share of whole images that are not composed, for six
    slices; `questions` at most in a conversation. `word_weight` is of an auxiliary loss: after the first
    layer, an answer's positions shall show the colour asked about. The rate goes linearly to `final_rate`.
    """

    slices: int
    steps: int
    batch: int
    rate: float
    final_rate: float
    windows: int = SIDE * SIDE
    questions: int = 8
    word_weight: float = 0.3
    real: float = 0.4


def train_language(
    model: LanguageModel,
    conversations: Conversations,
    pool: TokenPool,
    stage: LanguageStage,
    *,
    seed: int,
    log: Callable[[str], None],
    save: Callable[[], None],
) -> float:
    """Train in place on one length of the curriculum; returns the running share of right answers."""
    steps, rate = stage.steps, stage.rate
    rng = np.random.default_rng((TRAIN_SEED, seed))
    optimiser = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.01)
    start, right, average = time.monotonic(), 0.0, None
    for step in range(1, steps + 1):
        examples: list[tuple[torch.Tensor, torch.Tensor]] = []
        orders: list[list[int]] = []
        while len(examples) < stage.batch:
            crops, grid = draw(rng, pool, stage.slices, stage.real, stage.windows)
            colours = [colour for crop in crops for colour in crop.codes]
            if colours:
                order = [colours[i] for i in rng.permutation(len(colours))][: stage.questions]
                orders.append(order)
                examples.append(conversations.build(crops, grid, order, model.model.embed_tokens))
        embeds = nn.utils.rnn.pad_sequence([e for e, _ in examples], batch_first=True)
        targets = nn.utils.rnn.pad_sequence([t for _, t in examples], batch_first=True, padding_value=IGNORE)
        for group in optimiser.param_groups:
            group["lr"] = min(step / 50, 1) * (rate + (stage.final_rate - rate) * step / steps)
        with torch.autocast("cpu", torch.bfloat16):
            logits, early = answer_logits(model, embeds, targets)
        answers = targets[targets != IGNORE]
        loss = F.cross_entropy(logits.float(), answers)
        if stage.word_weight:
            colours_asked = torch.tensor([colour - 1 for order in orders for colour in order])
            words = model.model.embed_tokens.weight[conversations.words]
            scores = F.rms_norm(early.float(), early.shape[-1:]) @ F.rms_norm(words, words.shape[-1:]).T
            scores = scores / words.shape[-1] ** 0.5
            turn = len(answers) // len(colours_asked)
            loss = loss + stage.word_weight * F.cross_entropy(scores, colours_asked.repeat_interleave(turn))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        share = (logits.argmax(-1) == answers).float().mean().item()
        right = 0.95 * right + 0.05 * share if average is not None else share
        average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
        if step % 20 == 0 or step == steps:
            spent = time.monotonic() - start
            state = f"loss {average:.3f} tokens right {right:.3f} {spent:.0f} s"
            log(f"language {stage.slices} slices step {step}/{steps} {state}")
        if step % 100 == 0 or step == steps:
            save()
    return right


def answer_logits(
    model: LanguageModel, embeds: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (answers, vocab) at the positions that `targets` asks for, and layer 1's output there."""
    inner, hidden = model.model, embeds
    answers = targets != IGNORE
    early: list[torch.Tensor] = []
    cos, sin = rotary_tables(model.config, torch.arange(embeds.shape[1]))
    for layer in inner.layers:
        hidden = hidden + _attend(layer.self_attn, layer.input_layernorm(hidden), cos, sin)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        early = early or [hidden[answers]]
    return model.lm_head(inner.norm(hidden[answers])), early[0]


def _attend(attention: SelfAttention, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`SelfAttention.forward` of a whole sequence, by the causal kernel (no mask tensor)."""
    size = attention.config.head_size
    q, k, v = (
        p(x).unflatten(-1, (-1, size)).transpose(1, 2)
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = (_turn(t, cos, sin).to(v.dtype) for t in (q, k))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return attention.o_proj(out.transpose(1, 2).flatten(2))


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
