"""The Hugging Face Hub: whether a run may push, what is sent, and the push.

    check_access("me/model", private=True)  # before training
    push_folder(Path("outputs/smol"), "me/model", private=True, message="Train on 131 rows")  # after it

All of it is for the main process alone. The token is the client's own (HF_TOKEN or `hf auth login`); it is never
written, logged or part of an error.
"""

import contextlib
import fnmatch
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    get_token,
    is_offline_mode,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from utils.errors import UserError
from utils.launch import is_main_process
from utils.logging import get_logger
from utils.redaction import DATA_SUFFIXES, public_record, redact

log = get_logger(__name__)

# The root error of the HTTP library that this client is built on, whichever it is.
HTTP_ERROR = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)

# Files that decide what `from_pretrained` loads: one left from an earlier push would be loaded in place of ours.
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "adapter_config.json")
STALE = (*WEIGHTS, "pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_model.bin", "chat_template.jinja")
BELONGS = (
    *WEIGHTS,
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "processor_config.json",
    "preprocessor_config.json",
    "*.py",  # the code of a model that transformers does not have, as save_pretrained copies it
)
RECORD = (
    "config.json",
    "environment.json",
    "plan.json",
    "data.json",
    "inputs.json",
    "changes.json",
    "metrics.jsonl",
    "result.json",
)

_TRANSIENT = (408, 429, 500, 502, 503, 504)
_WAITS_S = (1, 2, 4, 8)


@dataclass(frozen=True)
class HubAccess:
    """A repository that may be written."""

    repo_id: str
    user: str
    """Whom the token belongs to."""
    private: bool
    exists: bool
    """False: it is not there, and was not to be created."""
    url: str


@dataclass(frozen=True)
class HubFile:
    """One file to send."""

    path: str
    """Its path in the repository."""
    content: Path | bytes
    """The local file, or the bytes where they differ from the local file's."""

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def is_hub_id(text: str, *folders: Path) -> bool:
    """Whether `text` names a Hub repository: it has an id's form, is no data file's name, and is no path that exists
    below the working folder or one of `folders`."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return not text.endswith(DATA_SUFFIXES) and not any((folder / text).exists() for folder in (Path(), *folders))


def launch_folder(run_directory: Path) -> Path:
    """The folder that the run was started in, as its config's relative `output.folder` tells; else the present one."""
    record = run_directory / "config.json"
    output = json.loads(record.read_text(encoding="utf-8")).get("output", {}) if record.is_file() else {}
    below = Path(output.get("folder", "/"))
    return Path() if below.is_absolute() else run_directory.resolve().parents[len(below.parts)]


def check_access(repo_id: str, *, private: bool, create: bool = True) -> HubAccess:
    """Find out, before the hours of training, whether the result can be pushed to `repo_id` when they are over.

    A repository that does not exist is created now, empty, unless `create` is False. Creating it is the only request
    whose answer proves that it may be created: a fine-grained token's scopes, an organization's rules and a full quota
    show nowhere else. What a failed run leaves behind is an empty repository, which the next run fills.

    Args:
        repo_id: `owner/name`.
        private: whether a new repository is private, and whether an existing one has to be.
        create: False sends nothing that changes anything.
    Raises:
        UserError: the id has not that form; offline mode; no token, or one that is not valid or may not write there;
            the repository is public and `private` is True; the Hub cannot be reached, or answers with an error.
    """
    owner = _owner(repo_id)
    if is_offline_mode():
        raise UserError(
            f"hub.repo_id={repo_id!r} asks for a push, but HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it, "
            "or leave hub.repo_id out and run scripts/push_to_hub.py later"
        )
    token = get_token()
    if token is None:
        raise UserError(
            f"hub.repo_id={repo_id!r} asks for a push, but there is no token; run `hf auth login`, or set HF_TOKEN "
            "to a token that may write"
        )
    if not re.fullmatch(r"[!-~]+", token):  # the HTTP library would quote it in its error
        raise UserError("the Hub token holds a blank, or a character that no token has; set HF_TOKEN to it again")
    api = HfApi(token=True)
    with _explained(api, "asking whose token this is"):
        account = api.whoami()
    _require_member(account, owner)
    user = account["name"]
    with _explained(api, f"looking for {repo_id}"):
        info = _model_info(api, repo_id)
    if info is None:
        if create:
            _create(api, repo_id, private=private)
        return HubAccess(repo_id, user, private, create, f"{api.endpoint}/{repo_id}")
    if private and not info.private:
        raise UserError(
            f"{repo_id} is public, and hub.private=True; make it private in its settings at {api.endpoint}/{repo_id}"
            "/settings, choose another hub.repo_id, or publish with hub.private=False (push_to_hub.py: --public)"
        )
    if info.private and not private:
        log.warning("%s is private and stays so, whatever hub.private says; its settings can publish it", repo_id)
    with _explained(api, f"asking whether {user} may write to {repo_id}"):
        api.auth_check(repo_id, write=True)
    return HubAccess(info.id, user, bool(info.private), True, f"{api.endpoint}/{info.id}")


