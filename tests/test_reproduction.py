"""A run repeated from its record comes to the same weights, and what stands in the way is told before or after."""

import hashlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from config.constraints import ConfigError
from config.loader import read_command_line, to_dict
from src.inputs import described, program_sha256
from src.merging.merge import merge
from src.reproduction import _first_other_step, as_it_was
from tests.hub_server import HubServer
from tests.test_launch import launch
from tests.tiny_run import (
    ARCHITECTURE,
    ROOT,
    assert_same_run,
    chat_rows,
    from_checkpoint,
    run_train,
    stop_after,
    two_epochs,
    weights_of,
    write_checkpoint,
    write_recipe,
    write_rows,
)
from utils.digests import Digests
from utils.errors import UserError
from utils.weights_digest import weights_sha256


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The directory of a run of six steps with dropout, packed and shuffled."""
    folder = tmp_path_factory.mktemp("original")
    done = run_train("--config", two_epochs(folder, "full"))
    assert done.code == 0, done.stderr
    return folder / "outputs" / "run"


@pytest.fixture
def copy(original, tmp_path):
    """A copy of that run's record and result, which a test may change."""
    return shutil.copytree(original, tmp_path / "run")


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def reproduce(run, *arguments):
    return run_train("--reproduce", run, *arguments)


def by_hand(folder):
    """The hash of a folder's weights as its docstring has it, from all tensors at once."""
    content = b""
    for name, tensor in sorted(weights_of(folder).items()):
        content += f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode()
        content += bytes(tensor.contiguous().untyped_storage())
    return hashlib.sha256(content).hexdigest()


def test_the_record_has_the_hash_of_the_weights(original):
    assert json.loads((original / "result.json").read_text())["weights_sha256"] == by_hand(original / "model")


def test_the_hash_of_weights_depends_on_each_name_dtype_shape_and_byte_and_not_on_the_files(tmp_path):
    weights = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(1.5, dtype=torch.bfloat16)}

    def digest(name, *files):
        (tmp_path / name).mkdir()
        for number, file in enumerate(files):
            save_file(file, tmp_path / name / f"model-{number}.safetensors")
        return weights_sha256(tmp_path / name)

    first = digest("one", weights)
    assert digest("split", {"b": weights["b"]}, {"a": weights["a"]}) == first
    changed = weights["b"].clone()
    changed[1, 2] = 5.0000005
    others = [
        digest("renamed", {"c": weights["b"], "a": weights["a"]}),
        digest("cast", weights | {"b": weights["b"].view(torch.int32)}),
        digest("reshaped", weights | {"b": weights["b"].reshape(3, 2)}),
        digest("changed", weights | {"b": changed}),
    ]
    assert len({first, *others}) == 5
    assert weights_sha256(tmp_path) is None


def test_a_repeated_run_ends_with_the_same_weights_metrics_and_samples(original):
    done = reproduce(original)
    assert done.code == 0, done.stderr
    repeated = original.parent / "run-reproduced"
    digest = by_hand(original / "model")
    assert f"equal: the weights in {repeated} have the SHA-256 {digest}, as those in {original}" in done.stderr
    assert "warning" not in done.stderr
    assert_same_run(repeated, original)
    again = reproduce(original)
    assert again.code == 2
    assert f"{repeated} holds a run already" in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "own tokenizer", "stream"])
def test_other_kinds_of_runs_are_repeated_too(tmp_path, kind):
    if kind == "lora":
        recipe = two_epochs(tmp_path, "lora")
    elif kind == "stream":
        data = {"streaming": True, "stream_window_rows": 7}
        recipe = write_recipe(tmp_path, data=data, training={"max_steps": 6})
    else:
        model = {"tokenizer": "train", "new_tokenizer": {"vocab_size": 300}, "chat_template": None}
        recipe = write_recipe(tmp_path, model=model | {"special_tokens": None})
    done = run_train("--config", recipe)
    assert done.code == 0, done.stderr
    run = tmp_path / "outputs" / "run"
    shutil.rmtree(tmp_path / "outputs" / ".data")  # the run's directory suffices
    done = reproduce(run, "--output.folder", tmp_path / "elsewhere", "--output.name", "again")
    assert done.code == 0, done.stderr
    assert "equal: " in done.stderr
    assert_same_run(tmp_path / "elsewhere" / "again", run)


