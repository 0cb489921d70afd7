"""The embedded model's tokenizer: byte-level BPE trained on the prompts it will see.

A digit is always one token, `<s>` (1) opens every text as with Llama, `</s>` (2) ends an answer.
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from uhd_export.nano.cards import NAMES, question
from uhd_export.runtime.files import replacing
from uhd_export.runtime.language.prompt import FOLLOW_UPS, IMAGE, TEMPLATES

VOCABULARY = 512
SPECIAL = ("<unk>", "<s>", "</s>")
TEMPLATE = "vicuna_v1"
# Everyday words beside the questions, so that other questions do not fall apart into bytes.
_OTHER = (
    "Which cards are in the image? How many cards are there? What colour is the card? "
    "Read the small print on the card. What is written on it? Describe the image."
)


def build_tokenizer() -> Tokenizer:
    """Train the tokenizer; the same every time."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [_OTHER]
    for name in NAMES:
        for template in (TEMPLATES[TEMPLATE], FOLLOW_UPS[TEMPLATE]):
            corpus.extend(template.replace("{question}", f"{IMAGE}\n{question(name)}").split(IMAGE))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=1,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def separator_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of the comma and the newline, which the token layout puts between slices."""
    return [tokenizer.encode(text, add_special_tokens=False).ids[0] for text in (",", "\n")]


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write tokenizer.json, whole or not at all."""
    with replacing(path) as partial:
        tokenizer.save(str(partial))
