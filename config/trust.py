"""When code that ships with a checkpoint may run: only if it is known which.

problems = list(trust_problems(config.model))
"""

import re
from collections.abc import Iterator
from pathlib import Path

from config.model_schema import ModelConfig

_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_folder(path: str) -> bool:
    """Whether a model's path is a folder on this machine, or looks like one, and no Hub id."""
    return path.startswith(("/", "./", "../", "~")) or Path(path).is_dir()


def trust_problems(model: ModelConfig) -> Iterator[str]:
    """What is wrong with `model.trust_remote_code`: a sentence for each thing to mend."""
    if not model.trust_remote_code:
        return
    if model.path is None:
        yield (
            "model.trust_remote_code=true is given with no model.path, whose code it would let run; leave it out, or "
            "give model.path"
        )
    elif not is_folder(model.path) and not _COMMIT.fullmatch(model.revision or ""):
        given = "no model.revision" if model.revision is None else f"model.revision={model.revision}"
        yield (
            f"model.trust_remote_code=true runs code of {model.path}, and {given} lets that code change any day; give "
            "as model.revision the full hash (40 hex digits) of the commit whose code you have read"
        )
