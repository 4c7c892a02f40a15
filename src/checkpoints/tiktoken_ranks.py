"""A vocabulary of byte strings by rank, as tiktoken and Llama 3 have it, and its form as a Hugging Face tokenizer.

A text is cut into words by a pattern, and in each word the two neighbours whose join has the lowest rank are joined,
leftmost first, until none can be. The special tokens' ids follow the ranks.

    ranks = read_ranks(Path("tokenizer.model"), special_tokens)
    ranks.to_tokenizer().encode("Once").ids == ranks.encode("Once")

Source: https://github.com/meta-llama/llama-models/blob/main/models/llama3/tokenizer.py
"""

import base64
import binascii
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from src.checkpoints.optional import optional
from src.token_bytes import byte_alphabet
from utils.errors import UserError

if TYPE_CHECKING:
    import tiktoken

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
"""Llama 3's pattern of a word."""


@dataclass(frozen=True)
class TiktokenRanks:
    """Byte strings in the order of their ids; all differ, and every single byte is among them."""

    tokens: tuple[bytes, ...]
    special_tokens: tuple[str, ...]
    """The first is the begin token."""

    @property
    def vocab_size(self) -> int:
        """Ids, the special tokens' included."""
        return len(self.tokens) + len(self.special_tokens)

    @property
    def bos_id(self) -> int:
        """Id of the begin token."""
        return len(self.tokens)

    def id_of(self, special_token: str) -> int:
        """Id of a special token."""
        return len(self.tokens) + self.special_tokens.index(special_token)

    @functools.cached_property
    def _encoding(self) -> "tiktoken.Encoding":
        return optional("tiktoken", "a tokenizer of ranks").Encoding(
            "llama3",
            pat_str=WORDS,
            mergeable_ranks={token: rank for rank, token in enumerate(self.tokens)},
            special_tokens={token: self.id_of(token) for token in self.special_tokens},
        )

    def encode(self, text: str) -> list[int]:
        """tiktoken's ids of `text`, begin token first; special tokens are read where the text spells them."""
        return [self.bos_id, *self._encoding.encode(text, allowed_special="all")]

    def merges(self) -> list[tuple[bytes, bytes]]:
        """Every pair of tokens whose join is a token, in the order in which a list-driven BPE must try them: by the
        rank of the join, and among equals by the ranks of the left and the right part.
        """
        ranks = {token: rank for rank, token in enumerate(self.tokens)}
        pairs: list[tuple[bytes, bytes]] = []
        for token in self.tokens:
            cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
            known = [(left, right) for left, right in cuts if left in ranks and right in ranks]
            pairs += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        return pairs

    def to_tokenizer(self) -> Tokenizer:
        """The same vocabulary as a Hugging Face tokenizer, begin token in front by default."""
        letters = {byte: letter for letter, byte in byte_alphabet().items()}
        written = {token: "".join(letters[byte] for byte in token) for token in self.tokens}
        tokenizer = Tokenizer(
            BPE(
                vocab={written[token]: rank for rank, token in enumerate(self.tokens)},
                merges=[(written[left], written[right]) for left, right in self.merges()],
                fuse_unk=False,
                ignore_merges=True,  # a word that is a token is that token, though no joins may lead to it
            )
        )
        tokenizer.pre_tokenizer = _pre_tokenizer()
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in self.special_tokens])
        bos = self.special_tokens[0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, self.bos_id)]
        )
        return tokenizer


def _pre_tokenizer() -> pre_tokenizers.Sequence:
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def is_ranks(path: Path) -> bool:
    """Whether a file's first line is one of ranks: base64, a space and a number."""
    with open(path, "rb") as file:
        line = file.readline(4096)
    try:
        return bool(_token_and_rank(line)[0])
    except ValueError:
        return False


def _token_and_rank(line: bytes) -> tuple[bytes, int]:
    """Raises: ValueError (binascii.Error is one) where the line is not base64, a space and a number."""
    written, rank = line.split()
    return base64.b64decode(written, validate=True), int(rank)


