"""A SentencePiece model as a `tokenizer.json`, which `transformers` opens with no custom code.

What SentencePiece does in one pass, `tokenizers` does in steps: the characters are mapped by the model's own table, spaces are
trimmed and written as `▁`, and then tokens are merged by score (BPE) or the likeliest sequence is found (unigram). The model
does not store merges: they are all pairs of tokens whose concatenation is a token, in the order of its score.
"""

from __future__ import annotations

import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors

SPACE = "▁"
UNIGRAM, BPE = 1, 2
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def as_tokenizer(model: sentencepiece.SentencePieceProcessor) -> tokenizers.Tokenizer | None:
    """The same tokenizer in `tokenizers`, or None if it has no counterpart there. The caller must test that the ids are equal.

    Args:
        model: any SentencePiece model.
    """
    from sentencepiece import sentencepiece_model_pb2  # needs protobuf, which TensorBoard brings

    proto = sentencepiece_model_pb2.ModelProto.FromString(model.serialized_model_proto())  # type: ignore[attr-defined]
    spec, trained, pieces = proto.normalizer_spec, proto.trainer_spec, proto.pieces
    if (
        trained.model_type not in (UNIGRAM, BPE)
        or trained.treat_whitespace_as_suffix
        or not spec.escape_whitespaces
        or any(piece.type == UNUSED for piece in pieces)
    ):
        return None
    has_bytes = bool(trained.byte_fallback)
    if trained.model_type == UNIGRAM:
        scored = [(piece.piece, piece.score) for piece in pieces]
        made = tokenizers.Tokenizer(models.Unigram(scored, unk_id=model.unk_id(), byte_fallback=has_bytes))
    else:
        scores = {piece.piece: piece.score for piece in pieces if piece.type in (NORMAL, USER_DEFINED)}
        made = tokenizers.Tokenizer(
            models.BPE(
                vocab={piece.piece: number for number, piece in enumerate(pieces)},
                merges=_merges(scores),
                unk_token=model.id_to_piece(model.unk_id()),
                fuse_unk=True,
                byte_fallback=has_bytes,
            )
        )
    made.normalizer = _normalizer(spec)
    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else steps)
    made.add_special_tokens([piece.piece for piece in pieces if piece.type == CONTROL])
    made.add_tokens([AddedToken(piece.piece, normalized=False) for piece in pieces if piece.type == USER_DEFINED])
    if (begin := model.bos_id()) >= 0:  # as SentencePiece's own `add_bos`
        name = model.id_to_piece(begin)
        made.post_processor = processors.TemplateProcessing(single=f"{name} $A", special_tokens=[(name, begin)])
    return made


def _normalizer(spec: object) -> normalizers.Normalizer:
    table, trims, prefixed = (
        getattr(spec, name) for name in ("precompiled_charsmap", "remove_extra_whitespaces", "add_dummy_prefix")
    )
    steps: list[normalizers.Normalizer] = []
    if table:
        steps.append(normalizers.Precompiled(table))
    if trims:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps.append(normalizers.Replace(" ", SPACE))
    if prefixed:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence(steps)


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The pairs that make a token, best score first; for the same token, the shortest left part first."""
    best = sorted((piece for piece in scores if len(piece) > 1), key=lambda piece: -scores[piece])
    return [
        (piece[:cut], piece[cut:])
        for piece in best
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