@pytest.mark.slow
def test_a_run_that_comes_to_other_weights_is_told_with_the_first_step_that_differs(copy):
    weights = load_file(copy / "model" / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-6
    save_file(weights, copy / "model" / "model.safetensors")
    edit(copy / "result.json", weights_sha256=by_hand(copy / "model"))
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    for line in lines:
        if line["step"] >= 3 and "loss" in line:
            line["loss"] += 1e-9
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = reproduce(copy)
    assert done.code == 1
    assert f"those in {copy} {by_hand(copy / 'model')}; their losses differ from step 3 on" in done.stderr


def test_other_data_is_told_before_the_run_and_after_it(tmp_path):
    recipe, run = write_recipe(tmp_path), tmp_path / "outputs" / "run"
    assert run_train("--config", recipe).code == 0
    write_rows(tmp_path / "train.jsonl", chat_rows()[::-1])
    done = reproduce(run)
    assert done.code == 1
    file = tmp_path / "train.jsonl"
    assert f"warning: {file} holds other bytes than then: the run learns from something else" in done.stderr
    assert f"error: data.json: train.sources.0.sha256.{file} was " in done.stderr
    assert str(file) in done.stderr.partition("different: ")[2]


def test_each_difference_of_the_machine_and_the_program_is_told_with_what_it_can_change(copy):
    machine = json.loads((copy / "environment.json").read_text())
    edit(
        copy / "environment.json",
        packages=machine["packages"] | {"torch": "1.13.0", "tokenizers": "0.1"},
        hardware=machine["hardware"] | {"cpu_instructions": "VSX", "cores": 999},
        program_sha256="0" * 64,
        git_commit="c0ffee-dirty",
        threads=1,
    )
    edit(copy / "config.json", training=json.loads((copy / "config.json").read_text())["training"] | {"max_steps": 1})
    done = reproduce(copy)
    assert done.code == 1
    told = [line for line in done.stderr.splitlines() if line.startswith("warning: ") and " was " in line]
    assert [line.split()[1] for line in told] == [
        "hardware.cpu_instructions",
        "packages.tokenizers",
        "packages.torch",
        "program_sha256",
    ]
    assert "was 'VSX' and is " in told[0]
    assert "be rounded otherwise" in told[0]
    assert "other tokens" in told[1]
    assert f"was '1.13.0' and is '{torch.__version__.partition('+')[0]}" in told[2]
    assert "`git checkout c0ffee` brings it back, but for what was not committed then" in told[3]


def test_threads_and_hub_commits_are_those_of_then_and_neither_push_nor_trackers_are_repeated(copy):
    config, commit = json.loads((copy / "config.json").read_text()), "0123456789" * 4
    edit(copy / "environment.json", threads=3)
    edit(
        copy / "config.json",
        training=config["training"] | {"cpu_threads": None},
        hub=config["hub"] | {"repo_id": "me/tiny"},
        tracking=config["tracking"] | {"report_to": ["tensorboard"]},
    )
    data = json.loads((copy / "data.json").read_text())
    data["train"]["sources"][0]["revision"] = commit
    edit(copy / "data.json", train=data["train"])
    inputs = json.loads((copy / "inputs.json").read_text())
    edit(copy / "inputs.json", **{"model.path": {"path": "me/base", "commit": commit, "sha256": {}}}, **inputs)
    repeated = as_it_was(read_command_line(["--reproduce", str(copy)])).config
    assert repeated.training.cpu_threads == 3
    assert repeated.data.train[0].revision == repeated.model.revision == commit
    assert repeated.data.eval[0].revision is None
    assert repeated.hub.repo_id is None
    assert repeated.tracking.report_to == ()
    after = to_dict(repeated)
    assert {name for name in after if config[name] != after[name]} == {"training", "data", "model", "output"}


def test_a_run_of_other_processes_is_refused_with_the_launch_that_repeats_it(copy):
    edit(copy / "environment.json", world_size=2)
    done = reproduce(copy)
    assert done.code == 2
    assert f"accelerate launch --num_processes 2 train.py --reproduce {copy}" in done.stderr
    assert not copy.with_name("run-reproduced").exists()


@pytest.mark.slow
def test_a_run_of_two_processes_is_repeated(tmp_path):
    run = tmp_path / "outputs" / "run"
    first = launch("--config", two_epochs(tmp_path, "full"))
    assert first.returncode == 0, first.stderr[-3000:]
    again = launch("--reproduce", run)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stderr.count("equal: ") == 1


def test_a_run_that_was_resumed_with_other_settings_is_refused(copy):
    stop_after(copy, 4)
    arguments = ("--config", copy.with_name("recipe.yaml"), "--output.folder", copy.parent, "--output.name", copy.name)
    config = json.loads((copy / "config.json").read_text())
    copy.with_name("recipe.yaml").write_text(json.dumps(config))
    done = run_train(*arguments, "--resume", "--training.log_every_steps=2", "--optim.learning_rate=1e-3")
    assert done.code == 0, done.stderr
    names = [change["name"] for change in json.loads((copy / "changes.json").read_text())]
    assert {"training.log_every_steps", "optim.learning_rate"} <= set(names)
    done = reproduce(copy)
    assert done.code == 2
    assert "optim.learning_rate from 0.003 to 0.001 at step 4. Start a run of its own" in done.stderr
    assert "log_every_steps" not in done.stderr


@pytest.mark.slow
def test_a_resumed_run_is_repeated_and_one_resumed_with_other_settings_is_refused(tmp_path):
    recipe, run = two_epochs(tmp_path, "full"), tmp_path / "outputs" / "run"
    assert run_train("--config", recipe).code == 0
    stop_after(run, 4)
    assert run_train("--config", recipe, "--resume", "--training.log_every_steps", "2").code == 0
    done = reproduce(run)
    assert done.code == 0, done.stderr
    stop_after(run, 2)
    assert run_train("--config", recipe, "--resume", "--optim.learning_rate", "1e-3").code == 0
    done = reproduce(run, "--output.name", "third")
    assert done.code == 2
    assert "optim.learning_rate from 0.003 to 0.001 at step 2. Start a run of its own" in done.stderr
    assert "log_every_steps" not in done.stderr


def test_a_base_of_the_same_shapes_with_other_weights_is_told_and_not_merged_with(tmp_path):
    base = write_checkpoint(tmp_path / "base")
    adapter = {"kind": "lora", "rank": 2}
    recipe = write_recipe(tmp_path, model=from_checkpoint(base), adapter=adapter, training={"max_steps": 1})
    assert run_train("--config", recipe).code == 0
    run = tmp_path / "outputs" / "run"
    known = json.loads((run / "inputs.json").read_text())["model.path"]
    file = base / "model.safetensors"
    assert known["sha256"]["model.safetensors"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert {"config.json", "tokenizer.json"} < known["sha256"].keys()
    weights = load_file(file)
    weights["lm_head.weight"][0] += 1
    save_file(weights, file, metadata={"format": "pt"})
    done = reproduce(run)
    assert done.code == 1
    assert f"model.path: model.safetensors of {base} holds other bytes than then" in done.stderr
    said = rf"the base {base} is not the one .* model\.safetensors holds other weights than {run / 'inputs.json'}"
    with pytest.raises(UserError, match=said):
        merge(run, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
def test_a_saved_data_sets_files_are_on_record(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(chat_rows()).save_to_disk(tmp_path / "saved")
    recipe = write_recipe(tmp_path, data={"train": [{"path": str(tmp_path / "saved")}]}, training={"max_steps": 1})
    done = run_train("--config", recipe)
    assert done.code == 0, done.stderr
    source = json.loads((tmp_path / "outputs" / "run" / "data.json").read_text())["train"]["sources"][0]
    files = [path for path in (tmp_path / "saved").iterdir() if path.suffix == ".arrow"]
    assert files
    assert {str(path) for path in files} <= source["sha256"].keys()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "config/smol.py"], "leave --config, --resume, --print_config, --plan and --trial out"),
        (["--resume"], "leave --config, --resume, --print_config, --plan and --trial out"),
        (["--optim.learning_rate", "1e-3", "--training.seed=1"], "and optim.learning_rate, training.seed would change"),
        (["--data.eval", "[]"], "data.eval"),
    ],
)
def test_options_that_would_change_the_run_are_refused(original, arguments, said):
    with pytest.raises(ConfigError, match=said):
        read_command_line(["--reproduce", str(original), *arguments])


