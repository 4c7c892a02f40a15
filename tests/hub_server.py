"""A Hub on this machine, for tests: the part of the Hub's HTTP API that pushing and loading need.

The real `huggingface_hub` client talks to it, through HF_ENDPOINT, which the client reads when it is imported: start
the code under test in a process of its own with `environment`.

    with HubServer(tmp_path / "hub") as hub:
        hub.add_user("hf_secret", "me")
        hub.add_repo("me/tiny", folder)
        subprocess.run([sys.executable, "-c", code], env=hub.environment(tmp_path / "home", token="hf_secret"))
        assert hub.files("me/other")["README.md"].startswith(b"---")
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

_LARGE = (".safetensors", ".bin", ".pt", ".parquet", ".model", ".gguf")  # what a new repository's .gitattributes tracks
_TIME = "2026-01-01T00:00:00.000Z"


class ApiError(Exception):
    """An answer other than success: its status, message, and the Hub's code for it in `X-Error-Code`."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


@dataclass
class User:
    """Who a token speaks for; `scopes` (account name: permissions) make it a fine-grained token."""

    name: str
    role: str = "write"
    organizations: dict[str, str] = field(default_factory=dict)
    scopes: dict[str, list[str]] | None = None

    def can_write(self, owner: str) -> bool:
        if self.scopes is not None:
            return "repo.write" in self.scopes.get(owner, [])
        member = owner == self.name or self.organizations.get(owner) in ("write", "admin", "contributor")
        return member and self.role == "write"


@dataclass
class Repo:
    """A repository; a commit is its id and the files that it holds."""

    repo_id: str
    kind: str
    private: bool
    commits: list[tuple[str, dict[str, Path]]] = field(default_factory=list)

    def commit(self, files: dict[str, Path]) -> str:
        content = [(path, hashlib.sha256(file.read_bytes()).hexdigest()) for path, file in sorted(files.items())]
        sha = hashlib.sha1(repr((self.repo_id, len(self.commits), content)).encode()).hexdigest()
        self.commits.append((sha, files))
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, Path]]:
        for sha, files in reversed(self.commits):
            if revision in ("main", sha):
                return sha, files
        raise ApiError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


@dataclass(frozen=True)
class Request:
    """A request that was answered: `user` is None where no valid token came with it."""

    method: str
    path: str
    status: int
    user: str | None