def _owner(repo_id: str) -> str:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"hub.repo_id={repo_id!r} is not a repository's name: {error}") from None
    owner, slash, _ = repo_id.partition("/")
    if not slash:
        raise UserError(f"hub.repo_id={repo_id!r} names no owner; give it as owner/name, such as 'me/{repo_id}'")
    return owner


def _require_member(account: dict[str, Any], owner: str) -> None:
    """Raise where the answer of whoami already shows that `owner` is out of reach; the rest is for the Hub to say."""
    token = account.get("auth", {}).get("accessToken", {})
    roles = {group["name"]: group.get("roleInOrg") for group in account.get("orgs", [])}
    writable = [account["name"], *(name for name, role in roles.items() if role != "read")]
    if token.get("role") == "read":
        raise UserError(
            f"the token of {account['name']} can only read; make one that can write, and set HF_TOKEN to it"
        )
    if owner not in writable:
        raise UserError(
            f"{account['name']} may not write to {owner}/; choose an owner among {', '.join(writable)} for "
            "hub.repo_id, or use another token"
        )


def _model_info(api: HfApi, repo_id: str) -> ModelInfo | None:
    try:
        return api.model_info(repo_id)
    except RepositoryNotFoundError:
        return None


def _create(api: HfApi, repo_id: str, *, private: bool) -> None:
    with _explained(api, f"creating {repo_id}"):
        if api.repo_exists(repo_id, repo_type="dataset"):
            log.warning("%s is also a data set; the model gets a repository of its own under the same name", repo_id)
        api.create_repo(repo_id, private=private, exist_ok=True)
    log.info("created %s repository %s/%s", "private" if private else "public", api.endpoint, repo_id)


@contextlib.contextmanager
def _explained(api: HfApi, doing: str) -> Iterator[None]:
    """Turn the client's errors into one that says what to do. Their text may quote a request's headers, so they are
    redacted, and not chained."""
    try:
        yield
    except HfHubHTTPError as error:
        raise UserError(redact(f"{doing}: {_advice(error, api)}")) from None
    except (HTTP_ERROR, ConnectionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            redact(f"{doing}: {api.endpoint} cannot be reached ({reason}); check the network, HF_ENDPOINT and proxies")
        ) from None
    except (OSError, RuntimeError, ValueError) as error:  # of a file, an upload, the card, an answer that is no JSON
        raise UserError(redact(f"{doing}: {error}{f' ({error.__cause__})' if error.__cause__ else ''}")) from None


def _advice(error: HfHubHTTPError, api: HfApi) -> str:
    status = error.response.status_code
    if status == 401:
        source = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the token of `hf auth login`"
        return f"{api.endpoint} does not accept {source}; make a new token there, under settings/tokens"
    if status in (402, 403):
        return (
            f"{api.endpoint} refuses: {error.server_message}; use a token that may write there, or another hub.repo_id"
        )
    if status in _TRANSIENT:
        return f"{api.endpoint} is overloaded or down (HTTP {status}); try again in a few minutes"
    return str(error)


