"""Tokenizers: whatever a checkpoint ships, as one `tokenizers` object the runtime can load.

Checkpoints hold a ready tokenizer.json, a SentencePiece model (LLaMA, Vicuna) or the vocabulary and
merges of byte-level BPE (Qwen2). The second and third are converted here; the ids are those of the
tokenizers that the released code loads (transformers' `LlamaTokenizer` and `Qwen2Tokenizer`).
"""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from uhd_export.checkpoint.fields import optional, read_json
from uhd_export.checkpoint.sentencepiece import SPACE, read_sentencepiece
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.language.tokenizer_file import read_tokenizer

# How Qwen2 splits text before byte-level BPE: a constant of the format, as in its tokenizer.json.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def checkpoint_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of the checkpoint in `folder`.

    Raises UhdError where there is none, or where it is broken or of a kind that is not supported.
    """
    folder = Path(folder)
    settings = _settings(folder)
    if (folder / "tokenizer.json").is_file():
        tokenizer = read_tokenizer(folder / "tokenizer.json", "download it again")
    elif (folder / "tokenizer.model").is_file():
        tokenizer = _llama(folder / "tokenizer.model", settings)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        tokenizer = _qwen2(folder)
    else:
        raise UhdError(
            f"checkpoint {folder}: holds no tokenizer.json, tokenizer.model, or vocab.json with merges.txt; "
            "copy the base language model's into it"
        )
    _add_tokens(tokenizer, folder, settings)
    # Left by whoever trained with it; a prompt is neither cut nor filled up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether the checkpoint in `folder` holds a tokenizer of a known kind."""
    kinds = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
    return any(all((folder / name).is_file() for name in names) for names in kinds)


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One past the highest id, to which the released code cuts a model's vocabulary."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _settings(folder: Path) -> dict:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def _llama(path: Path, settings: dict) -> Tokenizer:
    """A SentencePiece BPE model with the conventions of the slow LlamaTokenizer.

    Special tokens are cut out first. With `legacy` (the default) each piece of text between them
    gets SentencePiece's leading space; without, only the beginning of the text does. There, a space
    at the start of a later piece becomes two: the one case that differs.
    """
    model = read_sentencepiece(path)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=model.vocab,
            merges=model.merges,
            unk_token=model.unknown,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    )
    spaces = normalizers.Replace(" ", SPACE)
    if optional(settings, "legacy", bool, True, "tokenizer_config"):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
    else:
        # Metaspace adds no space before one; SentencePiece does.
        double = normalizers.Replace(Regex(rf"\A{SPACE}"), SPACE * 2)
        tokenizer.normalizer = normalizers.Sequence([spaces, double])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", left=1, right=0),
        ]
    )
    tokenizer.add_special_tokens([_token(piece, special=True) for piece in (model.unknown, *model.controls)])
    before = [_named(settings, "bos_token", model.bos)] if _adds(settings, "add_bos_token", True) else []
    after = [_named(settings, "eos_token", model.eos)] if _adds(settings, "add_eos_token", False) else []
    named = {}
    for piece in before + after:
        if piece not in model.vocab:
            raise UhdError(f"{path}: token {piece!r} of tokenizer_config is not in the vocabulary")
        named[piece] = model.vocab[piece]
    if named:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after], special_tokens=list(named.items())
        )
    return tokenizer


def _adds(settings: dict, field: str, default: bool) -> bool:
    return optional(settings, field, bool, default, "tokenizer_config")


def _named(settings: dict, field: str, default: str) -> str:
    value = optional(settings, field, (str, dict), default, "tokenizer_config")
    return value if isinstance(value, str) else optional(value, "content", str, default, "tokenizer_config")


def _qwen2(folder: Path) -> Tokenizer:
    """Byte-level BPE with Qwen2's normalisation and splitting."""
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises plain Exception
        raise UhdError(
            f"checkpoint {folder}: vocab.json and merges.txt are not readable ({error}); download them again"
        ) from None
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, folder: Path, settings: dict) -> None:
    """Tokens of added_tokens.json and of tokenizer_config's added_tokens_decoder, kept atomic."""
    added: dict[int, AddedToken] = {}
    path = folder / "added_tokens.json"
    if path.is_file():
        for content, number in read_json(path).items():
            if type(number) is not int:
                raise UhdError(f"{path}: {content!r} must have a whole number, not {number!r}")
            added[number] = _token(content, special=content.startswith("<|"))
    for number, entry in optional(settings, "added_tokens_decoder", dict, {}, "tokenizer_config").items():
        if not number.isdigit() or not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise UhdError(
                f"tokenizer_config field added_tokens_decoder: entry {number!r} must be a token with content"
            )
        flags = {name: bool(entry.get(name)) for name in ("special", "lstrip", "rstrip", "single_word")}
        added[int(number)] = _token(entry["content"], **flags)
    for number, token in sorted(added.items()):
        if number in tokenizer.get_added_tokens_decoder() and tokenizer.id_to_token(number) == token.content:
            continue
        add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
        add([token])
        if tokenizer.token_to_id(token.content) != number:
            raise UhdError(
                f"checkpoint {folder}: added token {token.content!r} has id {number}, but would get "
                f"{tokenizer.token_to_id(token.content)}; the ids between are missing from the added tokens"
            )


def _token(content: str, **flags: bool) -> AddedToken:
    """An added token, found in the text as it is, before any normalisation."""
    return AddedToken(content, normalized=False, **flags)
