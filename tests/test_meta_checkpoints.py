"""Meta's shards are read and written as the model that a written-out evaluation of the shards finds in them."""

import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from src.checkpoints import hf, meta
from src.checkpoints.certificate import CertificateError, compare
from src.checkpoints.checkpoint import ReadOptions, WriteOptions
from src.checkpoints.convert import convert
from src.checkpoints.meta_params import feed_forward_size, params_of
from src.checkpoints.meta_releases import RELEASES
from tests import meta_reference as reference
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
TOLD = {
    "1": ReadOptions(meta_version="1"),
    "2": ReadOptions(meta_version="2"),
    "3": ReadOptions(instruct=False),
    "3.1": ReadOptions(meta_version="3.1", instruct=False),
    "3.2": ReadOptions(meta_version="3.2", instruct=False),
}
FACTORS = {"3.1": 8.0, "3.2": 32.0}
TOKENS = [(7 * place * place + 3 * place) % 320 for place in range(64)]
# float32 rounding of 2 layers against float64; a wrong angle or slice moves logits by tenths of the largest
CLOSE = 1e-5


def loaded_logits(folder):
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model(torch.tensor([TOKENS])).logits[0].double()


def assert_close(found, expected):
    assert (found.double() - expected).abs().max() < CLOSE * expected.abs().max()


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("release", TOLD)
def test_converted_model_computes_what_the_shards_do(release, shards, tmp_path):
    """With 4 shards, each of the 2 key heads stands in two of them."""
    reference.write(tmp_path / "meta", release, shards, tied=release == "3.2")
    convert(tmp_path / "meta", tmp_path / "hf", "hf", reading=TOLD[release])
    expected = reference.logits(tmp_path / "meta", TOKENS, FACTORS.get(release))
    assert_close(loaded_logits(tmp_path / "hf"), expected)
    assert_close(meta.read(tmp_path / "meta", TOLD[release]).logits([TOKENS])[0], expected)
    config = json.loads((tmp_path / "hf" / "config.json").read_text("utf-8"))
    contexts = {"1": 2048, "2": 4096, "3": 8192, "3.1": 131072, "3.2": 131072}
    assert config["max_position_embeddings"] == contexts[release]
    assert config["tie_word_embeddings"] == (release == "3.2")


def test_the_written_out_evaluation_tells_the_two_scalings_apart(tmp_path):
    reference.write(tmp_path / "meta", "3.1")
    first, second = (reference.logits(tmp_path / "meta", TOKENS, factor) for factor in (8.0, 32.0))
    assert (first - second).abs().max() > 10 * CLOSE * first.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("release", "shards"), [("2", 1), ("2", 2), ("3.1", 2), ("3.2", 1)])
def test_round_trip_keeps_every_bit(release, shards, dtype, tmp_path):
    reference.write(tmp_path / "a", release, dtype=dtype, tied=release == "3.2")
    convert(tmp_path / "a", tmp_path / "b", "hf", reading=TOLD[release])
    record = convert(tmp_path / "b", tmp_path / "c", "meta", writing=WriteOptions(shards=shards))
    assert len(list((tmp_path / "c").glob("*.pth"))) == shards
    assert_close(loaded_logits(tmp_path / "b"), reference.logits(tmp_path / "c", TOKENS, FACTORS.get(release)))
    convert(tmp_path / "c", tmp_path / "d", "hf")
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (tmp_path / "d" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    before, after = (torch.load(tmp_path / name / "consolidated.00.pth") for name in "ac")
    if shards == 1:
        assert before.keys() - {"rope.freqs"} == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in after)
    assert after["norm.weight"].dtype == dtype
    assert record["check"]["largest_relative_rounding_of_a_tensor"] == 0


def test_weights_are_rounded_to_the_dtype_asked_for(tmp_path):
    whole = reference.write(tmp_path / "a", "3.1")
    convert(tmp_path / "a", tmp_path / "b", "hf", reading=TOLD["3.1"])
    convert(tmp_path / "b", tmp_path / "c", "meta", writing=WriteOptions(dtype="bfloat16"))
    written = torch.load(tmp_path / "c" / "consolidated.00.pth")
    assert all(torch.equal(written[name], tensor.to(torch.bfloat16)) for name, tensor in whole.items())


