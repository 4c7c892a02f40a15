"""A vocabulary of single characters, as nanoGPT's character-level data sets have it, and its Hugging Face form.

characters = read_characters(Path("data/shakespeare_char/meta.pkl"))
characters.to_tokenizer().encode("ROMEO:").ids == characters.encode("ROMEO:")

A character that is not in it is an error on both sides, as in nanoGPT: an id for it would need a row of the embedding,
and leaving it out would train and generate on another text without a word.

Source: https://github.com/karpathy/nanoGPT/blob/master/data/shakespeare_char/prepare.py
"""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from src.checkpoints.pickles import read_plain
from utils.errors import UserError


@dataclass(frozen=True)
class Characters:
    """Characters in the order of their ids; all differ."""

    characters: tuple[str, ...]

    def encode(self, text: str) -> list[int]:
        """The id of each character.

        Raises:
            UserError: a character is not in the vocabulary.
        """
        ids = {character: index for index, character in enumerate(self.characters)}
        if unknown := sorted(set(text) - ids.keys()):
            raise UserError(
                f"the characters {unknown[:8]} are not among the {len(ids)} of the vocabulary; leave them out"
            )
        return [ids[character] for character in text]

    def to_tokenizer(self) -> Tokenizer:
        """The same as a Hugging Face tokenizer, without special tokens; it raises at an unknown character."""
        tokenizer = Tokenizer(models.WordLevel({character: index for index, character in enumerate(self.characters)}))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        return tokenizer


def only_characters(tokenizer: Tokenizer) -> frozenset[str] | None:
    """The characters that a tokenizer of the kind that `Characters.to_tokenizer` gives knows; None: it takes any."""
    vocabulary = tokenizer.get_vocab()
    if not isinstance(tokenizer.model, models.WordLevel) or tokenizer.model.unk_token in vocabulary:
        return None
    return frozenset(vocabulary) if all(len(token) == 1 for token in vocabulary) else None


def read_characters(path: Path) -> Characters:
    """Read a `meta.pkl` of `stoi`, `itos` and `vocab_size`, without running code in it.

    Raises:
        UserError: the file is damaged or names code, or its parts do not make one vocabulary of single characters.
    """
    meta = read_plain(path)
    if not isinstance(meta, dict) or not {"stoi", "itos", "vocab_size"} <= meta.keys():
        raise UserError(f"{path} has no stoi, itos and vocab_size; give a character-level meta.pkl")
    ids, characters = meta["stoi"], meta["itos"]
    if not isinstance(ids, dict) or not all(
        isinstance(character, str) and len(character) == 1 and type(index) is int for character, index in ids.items()
    ):
        raise UserError(
            f"{path}: stoi is no table of single characters; give a Hugging Face tokenizer's folder instead"
        )
    ordered = sorted(ids, key=ids.__getitem__)
    expected = dict(enumerate(ordered))
    if characters != expected or ids != {character: index for index, character in expected.items()}:
        raise UserError(
            f"{path}: stoi and itos are not each other's inverse over 0 to {len(ids) - 1}; prepare it again"
        )
    if meta["vocab_size"] != len(ids):
        raise UserError(
            f"{path}: vocab_size={meta['vocab_size']}, but stoi has {len(ids)} characters; prepare it again"
        )
    return Characters(tuple(ordered))
