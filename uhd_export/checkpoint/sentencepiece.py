"""SentencePiece BPE models: their pieces, and the merges that give the same segmentation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uhd_export.runtime.errors import UhdError

SPACE = "\u2581"  # how SentencePiece writes a space
_BPE = 2
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6


@dataclass(frozen=True)
class SentencePieceModel:
    """A BPE model without normalisation, as LLaMA's."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    unknown: str
    controls: tuple[str, ...]
    bos: str
    eos: str
    byte_fallback: bool


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a tokenizer.model.

    Raises UhdError where the file is broken, or of a kind whose segmentation `tokenizers` cannot
    reproduce: unigram models, text normalisation, user-defined or unused pieces.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at run time
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        raise UhdError(f"{path}: not a readable SentencePiece model; download it again") from None
    kinds: dict[int, list[str]] = {}
    for piece in model.pieces:
        kinds.setdefault(piece.type, []).append(piece.piece)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    for unsupported, reason in (
        (not model.pieces, "it holds no pieces"),
        (trainer.model_type != _BPE, "it is no BPE model"),
        (kinds.keys() - {_NORMAL, _UNKNOWN, _CONTROL, _BYTE}, "it has user-defined or unused pieces"),
        (len(kinds.get(_UNKNOWN, [])) != 1, "it must have one unknown piece"),
        (normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces, "it normalises text"),
        (not normalizer.add_dummy_prefix, "it adds no leading space"),
        (not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix, "its spaces are unusual"),
    ):
        if unsupported:
            raise UhdError(f"{path}: not supported, {reason}; convert it to a tokenizer.json")
    return SentencePieceModel(
        vocab={piece.piece: number for number, piece in enumerate(model.pieces)},
        merges=_merges({piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}),
        unknown=kinds[_UNKNOWN][0],
        controls=tuple(kinds.get(_CONTROL, [])),
        bos=trainer.bos_piece,
        eos=trainer.eos_piece,
        byte_fallback=trainer.byte_fallback,
    )


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, best first.

    SentencePiece joins the neighbours whose joint piece scores best, the leftmost of equals. Scores
    are unique but for runs of spaces, where leftmost first means that the longest run goes first.
    """
    pairs = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                pairs.append((-score, -len(piece), piece, -cut, left, right))
    pairs.sort()
    return [(left, right) for *_, left, right in pairs]
