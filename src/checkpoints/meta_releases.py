"""What Meta's files leave out of a Llama and its release tells: context, rotary scaling, special tokens, stops.

    release, instruct = release_of(folder, scaled=True, has_ranks=True, told=ReadOptions(meta_version="3.1", ...))

Source: the model cards and tokenizers at https://github.com/meta-llama/llama-models and, for the names of the special
tokens, the tokenizer_config.json of the Hugging Face repositories of each release.
"""

from dataclasses import dataclass
from pathlib import Path

from src.checkpoints.checkpoint import ReadOptions
from src.checkpoints.json_files import read_json_object
from utils.errors import UserError

SPECIAL_TOKENS = 256
READING = "reading.json"
"""What this project's writer adds to a folder: the release, which no file of Meta's names."""


def _special_tokens(named: dict[int, str]) -> tuple[str, ...]:
    """All 256: those named by place, and between them reserved ones, numbered from 0."""
    reserved = (f"<|reserved_special_token_{number}|>" for number in range(SPECIAL_TOKENS))
    return tuple(named.get(place) or next(reserved) for place in range(SPECIAL_TOKENS))


_OF_3 = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
PAD = "<|finetune_right_pad_id|>"
_OF_3_1 = _OF_3 | {4: PAD, 8: "<|eom_id|>", 10: "<|python_tag|>"}


@dataclass(frozen=True)
class Release:
    """One of Meta's Llamas."""

    version: str
    context: int
    """Tokens that it may attend over."""
    rope_factor: float | None = None
    """How far long rotary wavelengths are stretched; None: not at all."""
    special_tokens: tuple[str, ...] = ()
    """Those that follow the ranks; none where the tokenizer is SentencePiece's."""

    def stops(self, instruct: bool) -> tuple[str, ...]:
        """The special tokens that end a text, the tokenizer's end token first; none where that is `</s>`."""
        if not self.special_tokens:
            return ()
        if not instruct:
            return ("<|end_of_text|>",)
        return tuple(name for name in ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>") if name in self.special_tokens)

    def rope_parameters(self, theta: float) -> dict[str, float | int | str]:
        """Rotary embedding as transformers names it."""
        if self.rope_factor is None:
            return {"rope_type": "default", "rope_theta": theta}
        return {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": self.rope_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }


RELEASES = {
    release.version: release
    for release in (
        Release("1", 2048),
        Release("2", 4096),
        Release("3", 8192, None, _special_tokens(_OF_3)),
        Release("3.1", 131072, 8.0, _special_tokens(_OF_3_1)),
        Release("3.2", 131072, 32.0, _special_tokens(_OF_3_1)),
    )
}


def release_of(folder: Path, scaled: bool, has_ranks: bool, told: ReadOptions) -> tuple[Release, bool]:
    """The release of a folder, and whether it is the model that answers.

    Args:
        scaled: `use_scaled_rope` of params.json.
        has_ranks: whether the tokenizer is one of ranks.
        told: what a person says of it, which counts before what `reading.json` says.
    Raises:
        UserError: nothing tells which it is, or what is told contradicts the files.
    """
    version, instruct = told.meta_version, told.instruct
    if (folder / READING).is_file():
        written = read_json_object(folder / READING)
        version = version or written.get("meta_version")
        instruct = written.get("instruct") if instruct is None else instruct
    possible = [
        name
        for name, release in RELEASES.items()
        if bool(release.special_tokens) == has_ranks and (release.rope_factor is not None) == scaled
    ]
    found = f"{folder} has use_scaled_rope={str(scaled).lower()} and a tokenizer of " + (
        "ranks" if has_ranks else "SentencePiece pieces"
    )
    if not possible:
        raise UserError(f"{found}, as no Llama 1, 2, 3, 3.1 or 3.2 has; give its own params.json and tokenizer.model")
    if version is not None and version not in possible:
        raise UserError(f"{found}, which is not --meta-version {version} but {' or '.join(possible)}; give that")
    if version is None and len(possible) > 1:
        contexts = [str(RELEASES[name].context) for name in possible]
        differ = (
            f"a rope factor of {' or '.join(f'{RELEASES[name].rope_factor:g}' for name in possible)}" if scaled else ""
        )
        raise UserError(
            f"{found}: Llama {' or '.join(possible)}, which have {differ or 'a context of ' + ' or '.join(contexts)}, "
            f"as no file says; give --meta-version {'|'.join(possible)}"
        )
    if instruct is None and has_ranks:
        raise UserError(
            f"{found}: no file says at which tokens its texts end; give --instruct for the model that answers "
            "(<|eot_id|> ends a turn) or --base"
        )
    return RELEASES[version or possible[0]], bool(instruct)