def read_ranks(path: Path, special_tokens: Sequence[str]) -> TiktokenRanks:
    """Read a file of one line a token: base64 of its bytes, a space, its rank.

    Raises:
        UserError: a line is something else, ranks are not 0, 1, 2 and on, or a token is repeated or a byte missing.
    """
    tokens: list[bytes] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = _token_and_rank(line)
        except (ValueError, binascii.Error) as error:
            raise UserError(f"{path}: line {number} is no base64 and rank ({error}); fetch the file again") from error
        if rank != len(tokens):
            raise UserError(f"{path}: line {number} has rank {rank}, not {len(tokens)}; fetch the file again")
        tokens.append(token)
    return _checked(path, tokens, special_tokens)


def _checked(path: Path | str, tokens: Sequence[bytes], special_tokens: Sequence[str]) -> TiktokenRanks:
    known = set(tokens)
    if len(known) != len(tokens) or b"" in known:
        raise UserError(f"{path} has a token twice or an empty one; give a tokenizer whose tokens differ")
    if missing := [byte for byte in range(256) if bytes([byte]) not in known]:
        raise UserError(f"{path} lacks the bytes {missing[:8]}, so that some texts have no ids; fetch the file again")
    return TiktokenRanks(tuple(tokens), tuple(special_tokens))


def write_ranks(ranks: TiktokenRanks, path: Path) -> None:
    """Write the file that `read_ranks` reads; it does not hold the special tokens."""
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks.tokens)]
    path.write_bytes(b"".join(lines))


def ranks_of_content(path: str, content: Mapping[str, Any]) -> TiktokenRanks:
    """Recover ranks from what a `tokenizer.json` of the kind that `TiktokenRanks.to_tokenizer` gives holds.

    Args:
        path: the file, for messages.
    Raises:
        UserError: a part of the tokenizer is beyond ranks; the part is named.
    """
    model = content["model"]
    _refuse_other_steps(path, content)
    ids: Mapping[str, int] = model["vocab"]
    alphabet = byte_alphabet()
    written = sorted(ids, key=ids.__getitem__)
    if [ids[token] for token in written] != list(range(len(written))):
        raise UserError(f"{path}: model.vocab has gaps in its ids, which ranks have not; choose another --to")
    if unknown := [token for token in written if not set(token) <= alphabet.keys()]:
        raise UserError(f"{path}: model.vocab holds {unknown[:4]}, which are no bytes; choose another --to")
    added = sorted(content.get("added_tokens", ()), key=lambda token: token["id"])
    names = [token["content"] for token in added]
    if [token["id"] for token in added] != list(range(len(written), len(written) + len(added))):
        raise UserError(f"{path}: added_tokens {names[:4]} do not follow the {len(written)} ranks; choose another --to")
    tokens = [bytes(alphabet[letter] for letter in token) for token in written]
    ranks = _checked(path, tokens, names)
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    found = [tuple(bytes(alphabet[letter] for letter in part) for part in pair) for pair in pairs]
    if found != ranks.merges():
        raise UserError(
            f"{path}: model.merges are not all the pairs that its ranks allow, in their order, so no ranks express "
            "it; choose another --to"
        )
    return ranks


def _refuse_other_steps(path: str, content: Mapping[str, Any]) -> None:
    """Compare the model's kind and the steps before it with those of ranks."""
    model = content["model"]
    expected = {
        "normalizer": (content.get("normalizer"), None),
        "pre_tokenizer": (content.get("pre_tokenizer"), json.loads(_pre_tokenizer().__getstate__())),
        "model.type": (model.get("type"), "BPE"),
        "model.ignore_merges": (model.get("ignore_merges"), True),
        "model.byte_fallback": (bool(model.get("byte_fallback")), False),
    }
    for part, (given, wanted) in expected.items():
        if given != wanted:
            raise UserError(f"{path}: {part}={given} cannot be held by ranks of byte strings; choose another --to")
