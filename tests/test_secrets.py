"""No secret of the machine is written or printed, whatever a run does, and no file that is read runs code.

Secrets are planted where a user has them, in the environment, a URL and the Hub's headers, and every file and stream is
searched for them.
"""

import base64
import json
import os
import pickle
import runpy
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from config.recipe import load_recipe
from src.files import file_rows
from src.preparation import read_hashes
from tests.hub_server import HubServer
from tests.tiny_run import ROOT, from_checkpoint, run_train, stop_after, write_checkpoint, write_recipe
from utils.checkpoint_record import RECORD
from utils.files import sha256_of_file
from utils.logging import set_up_logging
from utils.redaction import redact

TOKEN = "hf_" + "pLaNt3dT0k3n" * 3
SECRETS = {
    "HF_TOKEN": TOKEN,
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY",
    "DATABASE_PASSWORD": "correct horse battery",
    "MY_DB_PWD": "planted-db-pwd-42",
    "CLIENT_SECRET_NAME": "project-nightfall",
}
IN_URL = "planted-url-password"


def found(folders, streams):
    """Where a planted secret stands, plain or in base64, in any file below folders or in a text."""
    words = [*SECRETS.values(), IN_URL]
    needles = [word.encode() for word in words]
    needles += [base64.b64encode(b"me:" + needle).rstrip(b"=")[4:-4] for needle in needles]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    places = [(path, path.read_bytes() + str(path).encode()) for path in files]
    places += [(f"stream {number}", text.encode()) for number, text in enumerate(streams)]
    return sorted({(str(place), needle) for place, content in places for needle in needles if needle in content})


