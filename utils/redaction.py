"""What must not leave this machine: secrets, and the names of its folders.

log.warning("the Hub answered: %s", redact(str(error)))
published = public_record(json.loads(path.read_text()))
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt", ".arrow", ".bin")
_SECRET_NAME = re.compile(r"(?i)(token|key|secret|passwo?r?d|passphrase|credentials?|_pwd|_pat|_dsn)$|secret")
_PART = r"[^\s'\"/\\,;]+"  # a folder's or file's name, where it stands in a longer text
_START = rf"(?<![\w.:/~<\\-])(?:file://)?(?:/(?={_PART}/)|~/|(?:\.\./)+|[A-Za-z]:[\\/])"


def redact(text: str) -> str:
    """`text` with every secret replaced by `***`: Hub tokens, authorization headers, credentials in URLs, and values of
    environment variables whose names say that they are secret."""
    return _redact(text, _secret_values())


def _secret_values() -> list[str]:
    return [value for name, value in os.environ.items() if len(value) >= 8 and _SECRET_NAME.search(name)]


def _redact(text: str, values: Sequence[str]) -> str:
    for value in values:
        text = text.replace(value, "***")
    text = re.sub(r"Bearer (?=\S{8})[^'\"\n]+", "Bearer ***", text)  # prose that is logged has shorter words after it
    text = re.sub(r"Basic [A-Za-z0-9+/]{12,}=*", "Basic ***", text)
    text = re.sub(r"(?<=:/)(/?)[^/@\s'\"]+(?=@)", r"\1***", text)  # a URL that was taken for a path has one slash
    text = re.sub(r"(?i)(?<=[?&])([^=&\s]*(?:token|key|secret|password|sig)[^=&\s]*=)[^&\s#'\"]+", r"\1***", text)
    return re.sub(r"\b(?:hf|api_org)_(?:[a-z]+_)?[A-Za-z0-9]{16,}", "***", text)


def redacted(content: Any) -> Any:
    """A JSON value with every secret in its strings replaced."""
    values = _secret_values()  # once for all its strings

    def without(part: Any) -> Any:
        if isinstance(part, dict):
            return {without(key): without(value) for key, value in part.items()}
        if isinstance(part, list | tuple):
            return [without(value) for value in part]
        return _redact(part, values) if isinstance(part, str) else part

    return without(content)


def without_folders(text: str) -> str:
    """`text` with each path that is absolute, or leaves the working folder, replaced by its last part, and each home
    folder by `~`. URLs, tags such as `</s>`, Hub ids and paths below the working folder stay."""
    return re.sub(rf"{_START}(?:{_PART}[/\\])*({_PART})[/\\]?", r"\1", _without_homes(text))


def public_record(content: Any) -> Any:
    """A JSON value as it may be published: no secret in any string, of a local path no more than its last part, and of
    a data file's path its name alone."""
    if isinstance(content, dict):
        return {public_record(key): public_record(value) for key, value in content.items()}
    if isinstance(content, list):
        return [public_record(value) for value in content]
    if not isinstance(content, str):
        return content
    option, path = re.fullmatch(r"(--?[\w.-]+=)?(.*)", redact(_without_homes(content)), re.DOTALL).groups(default="")
    is_path = re.match(r"~?/.+/|~/|\.\.?/|[A-Za-z]:[\\/]", path)
    is_data_file = path.endswith(DATA_SUFFIXES) and not re.search(r"\s|://", path)
    if (is_path or is_data_file) and "\n" not in path:
        return option + re.split(r"[/\\]", path.rstrip("/\\"))[-1]  # one path, which may hold blanks
    return option + without_folders(path)


def _without_homes(text: str) -> str:
    for folder in {str(Path.home()), str(Path.home().resolve())} - {"/"}:
        text = re.sub(rf"{re.escape(folder)}(?![\w-])", "~", text)
    return re.sub(r"/(?:home|Users)/[^\s/'\"]+", "~", text)
