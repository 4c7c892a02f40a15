"""Whether a loaded tokenizer gives the ids of the tokenizer.json that it came with.

A class may build its own steps and override the file's: what other programs read from the file is then not what this
one trains on.

    check_ids(AutoTokenizer.from_pretrained(folder), folder)
    check_saved(tokenizer, settings)   # before a model of another family is trained with it
"""

import tempfile
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from utils.errors import UserError

TEXTS = (
    "Once upon a time, there was a girl.",
    " ",
    "  two in front,  two inside, one behind ",
    "\n\nline\r\nbreaks\t\ttabs\n \n",
    "3 33 333 3333 33333 -1,234.50e-6",
    "I'll say they're NOT'D we've",
    "naïve café Zürich Ελληνικά русский 日本語 العربية ខ្មែរ",
    "🙂 👩‍👩‍👧 ½ \u00a0\u200b\u3000x",
    "if (a[0] >= b) { return c->d; } // __init__",
    "!!!!!! ====== ...... \\\\n",
)
"""Where the steps of tokenizers differ: spaces at the ends, runs of spaces, line ends, digits, contractions, marks."""


def check_ids(tokenizer: PreTrainedTokenizerBase, source: str, revision: str | None = None) -> None:
    """Compare the ids of the class with those of the file, without the tokens that a class puts around a text.

    Nothing is compared where `source` has no tokenizer.json.

    Args:
        source: folder or Hub id that `tokenizer` was loaded from.
    Raises:
        UserError: ids of a text differ.
    """
    path = _file(source, revision)
    if path is None:
        return
    stored = Tokenizer.from_file(str(path))
    stored.no_truncation()
    stored.no_padding()
    for text in TEXTS:
        expected = stored.encode(text, add_special_tokens=False).ids
        found = _ids(tokenizer, text)
        if expected != found:
            apart = next((at for at, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), 0)
            raise UserError(
                f"the tokenizer of {source} is loaded as {type(tokenizer).__name__}, which reads {text!r} as "
                f"{_from(found, apart)}, but its tokenizer.json as {_from(expected, apart)}: programs that serve from "
                "the file would not see what was trained. If the file is right, name the class that takes it as it is "
                'in tokenizer_config.json, "tokenizer_class": "PreTrainedTokenizerFast"; if the class is right, save '
                "the tokenizer again with save_pretrained and give that folder as model.tokenizer"
            )


def check_saved(tokenizer: PreTrainedTokenizerBase, settings: PreTrainedConfig) -> None:
    """Make sure that a tokenizer, saved beside a model of another family, is loaded as what it is.

    transformers loads the tokenizer of some kinds of models as a class of that kind, whatever class was saved.

    Args:
        settings: of the model that the tokenizer will be saved with.
    Raises:
        UserError: it would give other ids then.
    """
    if not tokenizer.is_fast:
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        settings.save_pretrained(folder)
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    differing = [text for text in TEXTS if _ids(loaded, text) != _ids(tokenizer, text)]
    if differing:
        raise UserError(
            f"the tokenizer of a '{settings.model_type}' is loaded as {type(loaded).__name__} by transformers, which "
            f"reads {differing[0]!r} in another way than the tokenizer of this run: nobody could load the result as it "
            f"was trained. Give model.tokenizer one that was made for a '{settings.model_type}', or a model of another "
            "kind, such as llama"
        )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _file(source: str, revision: str | None) -> Path | None:
    """The tokenizer.json of a folder, or of a Hub repository whose tokenizer was just loaded, so from its cache."""
    if Path(source).is_dir():
        path = Path(source) / "tokenizer.json"
        return path if path.is_file() else None
    cached = try_to_load_from_cache(source, "tokenizer.json", revision=revision)
    return Path(cached) if isinstance(cached, str) else None


def _from(ids: list[int], start: int) -> str:
    """A few ids from the first that differs on."""
    return ("... " if start else "") + f"{ids[start : start + 6]}" + (" ..." if len(ids) > start + 6 else "")