@pytest.fixture
def planted(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # set anew by the program


def test_the_search_finds_what_is_planted(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "state.bin").write_bytes(b"\0\1" + TOKEN.encode() + b"\2")
    (tmp_path / "header").write_bytes(base64.b64encode(f"me:{IN_URL}".encode()))
    places = {place for place, _ in found([tmp_path], ["fine", f"https://me:{IN_URL}@host"])}
    assert places == {str(tmp_path / "below" / "state.bin"), str(tmp_path / "header"), "stream 1"}


def test_a_run_with_secrets_in_its_settings_and_environment_writes_none(tmp_path, planted):
    recipe = write_recipe(tmp_path / "in", training={"max_steps": 2}, output={"folder": str(tmp_path / "outputs")})
    arguments = ["--config", recipe, f"--data.train.0.roles={{'{SECRETS['MY_DB_PWD']} {TOKEN}': user}}"]
    done = run_train(*arguments, "--hub.license", f"https://me:{IN_URL}@host/license?token={IN_URL}")
    assert done.code == 0, done.stderr
    assert len([path for path in (tmp_path / "outputs").rglob("*") if path.is_file()]) > 20
    assert found([tmp_path], [done.stdout, done.stderr]) == []
    config = json.loads((tmp_path / "outputs" / "run" / "config.json").read_text())
    assert config["data"]["train"][0]["roles"] == {"*** ***": "user"}


def test_an_error_that_quotes_a_setting_shows_no_credential(tmp_path, planted):
    recipe = write_recipe(tmp_path)
    for path in (
        f"https://me:{IN_URL}@host/rows.jsonl",
        f"https://host/rows.jsonl?api_key={IN_URL}",
        f"{TOKEN}/x.json",
    ):
        done = run_train("--config", recipe, "--data.train.0.path", path)
        assert done.code == 2
        assert "***" in done.stderr
        assert found([tmp_path], [done.stdout, done.stderr]) == []


@pytest.mark.parametrize(
    "command",
    [
        "convert_checkpoint.py {secret} {out} --to hf",
        "generate.py {secret} --prompt hello",
        "inspect_data.py --config {secret}",
        "prepare_data.py --config {secret}",
        "push_to_hub.py {secret}",
        "cluster/resume_option.py --config {secret}",
    ],
)
def test_what_a_script_is_given_is_quoted_in_its_error_without_secrets(command, tmp_path, planted, monkeypatch, capfd):
    script, *arguments = command.split()
    given = [argument.format(secret=tmp_path / f"{TOKEN}.yaml", out=tmp_path / "out") for argument in arguments]
    monkeypatch.setattr(sys, "argv", [script, *given])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    streams = capfd.readouterr()
    assert ended.value.code == 2
    assert "error: " in streams.err
    assert "***" in streams.err
    assert not found([], streams)


def test_a_crash_shows_its_traceback_without_secrets(planted, capsys):
    set_up_logging()

    def send(token, address):
        raise ConnectionError(f"{address} refused: {{'Authorization': 'Bearer {token}'}}")

    try:
        try:
            send(os.environ["HF_TOKEN"], f"https://me:{IN_URL}@host/rows")
        except ConnectionError as error:
            raise RuntimeError(f"no rows, with {dict(os.environ)}") from error
    except RuntimeError:
        sys.excepthook(*sys.exc_info())
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "in send" in shown
    assert "https://***@host/rows refused" in shown
    assert found([], [shown]) == []


def test_prose_and_plain_addresses_are_logged_as_they_are():
    for text in ("Bearer of news", "a Basic income", "https://host/rows?page=2", "me@host.org", "token_ids=[1, 2]"):
        assert redact(text) == text


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["pushed", "refused", "crashed"])
def test_a_run_that_pushes_or_crashes_writes_no_secret(tmp_path, ending):
    recipe = write_recipe(tmp_path / "in", training={"max_steps": 2}, output={"folder": str(tmp_path / "outputs")})
    program = [ROOT / "train.py", "--config", recipe]
    if ending == "crashed":
        wrapper = tmp_path / "in" / "crash.py"
        wrapper.write_text(
            "import os, sys, runpy\n"
            "import src.run\n"
            "def crash(*_, **__):\n"
            "    headers = dict(os.environ)\n"
            "    raise RuntimeError(f'lost: {headers}')\n"
            "src.run.model_card = crash\n"
            "sys.argv = sys.argv[1:]\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        )
        program = [wrapper, *program]
    with HubServer(tmp_path / "hub") as hub:
        hub.add_user(TOKEN, "me")
        if ending == "refused":
            hub.fail("POST", "commit/main", 400)
        if ending != "crashed":
            program += ["--hub.repo_id", "me/tiny"]
        done = subprocess.run(
            [sys.executable, *map(str, program)],
            cwd=ROOT,
            env={**hub.environment(tmp_path / "home"), **SECRETS, "PYTHONPATH": str(ROOT), "HF_DEBUG": "1"},
            capture_output=True,
            text=True,
        )
        code = {"pushed": 0, "refused": 2, "crashed": 1}[ending]
        assert done.returncode == code, done.stderr[-3000:]
        assert ("Traceback" in done.stderr) is (ending == "crashed")
        if ending == "pushed":
            assert "run/environment.json" in hub.files("me/tiny")
    assert found([tmp_path], [done.stdout, done.stderr]) == []


class Touch:
    """What pickles to a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def test_a_checkpoint_whose_pickle_names_a_command_is_refused_and_runs_nothing(tmp_path):
    recipe, run, sign = write_recipe(tmp_path), tmp_path / "outputs" / "run", tmp_path / "sign"
    assert run_train("--config", recipe).code == 0
    pickle.loads(pickle.dumps(Touch(sign)))
    assert sign.is_file()
    stop_after(run, 2)
    checkpoint = run / "checkpoint-2"
    before = {
        name: (checkpoint / name).read_bytes() for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", RECORD)
    }
    for name in before.keys() - {RECORD}:
        sign.unlink(missing_ok=True)
        torch.save({"state": Touch(sign)}, checkpoint / name)
        record = json.loads(before[RECORD])
        size = (checkpoint / name).stat().st_size
        record["files"][name] = {"bytes": size, "sha256": sha256_of_file(checkpoint / name)}
        (checkpoint / RECORD).write_text(json.dumps(record))
        with pytest.raises(pickle.UnpicklingError, match="weights_only"):
            run_train("--config", recipe, "--resume")
        assert not sign.exists(), name
        (checkpoint / name).write_bytes(before[name])


def test_a_base_whose_pickle_names_a_command_is_refused_and_runs_nothing(tmp_path):
    base, sign = write_checkpoint(tmp_path / "base"), tmp_path / "sign"
    (base / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Touch(sign)}, base / "pytorch_model.bin")
    done = run_train("--config", write_recipe(tmp_path, model=from_checkpoint(base)))
    assert done.code == 2
    assert "error: the weights of" in done.stderr
    assert not sign.exists()


def test_cached_hashes_that_are_a_pickle_are_refused(tmp_path):
    import numpy as np

    np.save(tmp_path / "hashes.npy", np.array([Touch(tmp_path / "sign")], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        read_hashes(tmp_path)
    assert not (tmp_path / "sign").exists()


def test_a_recipe_in_yaml_names_no_code(tmp_path):
    for tag in ("apply:os.system [touch sign]", "name:os.system", "module:os", "object:pathlib.Path {}"):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"output: !!python/{tag}\n")
        with pytest.raises(ValueError, match="could not determine a constructor"):
            load_recipe(recipe)


def test_weight_files_outside_of_a_checkpoint_are_refused(tmp_path):
    base = write_checkpoint(tmp_path / "base")
    (base / "model.safetensors").rename(tmp_path / "private.safetensors")
    names = load_file(tmp_path / "private.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../private.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    done = run_train("--config", write_recipe(tmp_path, model=from_checkpoint(base)))
    assert done.code == 2
    assert "names weight files that are not beside it (../private.safetensors)" in done.stderr
    save_file(names, base / "model.safetensors", metadata={"format": "pt"})


def test_a_runs_name_cannot_leave_its_folder(tmp_path):
    recipe = write_recipe(tmp_path)
    for name in ("..", "../run", "/run", "a/b", ".hidden", "run\n", "a\\b"):
        done = run_train("--config", recipe, f"--output.name={name}")
        assert done.code == 2
        assert "output.name" in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_a_path_in_a_row_is_a_text_and_is_not_opened(tmp_path):
    (tmp_path / "private.txt").write_text("private words")
    row = {"text": "a row", "image": {"path": str(tmp_path / "private.txt"), "bytes": None}, "path": "../private.txt"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    values = [row.values for row in file_rows(tmp_path / "rows.jsonl", "rows.jsonl")]
    assert values == [row]
    datasets = pytest.importorskip("datasets")
    from src.tables import data_set_rows

    table = datasets.Dataset.from_list([row]).cast_column("image", datasets.Image())
    ((read, _),) = data_set_rows(table, "rows")
    assert "private words" not in str(read)
    assert read["image"]["path"] == row["image"]["path"]