def test_a_record_that_does_not_suffice_is_refused(copy, tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.json; give the directory of a finished run"):
        read_command_line(["--reproduce", str(tmp_path)])
    config = json.loads((copy / "config.json").read_text())
    source = config["data"]["train"][0] | {"path": "https://***@host/rows.jsonl"}
    edit(copy / "config.json", data=config["data"] | {"train": [source]})
    with pytest.raises(ConfigError, match=r"has \*\*\* in data\.train\.0\.path, in place of a credential"):
        read_command_line(["--reproduce", str(copy)])
    edit(copy / "config.json", data=config["data"], optimm={})
    with pytest.raises(ConfigError, match="optimm is no field"):
        read_command_line(["--reproduce", str(copy)])
    edit(copy / "result.json", weights_sha256=None)
    shutil.rmtree(copy / "model")
    (copy / "config.json").write_text(json.dumps(config))
    done = reproduce(copy)
    assert done.code == 2
    assert "has no weights_sha256" in done.stderr


def test_the_programs_hash_depends_on_its_code_and_not_on_recipes(tmp_path):
    for part in ("config", "src", "utils"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "data"))
    shutil.copy(ROOT / "train.py", tmp_path)
    first = program_sha256(tmp_path)
    with open(tmp_path / "config" / "smol.py", "a") as recipe:
        recipe.write("# 9 packs\n")
    assert program_sha256(tmp_path) == first
    with open(tmp_path / "src" / "loss.py", "a") as code:
        code.write("# changed\n")
    assert program_sha256(tmp_path) != first


