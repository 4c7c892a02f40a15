"""Chat templates that a recipe names in place of a file.

    model = ModelConfig(path="meta-llama/Llama-3.2-1B", chat_template="chatml")

Their texts stand in `config/chat_templates`; here are the tokens that they write and that a tokenizer may not have yet.
"""

from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent / "chat_templates"


@dataclass(frozen=True)
class NamedTemplate:
    """A template of this project.

    `tokens` are the special tokens that it writes, which are added to a tokenizer that lacks them; `stop` is the one
    that ends every turn, which becomes the tokenizer's eos token. None: the tokenizer's own eos token ends the turns.
    """

    path: Path
    tokens: tuple[str, ...] = ()
    stop: str | None = None


TEMPLATES = {
    "chatml": NamedTemplate(_FOLDER / "chatml.jinja", ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "plain": NamedTemplate(_FOLDER / "plain.jinja"),
}
"""Templates by the name that `model.chat_template` takes."""
