"""llama2.c's tokenizer file: the longest piece's bytes, then score, length and bytes of each piece.

    pieces = read_pieces(Path("tok512.bin"), vocab_size=512)

The first 259 pieces are fixed: `<unk>`, the begin and the end token (which llama2.c's exporter frames in line breaks),
and the 256 bytes. Spaces stand for SentencePiece's `▁`.

Source: https://github.com/karpathy/llama2.c/blob/350e04fe35433e6d2941dce5a1f53308f87058eb/tokenizer.py
"""

import struct
from pathlib import Path

import numpy as np

from src.checkpoints.characters import Characters
from src.checkpoints.checkpoint import AnyTokenizer, MadeTokenizer, TokenizerFiles
from src.checkpoints.pieces import SPACE, ScoredPieces, pieces_of_content, pieces_of_tokenizer, repeated_pieces
from src.checkpoints.tiktoken_ranks import TiktokenRanks
from utils.errors import UserError, some

_CONTROLS = ("<unk>", "<s>", "</s>")
_FIRST_BYTE = len(_CONTROLS)
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def read_pieces(path: Path, vocab_size: int) -> ScoredPieces:
    """Read the pieces of a tokenizer file.

    Raises:
        UserError: the file is cut short, has another number of pieces than `vocab_size`, or a piece that is no UTF-8,
            empty, repeated, or not what the format fixes at its place.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file; name llama2.c's tokenizer with --tokenizer FILE.bin")
    content = path.read_bytes()
    raw: list[bytes] = []
    scores: list[float] = []
    place = 4
    while place < len(content):
        if place + 8 > len(content):
            raise UserError(f"{path} is cut short: {len(content)} bytes end within piece {len(raw)}; fetch it again")
        score, length = struct.unpack_from("<fi", content, place)
        place += 8 + length
        if length < 1 or place > len(content) or not np.isfinite(score):
            raise UserError(
                f"{path}: piece {len(raw)} claims {length} bytes and score {score}, of {len(content)} bytes in the "
                "file; it is cut short or no llama2.c tokenizer: fetch it again"
            )
        raw.append(content[place - length : place])
        scores.append(score)
    if len(raw) != vocab_size:
        raise UserError(
            f"{path} has {len(raw)} pieces, but the checkpoint's vocab_size is {vocab_size}; give the tokenizer that "
            "the model was trained with"
        )
    try:
        pieces = [piece.decode("utf-8") for piece in raw]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} has a piece that is no UTF-8 ({error}); give a llama2.c tokenizer") from error
    return _checked(path, pieces, scores)


def _checked(path: Path, pieces: list[str], scores: list[float]) -> ScoredPieces:
    fixed = len(_CONTROLS) + len(_BYTES)
    if len(pieces) < fixed:
        raise UserError(f"{path} has {len(pieces)} pieces, llama2.c fixes the first {fixed}; give its tokenizer")
    found = tuple(piece.strip("\n") for piece in pieces[:_FIRST_BYTE]) + tuple(pieces[_FIRST_BYTE:fixed])
    for index, (piece, expected) in enumerate(zip(found, _CONTROLS + _BYTES, strict=True)):
        if piece != expected:
            raise UserError(f"{path}: piece {index} is {piece!r}, llama2.c has {expected!r} there; give its tokenizer")
    pieces = [*found, *(piece.replace(" ", SPACE) for piece in pieces[fixed:])]
    if repeated := repeated_pieces(pieces):
        raise UserError(
            f"{path} has pieces under several ids: {some(repeated.items())}; give a tokenizer whose pieces differ"
        )
    return ScoredPieces(tuple(pieces), tuple(scores), 0, 1, 2, _FIRST_BYTE)


def write_pieces(tokenizer: AnyTokenizer, path: Path, vocab_size: int) -> None:
    """Write a tokenizer as llama2.c's file.

    Raises:
        UserError: it is no SentencePiece BPE with llama2.c's first 259 pieces, or has not `vocab_size` pieces.
    """
    if isinstance(tokenizer, TokenizerFiles):
        tokenizer = pieces_of_tokenizer(tokenizer.tokenizer_json)
    elif isinstance(tokenizer, MadeTokenizer):
        tokenizer = pieces_of_content("the tokenizer", tokenizer.tokenizer_json)
    if isinstance(tokenizer, TiktokenRanks):
        raise UserError(
            "tokenizer=ranks of byte strings cannot be held by llama2c, which has pieces; choose another --to"
        )
    if isinstance(tokenizer, Characters):
        raise UserError("the tokenizer cuts texts into characters, which llama2.c does not; choose another --to")
    if len(tokenizer.pieces) != vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer.pieces)} pieces and the model vocab_size={vocab_size}, which llama2.c "
            "keeps equal; choose another --to"
        )
    _checked(path, list(tokenizer.pieces), list(tokenizer.scores))
    raw = [piece.replace(SPACE, " ").encode("utf-8") for piece in tokenizer.pieces]
    for index in (tokenizer.bos_id, tokenizer.eos_id):
        raw[index] = b"\n" + raw[index] + b"\n"
    with open(path, "wb") as file:
        file.write(struct.pack("<i", max(map(len, raw))))
        for score, piece in zip(tokenizer.scores, raw, strict=True):
            file.write(struct.pack("<fi", score, len(piece)) + piece)