class HubServer:
    """Serves from a free port of 127.0.0.1 while its `with` block runs; uploaded bytes go below `root`."""

    def __init__(self, root: Path) -> None:
        self.blobs = root / "blobs"
        self.blobs.mkdir(parents=True)
        self.users: dict[str, User] = {}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Request] = []
        self.failures: list[tuple[str, str, int, dict[str, str]]] = []
        self.full_owners: set[str] = set()
        self.lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def add_user(self, token: str, name: str, **settings: Any) -> None:
        """Make `token` valid; `settings` are those of `User`."""
        self.users[token] = User(name, **settings)

    def add_repo(
        self, repo_id: str, folder: Path | None = None, *, repo_type: str = "model", private: bool = False
    ) -> str:
        """Host the files of a local folder, in place, as a repository's next commit; give the commit's id."""
        repo = self.repos.setdefault((repo_type, repo_id), Repo(repo_id, repo_type, private))
        paths = sorted(p for p in folder.rglob("*") if p.is_file()) if folder else []
        return repo.commit({str(path.relative_to(folder)): path for path in paths})

    def files(self, repo_id: str, repo_type: str = "model") -> dict[str, bytes]:
        """A repository's newest files."""
        return {path: file.read_bytes() for path, file in self.repos[repo_type, repo_id].commits[-1][1].items()}

    def fail(self, method: str, path_part: str, status: int, times: int = 1, **headers: str) -> None:
        """Answer the next `times` requests whose path holds `path_part` with `status`; 0: do what they ask, and hang up
        without an answer."""
        self.failures += [(method, path_part, status, headers)] * times

    def writes(self) -> list[str]:
        """Paths of the requests that change something, in order; validating metadata and listing paths do not."""
        harmless = ("/api/validate-yaml", "/paths-info/")
        return [r.path for r in self.requests if r.method in ("POST", "PUT") and not any(h in r.path for h in harmless)]

    def environment(self, home: Path, *, token: str | None = None) -> dict[str, str]:
        """Environment for a process whose Hub is this server, with its cache and login below `home`."""
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        own = {f"HF_HUB_DISABLE_{name}": "1" for name in ("XET", "TELEMETRY", "PROGRESS_BARS")}
        own |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return {**kept, **own, **({"HF_TOKEN": token} if token else {})}

    def store(self, content: bytes) -> Path:
        """Keep bytes by their SHA-256."""
        path = self.blobs / hashlib.sha256(content).hexdigest()
        path.write_bytes(content)
        return path


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
    if path.endswith(_LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


def _tree(files: dict[str, Path], folder: str, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    below = {path.removeprefix(prefix): file for path, file in sorted(files.items()) if path.startswith(prefix)}
    if folder and not below:
        raise ApiError(404, f"{folder} does not exist", "EntryNotFound")
    folders = sorted({str(parent) for path in below for parent in list(Path(path).parents)[:-1]})
    rows = [{"type": "directory", "path": prefix + name, "oid": _git_oid(name.encode()), "size": 0} for name in folders]
    rows += [_entry(prefix + path, file) for path, file in below.items()]
    return [row for row in rows if recursive or "/" not in row["path"].removeprefix(prefix)]


def _metadata_errors(card: str) -> list[str]:
    """What the Hub would refuse in a card's metadata: the rules that a wrong writer would break."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    data = yaml.safe_load(match[1]) if match else {}
    texts = ("license", "library_name", "pipeline_tag", "base_model")
    errors = [f'"{key}" must be a string' for key in texts if not isinstance(data.get(key, ""), str)]
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data.get("base_model", "none")):
        errors.append(f'"base_model" {data["base_model"]!r} is not a model id')
    if data.get("base_model_relation", "finetune") not in ("adapter", "finetune", "merge", "quantized"):
        errors.append(f'"base_model_relation" {data["base_model_relation"]!r} is unknown')
    results = [result for model in data.get("model-index", []) for result in model["results"]]
    if not all({"task", "dataset", "metrics"} <= set(result) for result in results):
        errors.append('"model-index" results need task, dataset and metrics')
    return errors


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        user = None
        try:
            self._fail_if_asked(url.path)
            user = self.user = self._authenticated()
            status, headers, content = self._route(url.path)
        except ApiError as error:
            status, headers = error.status, error.headers
            content = json.dumps({"error": str(error)}).encode()
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, url.path, status, user.name if user else None))
        if self.hangs_up:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_POST = do_PUT = do_GET

    def _fail_if_asked(self, path: str) -> None:
        with self.hub.lock:
            due = [failure for failure in self.hub.failures if failure[0] == self.command and failure[1] in path]
            if due:
                self.hub.failures.remove(due[0])
        self.hangs_up = bool(due) and due[0][2] == 0
        if due and not self.hangs_up:
            raise ApiError(due[0][2], "told to fail", **due[0][3])

    def _authenticated(self) -> User | None:
        given = self.headers.get("Authorization")
        if given is None:
            return None
        user = self.hub.users.get(given.removeprefix("Bearer "))
        if user is None:
            raise ApiError(401, "Invalid credentials in Authorization header")
        return user

    def _route(self, path: str) -> tuple[int, dict[str, str], bytes]:
        for method, pattern, name in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command.replace("HEAD", "GET"):
                found = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                result = getattr(self, name)(**found)
                return result if isinstance(result, tuple) else (200, {}, json.dumps(result).encode())
        raise ApiError(404, f"no route for {self.command} {path}")

    def _repo(self, repo: str, kind: str, *, write: bool = False) -> Repo:
        found = self.hub.repos.get((kind.removesuffix("s") or "model", repo))
        owner = repo.split("/")[0]
        member = self.user and (owner in (self.user.name, *self.user.organizations))
        if found is None or (found.private and not member):
            raise ApiError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and not (self.user and self.user.can_write(owner)):
            raise ApiError(403 if self.user else 401, f"You don't have write access to {repo}")
        return found

    def whoami(self) -> dict[str, Any]:
        if self.user is None:
            raise ApiError(401, "Invalid username or password.")
        token = {"displayName": "test", "role": "fineGrained" if self.user.scopes is not None else self.user.role}
        if self.user.scopes is not None:
            scoped = [{"entity": {"name": n, "type": "user"}, "permissions": p} for n, p in self.user.scopes.items()]
            token["fineGrained"] = {"canReadGatedRepos": True, "global": [], "scoped": scoped}
        groups = [{"type": "org", "name": name, "roleInOrg": role} for name, role in self.user.organizations.items()]
        return {"type": "user", "name": self.user.name, "orgs": groups, "auth": {"accessToken": token}}

    def auth_check(self, kind: str, repo: str, write: str | None = None) -> dict[str, Any]:
        self._repo(repo, kind, write=write is not None)
        return {}

    def create(self) -> tuple[int, dict[str, str], bytes]:
        asked = json.loads(self.body)
        owner = asked.get("organization") or (self.user.name if self.user else "")
        if self.user is None or not self.user.can_write(owner):
            raise ApiError(403 if self.user else 401, f'You don\'t have the rights to create a model under "{owner}"')
        if owner in self.hub.full_owners:
            raise ApiError(402, "Private repository storage limit reached")
        repo_id, kind = f"{owner}/{asked['name']}", asked.get("type", "model")
        url = f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
        if (kind, repo_id) in self.hub.repos:
            return 409, {}, json.dumps({"error": "You already created this repo", "url": url}).encode()
        private = asked.get("visibility", "private" if asked.get("private") else "public") == "private"
        self.hub.repos[kind, repo_id] = Repo(repo_id, kind, private)
        self.hub.repos[kind, repo_id].commit({".gitattributes": self.hub.store(b"*.safetensors filter=lfs\n")})
        return 200, {}, json.dumps({"url": url, "name": repo_id, "id": repo_id}).encode()

    def info(self, kind: str, repo: str, revision: str = "main") -> dict[str, Any]:
        found = self._repo(repo, kind)
        sha, files = found.at(revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        own = {"_id": sha[:24], "id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": sha, "tags": []}
        state = {"private": found.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        return {**own, **state, "siblings": siblings, "lastModified": _TIME, "createdAt": _TIME}

    def tree(self, kind: str, repo: str, revision: str, folder: str = "") -> list[dict[str, Any]]:
        recursive = self.query.get("recursive") in (["true"], ["True"])
        return _tree(self._repo(repo, kind).at(revision)[1], folder, recursive)

    def paths_info(self, kind: str, repo: str, revision: str) -> list[dict[str, Any]]:
        is_json = self.headers.get("Content-Type", "").startswith("application/json")
        asked = json.loads(self.body)["paths"] if is_json else parse_qs(self.body.decode())["paths"]
        return [row for row in _tree(self._repo(repo, kind).at(revision)[1], "", True) if row["path"] in asked]

    def validate_yaml(self) -> tuple[int, dict[str, str], bytes]:
        errors = [{"message": error} for error in _metadata_errors(json.loads(self.body)["content"])]
        return 400 if errors else 200, {}, json.dumps({"errors": errors, "warnings": []}).encode()

    def preupload(self, kind: str, repo: str, revision: str) -> dict[str, Any]:
        files = self._repo(repo, kind, write=True).at(revision)[1]
        answers = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            answer = {"path": path, "uploadMode": "lfs" if path.endswith(_LARGE) else "regular", "shouldIgnore": False}
            if path in files:
                entry = _entry(path, files[path])
                answer["oid"] = entry.get("lfs", entry)["oid"]
            answers.append(answer)
        return {"files": answers, "commitOid": self._repo(repo, kind).at(revision)[0]}

    def lfs_batch(self, repo: str, kind: str = "") -> dict[str, Any]:
        self._repo(repo, kind, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if not (self.hub.blobs / asked["oid"]).exists():
                verify = f"{self.hub.url}/{kind + '/' if kind else ''}{repo}.git/info/lfs/objects/verify"
                upload = f"{self.hub.url}/lfs-storage/{asked['oid']}"
                answer["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str) -> dict[str, Any]:
        if self.headers.get("Authorization"):
            raise ApiError(400, "the token must not be sent to the storage")
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise ApiError(400, "the bytes do not match their id")
        self.hub.store(self.body)
        return {}

    def lfs_verify(self, repo: str, kind: str = "") -> dict[str, Any]:
        asked = json.loads(self.body)
        if (self.hub.blobs / asked["oid"]).stat().st_size != asked["size"]:
            raise ApiError(400, "another size was announced")
        return {}

    def commit(self, kind: str, repo: str, revision: str) -> dict[str, Any]:
        found = self._repo(repo, kind, write=True)
        files = dict(found.at(revision)[1])
        for line in self.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = self.hub.store(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                files[value["path"]] = self.hub.blobs / value["oid"]
                if not files[value["path"]].exists():
                    raise ApiError(400, f"{value['path']} was not uploaded")
            elif key == "deletedFile":
                del files[value["path"]]
        sha = found.commit(files)
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"}

    def resolve(self, repo: str, revision: str, path: str, kind: str = "") -> tuple[int, dict[str, str], bytes]:
        sha, files = self._repo(repo, kind).at(revision)
        if path not in files:
            raise ApiError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        content, entry = files[path].read_bytes(), _entry(path, files[path])
        headers = {"X-Repo-Commit": sha, "ETag": f'"{entry["oid"]}"', "Content-Type": "application/octet-stream"}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(len(content))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return 200, {"Accept-Ranges": "bytes", **headers}, content
        start, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        return 206, {"Content-Range": f"bytes {start}-{end}/{len(content)}", **headers}, content[start : end + 1]


_KIND = "/api/(?P<kind>models|datasets|spaces)"
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+?)"
_OTHER = "/(?:(?P<kind>datasets|spaces)/)?"
_ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("GET", f"{_KIND}/{_REPO}/auth-check(?P<write>/write)?", "auth_check"),
    ("GET", f"{_KIND}/{_REPO}(?:/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", f"{_KIND}/{_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", "tree"),
    ("POST", f"{_KIND}/{_REPO}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("POST", f"{_KIND}/{_REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", f"{_KIND}/{_REPO}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"{_OTHER}{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("POST", rf"{_OTHER}{_REPO}\.git/info/lfs/objects/verify", "lfs_verify"),
    ("PUT", "/lfs-storage/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("GET", f"{_OTHER}{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]