def files_to_push(folder: Path, *, card: str | None = None) -> list[HubFile]:
    """What belongs in the repository: the model with its tokenizer, the card, and the run's record below `run/`.

    Never sent: checkpoints, optimizer states, pickles, and anything else that is not named in `BELONGS` or `RECORD`.
    The record, and the names of base models in the model's own settings, lose secrets and folders of this machine.

    Args:
        folder: a run directory, or a folder as `save_pretrained` writes it.
        card: text of the card. None: `folder`'s README.md.
    Raises:
        UserError: there are no weights in it.
    """
    model = folder / "model" if (folder / "model").is_dir() else folder
    paths = sorted(path for path in model.rglob("*") if path.is_file() and _matches(_relative(path, model), BELONGS))
    if not any(path.name.endswith(".safetensors") for path in paths):
        raise UserError(f"{model} holds no weights (*.safetensors); give the directory of a finished run")
    base_folder = launch_folder(folder)
    files = [HubFile(_relative(path, model), _without_local_base(path, base_folder)) for path in paths]
    if card is not None:
        files.append(HubFile("README.md", card.encode()))
    elif (folder / "README.md").is_file():
        files.append(HubFile("README.md", folder / "README.md"))
    if model is not folder:
        files += [HubFile(f"run/{n}", _public_lines(folder / n)) for n in RECORD if (folder / n).is_file()]
    return files


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether a path fits a pattern; as in a shell, `*` stays within a folder."""
    return any(path.count("/") == pattern.count("/") and fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _without_local_base(path: Path, launched_in: Path) -> Path | bytes:
    """A model's file, with base models that are folders of this machine reduced to their names."""
    if path.name not in ("config.json", "adapter_config.json", "tokenizer_config.json"):
        return path
    content = json.loads(path.read_text(encoding="utf-8"))
    bases = {key: value for key, value in content.items() if key.endswith("name_or_path") and value}
    local = {key: Path(value).name for key, value in bases.items() if not is_hub_id(value, launched_in)}
    return json.dumps(content | local, indent=2, ensure_ascii=False).encode() if local else path


def _public_lines(path: Path) -> bytes:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        return "".join(json.dumps(public_record(row), ensure_ascii=False) + "\n" for row in rows).encode()
    return (json.dumps(public_record(json.loads(text)), indent=2, ensure_ascii=False) + "\n").encode()


def stale_files(repo_id: str, files: list[HubFile]) -> list[str]:
    """Paths in the repository that would be loaded in place of `files`, such as a shard of an earlier, larger model.

    Raises:
        UserError: the Hub cannot be reached, or answers with an error.
    """
    api = HfApi(token=True)
    with _explained(api, f"listing the files of {repo_id}"):
        return _stale(api, repo_id, files)


def _stale(api: HfApi, repo_id: str, files: list[HubFile]) -> list[str]:
    present = set(api.list_repo_files(repo_id))
    return sorted(path for path in present - {file.path for file in files} if _matches(path, STALE))


def push_folder(folder: Path, repo_id: str, *, private: bool, message: str, card: str | None = None) -> str:
    """Send what belongs (see `files_to_push`) in one commit, so that the repository never holds half a model.

    Files of an earlier push that would be loaded in place of these are removed in the same commit.

    Args:
        folder: a run directory, or a folder as `save_pretrained` writes it.
        repo_id: `owner/name`; created where it does not exist.
        private: see `check_access`.
        message: the commit's subject.
        card: text of the card. None: `folder`'s README.md.
    Returns:
        URL of the commit.
    Raises:
        UserError: the push failed; says why, where the model stands, and the command that pushes it again.
    """
    assert is_main_process(), "only the main process pushes"
    files = files_to_push(folder, card=card)
    try:
        access = check_access(repo_id, private=private)
        with _explained(HfApi(), f"pushing to {access.repo_id}"):
            return _commit(access.repo_id, files, message)
    except UserError as error:
        visibility = "--private" if private else "--public"
        raise UserError(
            f"{error}\nThe push failed, but nothing is lost: the model stands in {folder}. When the cause is mended:\n"
            f"  python scripts/push_to_hub.py {folder} --repo-id {repo_id} {visibility}"
        ) from None


def _commit(repo_id: str, files: list[HubFile], message: str) -> str:
    """Commit, and try again where the Hub or the network has a passing fault.

    The client itself repeats only the uploads. A second try sends no file twice, and is empty where the first one did
    arrive and only its answer was lost.
    """
    api = HfApi(token=True)
    for wait_s in (*_WAITS_S, None):
        try:
            stale = _stale(api, repo_id, files)
            operations = [CommitOperationAdd(file.path, file.content) for file in files]
            operations += [CommitOperationDelete(path) for path in stale]
            for path in stale:
                log.warning("removing %s from %s: it would be loaded in place of this push", path, repo_id)
            return api.create_commit(repo_id, operations, commit_message=message).commit_url
        except (HTTP_ERROR, json.JSONDecodeError) as error:
            response = error.response if isinstance(error, HfHubHTTPError) else None
            if wait_s is None or (response is not None and response.status_code not in _TRANSIENT):
                raise
            asked = response.headers.get("Retry-After", "") if response is not None else ""
            wait_s = min(int(asked), 120) if asked.isdigit() else wait_s
            log.warning("the Hub did not take the commit (%s); trying again in %d s", redact(str(error)), wait_s)
        time.sleep(wait_s)
    raise AssertionError("the last try returns or raises")