def test_slices_joined_wrongly_are_found_by_the_certificate(tmp_path):
    reference.write(tmp_path / "meta", "2", shards=2)
    source = meta.read(tmp_path / "meta", TOLD["2"])
    shards = [torch.load(tmp_path / "meta" / f"consolidated.0{shard}.pth") for shard in range(2)]
    name, own = "model.layers.1.self_attn.o_proj.weight", "layers.1.attention.wo.weight"
    key, own_key = "model.layers.0.self_attn.k_proj.weight", "layers.0.attention.wk.weight"
    wrong = {
        "by rows": (name, torch.cat([shard[own] for shard in shards]).reshape(32, 32)),
        "in another order": (name, torch.cat([shard[own] for shard in reversed(shards)], dim=1)),
        "in pairs": (key, torch.cat([shard[own_key] for shard in shards])),
    }
    for fault, (name, tensor) in wrong.items():
        lazy = dataclasses.replace(source.tensors[name], load=lambda tensor=tensor: tensor)
        misread = dataclasses.replace(source, tensors={**source.tensors, name: lazy})
        (tmp_path / fault).mkdir()
        hf.write(misread, tmp_path / fault, WriteOptions())
        with pytest.raises(CertificateError, match=f"{name} of .* differs from the source's"):
            compare(source, hf.read_back(tmp_path / fault), None, "tensors")
        with pytest.raises(CertificateError, match="logits differ by"):
            compare(misread, hf.read_back(tmp_path / fault), None, "logits")


@pytest.mark.parametrize(
    ("release", "told", "message"),
    [
        ("2", ReadOptions(), "context of 2048 or 4096, as no file says; give --meta-version 1|2"),
        ("3.1", ReadOptions(instruct=True), r"a rope factor of 8 or 32, as no file says; give --meta-version 3.1\|3.2"),
        ("3.1", ReadOptions(meta_version="3.1"), "at which tokens its texts end; give --instruct .* or --base"),
        ("3", ReadOptions(), "give --instruct"),
        ("3", ReadOptions(meta_version="3.1", instruct=True), "which is not --meta-version 3.1 but 3; give that"),
        ("2", ReadOptions(meta_version="3"), "which is not --meta-version 3 but 1 or 2; give that"),
    ],
)
def test_what_no_file_says_is_asked_for(release, told, message, tmp_path):
    reference.write(tmp_path / "meta", release)
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "meta", tmp_path / "hf", "hf", reading=told)
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]


def change_params(folder, **changes):
    content = json.loads((folder / "params.json").read_text("utf-8"))
    (folder / "params.json").write_text(json.dumps(content | changes), encoding="utf-8")


def change_shard(folder, shard, change):
    file = folder / f"consolidated.{shard:02}.pth"
    content = torch.load(file)
    change(content)
    torch.save(content, file)


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-200])