HUB_INPUT = """
import json
from huggingface_hub import snapshot_download
from src.inputs import described
from utils.digests import Digests
snapshot_download("me/tiny")
print(json.dumps(described("me/tiny", Digests())))
"""


@pytest.mark.slow
def test_of_a_base_on_the_hub_the_commit_is_on_record(tmp_path):
    folder = write_checkpoint(tmp_path / "base")
    with HubServer(tmp_path / "hub") as hub:
        hub.add_user("hf_secret", "me")
        commit = hub.add_repo("me/tiny", folder)
        environment = hub.environment(tmp_path / "home", token="hf_secret") | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", HUB_INPUT], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    known = json.loads(done.stdout)
    assert known["commit"] == commit
    assert known["sha256"] == described(str(folder), Digests())["sha256"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= known["sha256"].keys()


def test_weights_that_nothing_reads_are_no_input(tmp_path):
    folder = write_checkpoint(tmp_path / "base", hidden_size=ARCHITECTURE["hidden_size"])
    (folder / "pytorch_model.bin").write_bytes(b"the same, once more")
    (folder / "README.md").write_text("a card")
    names = described(str(folder), Digests())["sha256"].keys()
    assert "model.safetensors" in names
    assert not names & {"pytorch_model.bin", "README.md"}


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [("changes.json", "[{", "is no JSON"), ("changes.json", "{}", "holds a dict"), ("data.json", "[]", "holds a list")],
)
def test_a_damaged_record_is_refused_by_name(copy, file, text, told):
    (copy / file).write_text(text)
    done = reproduce(copy)
    assert done.code == 2
    assert f"error: {copy / file} {told}" in done.stderr


def test_losses_that_cannot_be_read_are_told_as_such(original, tmp_path):
    assert _first_other_step(original, original) == "their losses on record are the same"
    assert _first_other_step(original, tmp_path).startswith(
        f"the losses in {tmp_path / 'metrics.jsonl'} cannot be read"
    )


def test_a_place_that_cannot_be_written_is_refused(original):
    done = reproduce(original, "--output.folder", "/proc/nowhere")
    assert done.code == 2
    assert "error: /proc/nowhere/" in done.stderr
