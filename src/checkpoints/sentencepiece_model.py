"""SentencePiece's own file of a tokenizer, `tokenizer.model`, read to and written from scored pieces.

    pieces, encode = read_model(Path("tokenizer.model"))
    encode("Once") == pieces.encode("Once")

`encode` is SentencePiece's own, which shares no code with Hugging Face's tokenizers.

Source: https://github.com/google/sentencepiece/blob/v0.2.0/src/sentencepiece_model.proto
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from src.checkpoints.optional import optional
from src.checkpoints.pieces import ScoredPieces, repeated_pieces
from utils.errors import UserError, some

if TYPE_CHECKING:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def read_model(path: Path) -> tuple[ScoredPieces, Callable[[str], list[int]]]:
    """Read the pieces of a file, and SentencePiece's own tokenization with the begin token in front.

    Raises:
        UserError: the file is damaged, or its kind of model, a step around it or a kind of piece is beyond scored
            pieces; it is named.
    """
    content = path.read_bytes()
    decode_error = optional("google.protobuf.message", "a SentencePiece tokenizer").DecodeError
    model = _protocol().ModelProto()
    try:
        model.ParseFromString(content)
    except decode_error as error:
        raise UserError(f"{path} is no whole SentencePiece model ({error}); fetch it again") from error
    pieces = _pieces(path, model)
    processor = optional("sentencepiece", "a SentencePiece tokenizer").SentencePieceProcessor()
    processor.LoadFromSerializedProto(content)
    return pieces, lambda text: [pieces.bos_id, *processor.EncodeAsIds(text)]


def write_model(pieces: ScoredPieces, path: Path) -> None:
    """Write pieces as a model of kind BPE that puts a space in front, marks spaces, and changes no character."""
    model = _protocol().ModelProto()
    kinds = model.SentencePiece
    controls = {pieces.unk_id: kinds.UNKNOWN, pieces.bos_id: kinds.CONTROL, pieces.eos_id: kinds.CONTROL}
    controls |= dict.fromkeys(range(pieces.first_byte_id, pieces.first_byte_id + 256), kinds.BYTE)
    for index, (piece, score) in enumerate(zip(pieces.pieces, pieces.scores, strict=True)):
        model.pieces.add(piece=piece, score=score, type=controls.get(index, kinds.NORMAL))
    trainer = model.trainer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = trainer.BPE, True, len(pieces.pieces)
    for name, index in (("unk", pieces.unk_id), ("bos", pieces.bos_id), ("eos", pieces.eos_id)):
        setattr(trainer, f"{name}_id", index)
        setattr(trainer, f"{name}_piece", pieces.pieces[index])
    trainer.pad_id = -1
    steps = model.normalizer_spec
    steps.name, steps.add_dummy_prefix, steps.remove_extra_whitespaces = "identity", True, False
    path.write_bytes(model.SerializeToString(deterministic=True))


def _protocol() -> ModuleType:
    """SentencePiece's module of messages."""
    optional("google.protobuf", "a SentencePiece tokenizer")
    return optional("sentencepiece.sentencepiece_model_pb2", "a SentencePiece tokenizer")


def _pieces(path: Path, model: "ModelProto") -> ScoredPieces:
    trainer, steps = model.trainer_spec, model.normalizer_spec
    expected = {
        "trainer_spec.model_type": (trainer.ModelType.Name(trainer.model_type), "BPE"),
        "trainer_spec.byte_fallback": (trainer.byte_fallback, True),
        "trainer_spec.treat_whitespace_as_suffix": (trainer.treat_whitespace_as_suffix, False),
        "normalizer_spec.precompiled_charsmap": (steps.precompiled_charsmap, b""),
        "normalizer_spec.add_dummy_prefix": (steps.add_dummy_prefix, True),
        "normalizer_spec.remove_extra_whitespaces": (steps.remove_extra_whitespaces, False),
        "normalizer_spec.escape_whitespaces": (steps.escape_whitespaces, True),
    }
    for part, (given, wanted) in expected.items():
        if given != wanted:
            raise UserError(
                f"{path}: {part}={given!r} is beyond scored pieces, which have {wanted!r}; give Llama's tokenizer"
            )
    kinds = model.SentencePiece
    by_kind: dict[int, list[int]] = {}
    for index, piece in enumerate(model.pieces):
        by_kind.setdefault(piece.type, []).append(index)
    written = [piece.piece for piece in model.pieces]
    first = by_kind.get(kinds.BYTE, [-1])[0]
    controls = {kinds.UNKNOWN: [trainer.unk_id], kinds.CONTROL: sorted((trainer.bos_id, trainer.eos_id))}
    known = controls | {kinds.BYTE: list(range(first, first + 256))}
    faults = {kinds.Type.Name(kind): by_kind.get(kind, [])[:8] for kind in known if by_kind.get(kind) != known[kind]}
    faults |= {kinds.Type.Name(kind): ids[:8] for kind, ids in by_kind.items() if kind not in (*known, kinds.NORMAL)}
    if faults or written[first : first + 256] != _BYTES:
        raise UserError(
            f"{path} has pieces of the kinds {faults} or not all 256 bytes in order; scored pieces have one unknown, a "
            "begin and an end token, the bytes, and normal pieces: give Llama's tokenizer"
        )
    if repeated := repeated_pieces(written):
        raise UserError(
            f"{path} has pieces under several ids: {some(repeated.items())}; give a tokenizer whose pieces differ"
        )
    scores = tuple(piece.score for piece in model.pieces)
    return ScoredPieces(tuple(written), scores, trainer.unk_id, trainer.bos_id, trainer.eos_id, first)
