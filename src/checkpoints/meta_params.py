"""Meta's params.json: a Llama's sizes in Meta's words.

    params = read_params(Path("Llama3.1-8B/params.json"))
    feed_forward_size(params.dim, params.multiple_of, params.ffn_dim_multiplier)

Source: https://github.com/meta-llama/llama-models/blob/main/models/llama3/args.py
"""

import dataclasses
from pathlib import Path
from typing import Any

from src.checkpoints.architecture import LlamaArchitecture
from src.checkpoints.json_files import read_json_object
from src.checkpoints.meta_releases import Release
from utils.errors import UserError, some

_COUNTS = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of")
LARGEST = 1e30  # of its numbers; Llama 3.1's rope_theta, the largest known, is 500,000
_NUMBERS = ("norm_eps", "rope_theta", "ffn_dim_multiplier", "vocab_size")
# Limits of a run of Meta's code, which say nothing of the model.
_WITHOUT_EFFECT = ("max_seq_len", "max_batch_size", "model_parallel_size")


@dataclasses.dataclass(frozen=True)
class Params:
    """params.json of Llama 1 to 3.2, with Meta's defaults for what it leaves out."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    multiple_of: int
    norm_eps: float
    rope_theta: float | None
    ffn_dim_multiplier: float | None
    vocab_size: int
    """-1 in Llama 1 and 2: as many as the tokenizer has."""
    use_scaled_rope: bool


def read_params(file: Path) -> Params:
    """Read a params.json.

    Raises:
        UserError: it is missing or no JSON, names what no Llama of text alone has, or its numbers make no sense.
    """
    content = read_json_object(file)
    given = {name: value for name, value in content.items() if value is not None and name not in _WITHOUT_EFFECT}
    known = {field.name for field in dataclasses.fields(Params)}
    if unknown := sorted(given.keys() - known):
        raise UserError(f"{file} sets {some(unknown)}, which no Llama 1 to 3.2 of text alone has; give one of those")
    heads = given.get("n_heads")
    given = {"n_kv_heads": heads, "multiple_of": 256, "norm_eps": 1e-5, "vocab_size": -1} | given
    given = {"rope_theta": None, "ffn_dim_multiplier": None, "use_scaled_rope": False} | given
    for name in _COUNTS:
        if type(given.get(name)) is not int or given[name] < 1:
            raise UserError(f"{file}: {name}={given.get(name)} is no count of at least 1; fetch the file again")
    for name in _NUMBERS:
        if given[name] is not None and (isinstance(given[name], bool) or not isinstance(given[name], int | float)):
            raise UserError(f"{file}: {name}={given[name]} is no number; fetch the file again")
        if given[name] is not None and not abs(given[name]) < LARGEST:
            raise UserError(f"{file}: {name}={str(given[name])[:40]} is no finite number; fetch the file again")
    params = Params(**given)
    if params.dim % (2 * params.n_heads) or params.n_heads % params.n_kv_heads:
        raise UserError(
            f"{file}: dim={params.dim}, n_heads={heads} and n_kv_heads={params.n_kv_heads} do not divide each other; "
            "fetch the file again"
        )
    return params


def feed_forward_size(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Rows of w1 as Meta's code computes them: two thirds of 4 * dim, times the multiplier, rounded up."""
    wide = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        wide = int(multiplier * wide)
    return -(-wide // multiple_of) * multiple_of


def params_of(sizes: LlamaArchitecture, release: Release) -> dict[str, Any]:
    """The content of params.json, without what is Meta's default: the code of Llama 1 and 2 knows fewer names."""
    multiple_of, multiplier = _feed_forward_params(sizes.hidden_size, sizes.intermediate_size)
    params = {
        "dim": sizes.hidden_size,
        "n_layers": sizes.num_hidden_layers,
        "n_heads": sizes.num_attention_heads,
        "multiple_of": multiple_of,
        "norm_eps": sizes.rms_norm_eps,
        "vocab_size": sizes.vocab_size,
    }
    if sizes.num_key_value_heads != sizes.num_attention_heads:
        params["n_kv_heads"] = sizes.num_key_value_heads
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    theta = sizes.rope_parameters["rope_theta"]
    if release.special_tokens or theta != 10000.0:
        params["rope_theta"] = theta
    if release.special_tokens:
        params["use_scaled_rope"] = release.rope_factor is not None
    return params


def _feed_forward_params(dim: int, wide: int) -> tuple[int, float | None]:
    """A `multiple_of` and an `ffn_dim_multiplier` that give `wide`: the shortest decimal that does, None if none is
    needed.
    """
    multiple_of = min(wide & -wide, 4096)  # the largest power of two that divides it
    if feed_forward_size(dim, multiple_of, None) == wide:
        return multiple_of, None
    middle = (wide - multiple_of / 2 + 1) / feed_forward_size(dim, 1, None)  # of the multipliers that round up to it
    return multiple_of, next(
        multiplier
        for multiplier in (round(middle, digits) for digits in range(1, 18))
        if feed_forward_size(dim, multiple_of, multiplier) == wide
    )