class Runs:
    """A pickle that would make a file named `ran`."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return (self.folder.joinpath("ran").touch, ())


FAULTS = {
    "cut short": (lambda f: cut_short(f / "consolidated.01.pth"), r"consolidated.01.pth is no whole file that torch"),
    "first shard missing": (lambda f: (f / "consolidated.00.pth").unlink(), r"lacks \['consolidated.00.pth'\]"),
    "last shards missing": (
        lambda f: [(f / f"consolidated.0{shard}.pth").unlink() for shard in (2, 3)],
        r"consolidated.00.pth: tok_embeddings.weight has .* a shard is missing",
    ),
    "no shard": (lambda f: [file.unlink() for file in f.glob("*.pth")], r"lacks \['consolidated.00.pth'\]"),
    "code": (
        lambda f: change_shard(f, 2, lambda c: c.update(more=Runs(f))),
        r"consolidated.02.pth holds .*, which is neither a plain value nor a tensor",
    ),
    "no tensor": (lambda f: change_shard(f, 2, lambda c: c.update(more=3)), "consolidated.02.pth: more is a int"),
    "tensor missing": (
        lambda f: change_shard(f, 3, lambda c: c.pop("norm.weight")),
        r"consolidated.03.pth .* do not hold the same tensors \(\['norm.weight'\]",
    ),
    "other shape": (
        lambda f: change_shard(f, 1, lambda c: c.update({"layers.1.attention.wo.weight": torch.zeros(8, 32)})),
        r"consolidated.01.pth: layers.1.attention.wo.weight is torch.float32 of \(8, 32\); .* of \(32, 8\)",
    ),
    "other norm": (
        lambda f: change_shard(f, 2, lambda c: c["layers.0.ffn_norm.weight"].add_(1)),
        r"consolidated.02.pth: layers.0.ffn_norm.weight differs from that of consolidated.00.pth",
    ),
    "other copy of a head": (
        lambda f: change_shard(f, 3, lambda c: c["layers.1.attention.wk.weight"].add_(1)),
        r"consolidated.03.pth: layers.1.attention.wk.weight differs from that of consolidated.02.pth",
    ),
    "feed-forward size": (
        lambda f: change_params(f, multiple_of=256),
        r"w1.weight has 112 rows in 4 shards, but multiple_of=256 and ffn_dim_multiplier=1.3 .* ask for 256",
    ),
    "vocabulary": (lambda f: change_params(f, vocab_size=600), "has 528 rows in all, but .* says vocab_size=600"),
    "layers": (lambda f: change_params(f, n_layers=3), r"lacks the tensors \['layers.2.attention.wk.weight'"),
    "heads": (lambda f: change_params(f, n_heads=5), "dim=32, n_heads=5 and n_kv_heads=2 do not divide"),
    "text for a number": (lambda f: change_params(f, dim="32"), "params.json: dim=32 is no count"),
    "another family": (lambda f: change_params(f, sliding_window=4096), r"params.json sets \['sliding_window'\]"),
    "no params": (lambda f: (f / "params.json").unlink(), "params.json does not exist"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "tokenizer.model does not exist; name"),
    "tokenizer of another size": (
        lambda f: (f / "tokenizer.model").write_bytes(reference.ranks().rpartition(b"aGU= 271\n")[0]),
        "tokenizer.model has 527 tokens, but tok_embeddings.weight has 528 rows",
    ),
    "tokenizer of other ranks": (
        lambda f: (f / "tokenizer.model").write_bytes(reference.ranks().replace(b" 271\n", b" 272\n")),
        "tokenizer.model: line 272 has rank 272, not 271",
    ),
    "tokenizer without a byte": (
        lambda f: (f / "tokenizer.model").write_bytes(reference.ranks().replace(b"/w== 255\n", b"enp6 255\n")),
        r"tokenizer.model lacks the bytes \[255\]",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_files_are_refused_by_name_and_nothing_is_written(fault, tmp_path):
    folder = tmp_path / "meta"
    reference.write(folder, "3.1", shards=4)
    damage, message = FAULTS[fault]
    damage(folder)
    with pytest.raises(UserError, match=message):
        convert(folder, tmp_path / "hf", "hf", source="meta", reading=TOLD["3.1"])
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]
    assert not (folder / "ran").exists()


LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
REFUSED = {
    "factor": (
        "config.json",
        {"rope_parameters": LLAMA3_ROPE | {"factor": 16.0, "original_max_position_embeddings": 8192}},
        "rope_parameters=.*16",
    ),
    "kind": (
        "config.json",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}},
        "rope_parameters=.*linear",
    ),
    "scaling": (
        "config.json",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        "tokenizer.special_tokens=.*Llama 1 or 2 or 3 has",
    ),
    "act": ("config.json", {"hidden_act": "gelu"}, "hidden_act=gelu cannot be held by meta"),
    "window": ("config.json", {"sliding_window": 64}, "sets {'sliding_window': 64}, which meta cannot hold"),
    "family": ("config.json", {"model_type": "mistral"}, "model_type=mistral cannot be held by meta"),
    "stops": (
        "generation_config.json",
        {"eos_token_id": [281, 7]},
        r"stop_token_ids=\(281, 7\) cannot be held by meta",
    ),
    "begin": ("generation_config.json", {"bos_token_id": 5}, "generation.bos_token_id=5"),
    "cut": ("tokenizer.json", {"normalizer": {"type": "NFC"}}, "normalizer=.*NFC.* cannot be held by ranks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_meta_cannot_hold_is_refused_by_name(case, tmp_path):
    reference.write(tmp_path / "meta", "3.1")
    convert(tmp_path / "meta", tmp_path / "a", "hf", reading=TOLD["3.1"], check="tensors")
    file, change, message = REFUSED[case]
    content = json.loads((tmp_path / "a" / file).read_text(encoding="utf-8"))
    (tmp_path / "a" / file).write_text(json.dumps(content | change), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "a", tmp_path / "b", "meta")
    assert not (tmp_path / "b").exists()


def test_a_field_beyond_meta_is_refused_by_name(tmp_path):
    reference.write(tmp_path / "meta", "2")
    source = meta.read(tmp_path / "meta", TOLD["2"])
    for field, value in (("attention_bias", True), ("mlp_bias", True), ("head_dim", 16)):
        other = dataclasses.replace(source, architecture=dataclasses.replace(source.architecture, **{field: value}))
        with pytest.raises(UserError, match=f"{field}={value} cannot be held by meta"):
            meta.write(other, tmp_path, WriteOptions())


def test_shards_must_divide_what_they_cut(tmp_path):
    reference.write(tmp_path / "meta", "3.1")
    convert(tmp_path / "meta", tmp_path / "a", "hf", reading=TOLD["3.1"], check="tensors")
    for shards, field in ((3, "num_attention_heads=4"), (4, "num_key_value_heads=2"), (0, "num_attention_heads=4")):
        with pytest.raises(UserError, match=f"{field} cannot be cut into --shards {shards} equal parts"):
            convert(tmp_path / "a", tmp_path / "b", "meta", writing=WriteOptions(shards=shards))
    with pytest.raises(UserError, match="--shards has no meaning from hf to hf"):
        convert(tmp_path / "a", tmp_path / "b", "hf", writing=WriteOptions(shards=2))


def test_what_meta_does_not_hold_is_told(tmp_path, caplog):
    reference.write(tmp_path / "meta", "2")
    convert(tmp_path / "meta", tmp_path / "a", "hf", reading=TOLD["2"], check="tensors")
    file = tmp_path / "a" / "config.json"
    content = json.loads(file.read_text("utf-8")) | {"max_position_embeddings": 16384}
    file.write_text(json.dumps(content), encoding="utf-8")
    convert(tmp_path / "a", tmp_path / "b", "meta", check="tensors")
    assert "meta does not hold max_position_embeddings=16384: on reading, Llama 2's 4096" in caplog.text
    assert json.loads((tmp_path / "b" / "reading.json").read_text("utf-8")) == {"meta_version": "2", "instruct": False}


# dim, multiple_of, ffn_dim_multiplier and published size: Llama 2 7B, 13B and 70B, 3 8B, 3.2 1B and 3B
PUBLISHED = [
    (4096, 256, None, 11008),
    (5120, 256, None, 13824),
    (8192, 4096, 1.3, 28672),
    (4096, 1024, 1.3, 14336),
    (2048, 256, 1.5, 8192),
    (3072, 256, 1.0, 8192),
]


def test_feed_forward_sizes_are_the_published_ones():
    for dim, multiple_of, multiplier, size in PUBLISHED:
        assert feed_forward_size(dim, multiple_of, multiplier) == size


def test_params_are_found_for_any_feed_forward_size(tmp_path):
    reference.write(tmp_path / "meta", "2")
    sizes = meta.read(tmp_path / "meta", TOLD["2"]).architecture
    for dim, wide in [(dim, size) for dim, _, _, size in PUBLISHED] + [(64, wide) for wide in range(1, 400)]:
        written = params_of(dataclasses.replace(sizes, hidden_size=dim, intermediate_size=wide), RELEASES["2"])
        assert feed_forward_size(dim, written["multiple_of"], written.get("ffn_dim_multiplier")) == wide


def run_command(folder, *arguments, file_bytes=resource.RLIM_INFINITY):
    """The command's result, with a limit on the size of a file as a full disk would set one."""
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "convert_checkpoint.py"), *arguments],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY)),
    )


