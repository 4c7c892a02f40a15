"""The real client against a local server; each client runs in a process of its own, as it reads HF_ENDPOINT once."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from config.schema import HubConfig
from tests.finished_run import HOME, write_model, write_run
from tests.hub_server import HubServer
from utils.errors import UserError
from utils.hub import files_to_push, is_hub_id, launch_folder

ROOT = Path(__file__).parents[1]
TOKEN = "hf_" + "sEcReT" * 6


@pytest.fixture
def hub(tmp_path):
    with HubServer(tmp_path / "hub") as server:
        server.add_user(TOKEN, "me", organizations={"team": "write", "readers": "read"})
        yield server


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with what training leaves beside the result, which no test changes."""
    run = write_run(tmp_path_factory.mktemp("work") / "outputs" / "tiny")
    (run / "checkpoint-40").mkdir()
    (run / "checkpoint-40" / "optimizer.pt").write_bytes(b"moments")
    (run / "model" / "training_args.bin").write_bytes(b"pickle")
    (run / "model" / "README.md").write_text("written by a library")
    (run / "samples.jsonl").write_text('{"prompt": "a private row"}\n')
    return run


def python(hub, *arguments, token=TOKEN, folder=None, **environment):
    """Run Python with the local Hub in a folder of its own; give its exit code, stdout and stderr."""
    home = hub.blobs.parent.parent / "home"
    home.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**hub.environment(home, token=token), "PYTHONPATH": str(ROOT), **environment},
        cwd=folder or home,
        capture_output=True,
        text=True,
        timeout=100,
    )


def push(hub, *arguments, **settings):
    return python(hub, ROOT / "scripts" / "push_to_hub.py", *arguments, **settings)


CHECK = """
import sys
from utils.errors import UserError
from utils.hub import check_access
try:
    print(check_access(sys.argv[1], private=sys.argv[2] == "private", create=sys.argv[3] == "create"))
except UserError as error:
    sys.exit(f"refused: {error}")
"""


def check(hub, repo_id, visibility="private", create="create", **settings):
    return python(hub, "-c", CHECK, repo_id, visibility, create, **settings)


def test_a_pushed_model_comes_back_byte_for_byte_and_loads(hub, finished):
    done = push(hub, finished, "--repo-id", "me/tiny")
    assert done.returncode == 0, done.stderr
    commit = hub.repos["model", "me/tiny"].commits[-1][0]
    assert done.stdout.strip() == f"{hub.url}/me/tiny/commit/{commit}"
    code = (
        "import sys; from huggingface_hub import snapshot_download; print(snapshot_download('me/tiny'));"
        "from transformers import AutoModelForCausalLM as M; print(M.from_pretrained('me/tiny').num_parameters())"
    )
    loaded = python(hub, "-c", code)
    assert loaded.returncode == 0, loaded.stderr
    snapshot, parameters = loaded.stdout.split()
    sent = [path for path in (finished / "model").iterdir() if path.name not in ("training_args.bin", "README.md")]
    assert len(sent) == 6
    for path in sent:
        assert (Path(snapshot) / path.name).read_bytes() == path.read_bytes(), path.name
    assert int(parameters) == 17_112  # 259 x 24 x 2 + 4 x 24 x 24 + 3 x 24 x 32 + 3 x 24


def test_a_push_is_private_and_one_commit_of_what_belongs(hub, finished):
    assert push(hub, finished, "--repo-id", "me/tiny").returncode == 0
    repo = hub.repos["model", "me/tiny"]
    assert repo.private
    assert len(repo.commits) == 2  # the creation, and the push
    model = {"config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"}
    record = {
        f"run/{name}" for name in ("config.json", "environment.json", "data.json", "metrics.jsonl", "result.json")
    }
    files = hub.files("me/tiny")
    assert set(files) == model | record | {"tokenizer.json", "tokenizer_config.json", "README.md", ".gitattributes"}
    assert b"library_name: transformers" in files["README.md"]
    assert b'location = "me/tiny"' in files["README.md"]


