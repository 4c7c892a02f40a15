"""A vocabulary of scored pieces, as SentencePiece's BPE has it, and its form as a Hugging Face tokenizer.

A text gets a space in front, is cut into characters (a character that is no piece becomes the pieces of its UTF-8
bytes), and then the two neighbours whose join is the piece of the highest score are joined, leftmost first, until none
can be. Hugging Face's BPE joins by a list of pairs instead; `merges` derives that list from the scores.

    tokenizer = pieces.to_tokenizer()      # tokenizers.Tokenizer
    tokenizer.encode("Once").ids == pieces.encode("Once")

Source: SentencePiece, https://github.com/google/sentencepiece/blob/v0.2.0/src/bpe_model.cc
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from src.checkpoints.json_files import read_json_object
from utils.errors import UserError

SPACE = "▁"  # SentencePiece's mark of a space (U+2581)


def _normalizer() -> normalizers.Sequence:
    """A space in front and spaces marked. Prepend, unlike Metaspace, also leads a text that begins with a space."""
    return normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])


@dataclass(frozen=True)
class ScoredPieces:
    """Pieces in the order of their ids, with spaces as `▁`; all pieces differ."""

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    unk_id: int
    bos_id: int
    eos_id: int
    first_byte_id: int
    """Id of the piece of byte 0x00; the other 255 follow it in order."""

    def _joinable(self) -> dict[str, int]:
        """Ids by piece, without the control and byte pieces, which no join may give."""
        apart = {self.unk_id, self.bos_id, self.eos_id, *range(self.first_byte_id, self.first_byte_id + 256)}
        return {piece: index for index, piece in enumerate(self.pieces) if index not in apart}

    def encode(self, text: str) -> list[int]:
        """The ids of `text` by the definition, begin token first. Its time grows with the square of the length.

        `▁` in `text` counts as a space, as in SentencePiece.
        """
        ids_by_piece = self._joinable()
        parts: list[tuple[str, int]] = []
        for character in (SPACE + text if text else "").replace(" ", SPACE):
            if character in ids_by_piece:
                parts.append((character, ids_by_piece[character]))
            else:
                parts += [("", self.first_byte_id + byte) for byte in character.encode("utf-8")]
        while True:
            best: tuple[float, int, int] | None = None
            for place in range(len(parts) - 1):
                left, right = parts[place][0], parts[place + 1][0]
                joined = ids_by_piece.get(left + right) if left and right else None
                if joined is not None and (best is None or self.scores[joined] > best[0]):
                    best = (self.scores[joined], place, joined)
            if best is None:
                return [self.bos_id, *(index for _, index in parts)]
            _, place, joined = best
            parts[place : place + 2] = [(self.pieces[joined], joined)]

    def merges(self) -> list[tuple[str, str]]:
        """Every pair of pieces whose join is a piece, in the order in which a list-driven BPE must try them.

        The highest score comes first. Among equal scores the longer left part does: a run of one character then grows
        from its left end, as it does where the leftmost of equal scores is joined first.
        """
        ids_by_piece = self._joinable()
        ranked: list[tuple[float, int, int, int, str, str]] = []
        for piece, index in ids_by_piece.items():
            for cut in range(1, len(piece)):
                left, right = piece[:cut], piece[cut:]
                if left in ids_by_piece and right in ids_by_piece:
                    ranked.append((-self.scores[index], -len(left), -len(right), index, left, right))
        return [(left, right) for *_, left, right in sorted(ranked)]

    def to_tokenizer(self) -> Tokenizer:
        """The same vocabulary as a Hugging Face tokenizer, begin token in front by default.

        Its ids equal those of `encode` but where a text spells a control piece, such as `</s>`: Hugging Face
        tokenizers read it as that token.
        """
        names = [self.pieces[index] for index in (self.unk_id, self.bos_id, self.eos_id)]
        vocabulary = {piece: index for index, piece in enumerate(self.pieces)}
        tokenizer = Tokenizer(
            BPE(vocab=vocabulary, merges=self.merges(), unk_token=names[0], fuse_unk=True, byte_fallback=True)
        )
        tokenizer.normalizer = _normalizer()
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        bos = names[1]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, self.bos_id)]
        )
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        return tokenizer


def repeated_pieces(pieces: Sequence[str]) -> dict[str, list[int]]:
    """The pieces that occur more than once, with all their ids."""
    ids: dict[str, list[int]] = {}
    for index, piece in enumerate(pieces):
        ids.setdefault(piece, []).append(index)
    return {piece: found for piece, found in ids.items() if len(found) > 1}


def pieces_of_tokenizer(path: Path) -> ScoredPieces:
    """Recover scored pieces from a `tokenizer.json` of the kind that `ScoredPieces.to_tokenizer` gives.

    The scores are new: minus the place of a piece among the merges, the same for pieces whose merges alternate.

    Raises:
        UserError: a part of the tokenizer is beyond scored pieces; the part is named.
    """
    return pieces_of_content(str(path), read_json_object(path))


def pieces_of_content(path: str, content: Mapping[str, Any]) -> ScoredPieces:
    """`pieces_of_tokenizer` of what a `tokenizer.json` holds; `path` names it in messages."""
    model = content["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise UserError(
            f"{path}: model.type={model.get('type')} with byte_fallback={model.get('byte_fallback')} is no "
            "SentencePiece BPE, the only kind that scored pieces express; choose another --to"
        )
    _refuse_other_steps(path, content)
    ids_by_piece: dict[str, int] = model["vocab"]
    pieces = sorted(ids_by_piece, key=ids_by_piece.__getitem__)
    if [ids_by_piece[piece] for piece in pieces] != list(range(len(pieces))) or "<0x00>" not in ids_by_piece:
        raise UserError(f"{path}: model.vocab has gaps in its ids or no byte pieces; choose another --to")
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    ids = [ids_by_piece.get(name, -1) for name in (model.get("unk_token"), "<s>", "</s>")]
    scores = _scores_of_merges(pieces, [left + right for left, right in merges])
    found = ScoredPieces(tuple(pieces), tuple(scores), *ids, ids_by_piece["<0x00>"])
    if min(ids) < 0 or set(found.merges()) != set(merges):
        raise UserError(
            f"{path}: model.merges are not all the pairs that its pieces allow, or <unk>, <s> or </s> is missing, so "
            "no scores express it; choose another --to"
        )
    return found


def _refuse_other_steps(path: str, content: Mapping[str, Any]) -> None:
    """Compare the steps around the model with those that put a space in front and mark spaces."""
    expected = json.loads(_normalizer().__getstate__())
    for part, wanted in (("normalizer", expected), ("pre_tokenizer", None)):
        if content.get(part) != wanted:
            raise UserError(f"{path}: {part}={content.get(part)} cannot be held by scored pieces; choose another --to")


def _scores_of_merges(pieces: Sequence[str], joined: Sequence[str]) -> list[float]:
    """Scores that order the pieces as a list of merges, given as what each joins to, does; 0 for those never joined."""
    last = {piece: place for place, piece in enumerate(joined)}
    scores = dict.fromkeys(pieces, 0.0)
    score, end = 0.0, -1
    for place, piece in enumerate(joined):
        if place > end:
            score -= 1.0
        end = max(end, last[piece])
        scores[piece] = score
    return [scores[piece] for piece in pieces]
