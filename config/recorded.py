"""The configuration of a run that is over, from its record.

recorded = recorded_config(Path("outputs/smol"))    # as it was, but for where it is written: outputs/smol-reproduced
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from config.constraints import ConfigError
from config.schema import RunConfig
from config.validation import flatten, to_config

RECORD = "config.json"
MASK = "***"
"""What stands in a record in place of a credential."""

SUFFIX = "-reproduced"


def recorded_config(run: Path) -> RunConfig:
    """The configuration in a run's config.json, with an `output` of its own beside that run's.

    Raises:
        ConfigError: there is none, or it cannot be read, is not one of this program's version, or lacks a credential.
    """
    path = run / RECORD
    if not path.is_file():
        raise ConfigError(
            f"--reproduce {run} has no {RECORD}; give the directory of a finished run, such as outputs/smol"
        )
    try:
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON ({error}); bring it back") from error
    if masked := sorted(name for name, value in flatten(tree).items() if MASK in json.dumps(value)):
        raise ConfigError(
            f"{path} has {MASK} in {', '.join(masked)}, in place of a credential, which no record keeps; the run can "
            "be repeated only with --config, its recipe and that credential"
        )
    config = to_config(tree, where=str(path))
    place = run.resolve() if run.name in ("", "..") else run
    output = dataclasses.replace(config.output, folder=str(place.parent), name=f"{place.name}{SUFFIX}")
    return dataclasses.replace(config, output=output)