def test_what_is_pushed_names_no_folder_of_the_machine_that_trained(hub, finished):
    assert push(hub, finished, "--repo-id", "me/tiny").returncode == 0
    for path, content in hub.files("me/tiny").items():
        for word in (HOME, "alice", "secret client", str(finished.parents[1])):
            assert word.encode() not in content, (path, word)
    data = json.loads(hub.files("me/tiny")["run/data.json"])
    assert [source["path"] for source in data["train"]["sources"]] == ["train.jsonl", "me/questions"]


def test_the_token_is_in_no_output_and_no_file(hub, finished, tmp_path):
    outputs = []
    for arguments, settings in [
        (["--repo-id", "me/tiny"], {}),
        (["--repo-id", "me/tiny", "--dry-run"], {"HF_DEBUG": "1"}),
        (["--repo-id", "me/debugged"], {"HF_DEBUG": "1"}),
        (["--repo-id", "you/tiny"], {}),
        (["--repo-id", "me/tiny"], {"HF_ENDPOINT": "http://127.0.0.1:9"}),
        (["--repo-id", "me/tiny"], {"token": TOKEN + "\v" + TOKEN}),
        (["--repo-id", "me/tiny"], {"token": TOKEN + "x"}),
    ]:
        done = push(hub, finished, *arguments, **settings)
        outputs += [done.stdout, done.stderr]
    for failing in ("whoami", "preupload", "commit/main"):
        hub.fail("GET" if failing == "whoami" else "POST", failing, 400)
        outputs.append(push(hub, finished, "--repo-id", f"me/fails-{failing.split('/')[0]}").stderr)
        assert "told to fail" in outputs[-1]
    assert not [text for text in outputs if TOKEN in text]
    assert any("me may push to" in text for text in outputs)
    written = [p for folder in (tmp_path, finished) for p in folder.rglob("*") if p.is_file()]
    assert len(written) > 20
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]


def test_a_dry_run_needs_no_token_and_sends_no_request(hub, finished):
    done = push(hub, finished, "--repo-id", "me/tiny", "--dry-run", token=None)
    assert done.returncode == 0, done.stderr
    assert not hub.requests
    size = (finished / "model" / "model.safetensors").stat().st_size
    assert re.search(rf"{size:,} bytes  model\.safetensors", done.stdout)
    left_out = "would leave out: checkpoint-40/, model/README.md, model/training_args.bin, samples.jsonl"
    for shown in ("me/tiny, as a private repository", left_out, "pipeline_tag: text-generation", "there is no token"):
        assert shown in done.stdout


def test_a_dry_run_with_a_token_asks_for_access_and_writes_nothing(hub, finished):
    done = push(hub, finished, "--repo-id", "me/tiny", "--dry-run", "--public")
    assert done.returncode == 0, done.stderr
    assert f"me may push to {hub.url}/me/tiny, which would be created" in done.stdout
    assert "as a public repository" in done.stdout
    assert not hub.writes()
    assert push(hub, finished, "--repo-id", "you/tiny", "--dry-run").returncode == 2


def test_the_run_s_own_config_says_where_to_push(hub, tmp_path):
    run = write_run(tmp_path / "outputs" / "tiny", hub=HubConfig(repo_id="team/tiny", private=False, license="mit"))
    assert push(hub, "outputs/tiny", folder=tmp_path).returncode == 0
    assert not hub.repos["model", "team/tiny"].private
    assert b"license: mit" in hub.files("team/tiny")["README.md"]
    edited = "# Written by hand\n"
    (run / "README.md").write_text(edited)
    assert push(hub, run).returncode == 0
    assert hub.files("team/tiny")["README.md"].decode() == edited