@pytest.mark.parametrize("limit", [pytest.param(4_000, marks=pytest.mark.slow), 80_000])
def test_a_full_disk_is_told_and_leaves_nothing(limit, tmp_path):
    """The embedding's slice is of 67,584 bytes, so that 4,000 stops it, and 80,000 the shard."""
    reference.write(tmp_path / "meta", "3.1")
    convert(tmp_path / "meta", tmp_path / "a", "hf", reading=TOLD["3.1"], check="tensors")
    result = run_command(tmp_path, "a", "b", "--to", "meta", file_bytes=limit)
    assert result.returncode == 2, result.stderr
    assert "make room on the disk" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "meta"]


@pytest.mark.slow
def test_the_command_reads_and_writes_meta(tmp_path):
    reference.write(tmp_path / "meta", "3.2", shards=2, tied=True)
    asked = run_command(tmp_path, "meta", "hf", "--to", "hf")
    assert asked.returncode == 2
    assert "give --meta-version 3.1|3.2" in asked.stderr
    good = run_command(tmp_path, "meta", "hf", "--to", "hf", "--meta-version", "3.2", "--base")
    assert good.returncode == 0, good.stderr
    back = run_command(tmp_path, "hf", "back", "--to", "meta", "--shards", "2")
    assert back.returncode == 0, back.stderr
    for shard in ("consolidated.00.pth", "consolidated.01.pth"):
        before, after = (torch.load(tmp_path / name / shard) for name in ("meta", "back"))
        assert all(torch.equal(before[name], after[name]) for name in after)
    assert load_file(tmp_path / "hf" / "model.safetensors").keys().isdisjoint({"lm_head.weight"})