@pytest.mark.parametrize(
    ("repo_id", "settings", "told"),
    [
        ("me/new", {"token": None}, "no token; run `hf auth login`"),
        ("me/new", {"token": "hf_unknown"}, "does not accept HF_TOKEN"),
        ("me/new", {"token": "hf_reads"}, "can only read"),
        ("me/new", {"token": "hf_fine"}, "You don't have the rights to create a model"),
        ("me/private", {"token": "hf_fine"}, "You don't have write access to me/private"),
        ("you/new", {}, "choose an owner among me, team, full for hub.repo_id"),
        ("readers/new", {}, "me may not write to readers/"),
        ("full/new", {}, "Private repository storage limit reached"),
        ("me/public", {}, "me/public is public, and hub.private=True"),
        ("new", {}, "names no owner"),
        ("me/a b", {}, "is not a repository's name"),
        ("me/new", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"),
        ("me/new", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached"),
    ],
)
def test_a_push_that_cannot_work_is_refused_before_training(hub, repo_id, settings, told):
    hub.add_user("hf_reads", "me", role="read")
    hub.add_user("hf_fine", "me", scopes={"team": ["repo.write"], "me": ["repo.content.read"]})
    hub.users[TOKEN].organizations["full"] = "admin"
    hub.full_owners.add("full")
    hub.add_repo("me/public")
    hub.add_repo("me/private", private=True)
    before = set(hub.repos)
    done = check(hub, repo_id, **settings)
    assert done.returncode == 1
    assert "refused: " in done.stderr
    assert told in done.stderr
    assert set(hub.repos) == before


def test_a_hub_that_is_down_is_told_from_one_that_refuses(hub):
    hub.fail("GET", "whoami", 503)
    done = check(hub, "me/new")
    assert "is overloaded or down (HTTP 503); try again" in done.stderr


@pytest.mark.parametrize("visibility", ["private", "public"])
def test_the_check_creates_a_missing_repository_of_the_asked_visibility(hub, visibility):
    done = check(hub, "team/new", visibility)
    assert done.returncode == 0, done.stderr
    assert hub.repos["model", "team/new"].private == (visibility == "private")
    assert f"private={visibility == 'private'}, exists=True" in done.stdout


def test_the_check_without_creation_writes_nothing(hub):
    done = check(hub, "me/new", create="no")
    assert "exists=False" in done.stdout
    assert not hub.writes()


def test_a_data_set_of_the_same_name_is_no_obstacle(hub):
    hub.add_repo("me/same", repo_type="dataset")
    assert check(hub, "me/same").returncode == 0
    assert ("model", "me/same") in hub.repos


@pytest.mark.parametrize(
    ("method", "path", "status", "headers"),
    [
        ("POST", "/commit/main", 503, {}),
        ("POST", "/commit/main", 429, {"Retry-After": "1"}),
        ("POST", "/validate-yaml", 502, {}),
        ("PUT", "/lfs-storage/", 500, {}),
    ],
)
def test_a_push_outlives_a_passing_fault(hub, finished, method, path, status, headers):
    hub.fail(method, path, status, **headers)
    done = push(hub, finished, "--repo-id", "me/tiny")
    assert done.returncode == 0, done.stderr
    assert not hub.failures
    assert "model.safetensors" in hub.files("me/tiny")


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, finished, tmp_path):
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "pytorch_model.bin").write_bytes(b"old")
    hub.add_repo("me/tiny", tmp_path / "earlier", private=True)
    hub.fail("POST", "/commit/main", 0)
    done = push(hub, finished, "--repo-id", "me/tiny")
    assert done.returncode == 0, done.stderr
    assert "trying again" in done.stderr
    commits = hub.repos["model", "me/tiny"].commits
    assert len(commits) == 2
    assert done.stdout.strip().endswith(commits[-1][0])
    assert "pytorch_model.bin" not in hub.files("me/tiny")


def test_a_failed_push_says_where_the_model_stands_and_how_to_push_it_again(hub, finished):
    hub.fail("POST", "/commit/main", 403)
    done = push(hub, finished, "--repo-id", "me/tiny")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    command = re.search(r"python scripts/push_to_hub\.py (.*)", done.stderr)[1]
    assert f"the model stands in {finished}" in done.stderr
    assert push(hub, *command.split()).returncode == 0
    assert "model.safetensors" in hub.files("me/tiny")


def test_weights_of_an_earlier_push_are_never_loaded_in_place_of_new_ones(hub, finished, tmp_path):
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "model-00001-of-00002.safetensors", "notes.md"):
        (earlier / name).write_text("{}")
    hub.add_repo("me/tiny", earlier, private=True)
    assert "would remove: adapter_config.json" in push(hub, finished, "--repo-id", "me/tiny", "--dry-run").stdout
    assert push(hub, finished, "--repo-id", "me/tiny").returncode == 0
    files = set(hub.files("me/tiny"))
    assert "notes.md" in files
    assert not files & {"adapter_config.json", "adapter_model.safetensors", "model-00001-of-00002.safetensors"}


def test_a_second_push_of_the_same_run_adds_no_commit(hub, finished):
    urls = [push(hub, finished, "--repo-id", "me/tiny").stdout for _ in range(2)]
    assert urls[0] == urls[1]
    assert len(hub.repos["model", "me/tiny"].commits) == 2


@pytest.mark.slow
def test_the_card_of_a_pushed_adapter_shows_code_that_runs(hub, tmp_path):
    write_model(tmp_path / "base")
    hub.add_repo("me/base", tmp_path / "base")
    run = write_run(tmp_path / "outputs" / "tuned", base="me/base", base_folder=tmp_path / "base")
    done = push(hub, run, "--repo-id", "me/tuned")
    assert done.returncode == 0, done.stderr
    card = hub.files("me/tuned")["README.md"].decode()
    assert "base_model: me/base\n" in card
    assert "base_model_relation: adapter\n" in card
    shown = python(hub, "-c", re.search(r"```python\n(.*?)```", card, re.DOTALL)[1])
    assert shown.returncode == 0, shown.stderr
    assert len(shown.stdout) > 1
    assert any("me/base/resolve" in request.path for request in hub.requests)


def test_an_adapter_s_local_base_is_told_by_its_name_alone(tmp_path):
    write_model(tmp_path / "secret client" / "base")
    base = tmp_path / "secret client" / "base"
    run = write_run(tmp_path / "outputs" / "tuned", base=str(base), base_folder=base)
    (settings,) = [file.content for file in files_to_push(run) if file.path == "adapter_config.json"]
    before = json.loads((run / "model" / "adapter_config.json").read_text())
    assert before["base_model_name_or_path"] == str(base)
    assert json.loads(settings) == {**before, "base_model_name_or_path": "base"}


def test_a_folder_without_weights_is_refused(hub, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds no weights"):
        files_to_push(tmp_path)
    done = push(hub, tmp_path, "--repo-id", "me/tiny")
    assert done.returncode == 2
    assert "is not a finished run" in done.stderr


def test_a_path_that_exists_where_the_run_was_started_is_no_hub_id(finished):
    (finished.parents[1] / "models" / "base").mkdir(parents=True)
    launched_in = launch_folder(finished)
    assert launched_in == finished.parents[1].resolve()
    assert is_hub_id("me/base", launched_in)
    for path in ("models/base", "a/b/c", "/mnt/base", "./base", "rows.jsonl"):
        assert not is_hub_id(path, launched_in), path


@pytest.mark.slow
def test_data_sets_load_from_the_local_server(hub, tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    commit = hub.add_repo("me/rows", tmp_path / "rows", repo_type="dataset", private=True)
    code = (
        f"import datasets; print(datasets.load_dataset('me/rows', split='train', revision='{commit}')['text'][:],"
        "next(iter(datasets.load_dataset('me/rows', split='train', streaming=True))))"
    )
    done = python(hub, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['a', 'b'] {'text': 'a'}"
