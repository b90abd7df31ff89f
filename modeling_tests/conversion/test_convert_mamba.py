# SPDX-License-Identifier: Apache-2.0
"""Plain Mamba-1 and Mamba-2 in both formats keep their logits in the family that extends them; whatever cannot is refused
with nothing written."""

import functools
import inspect
import json
import os
import shutil

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from remamba_hf import checkpoint_files
from remamba_hf.checkpoint_files import CheckpointError
from remamba_hf.conversion import convert, convert_checkpoint, verification
from remamba_hf.families import PLAIN_FAMILIES

from .conftest import HEAD, HIDDEN, PADDED_VOCABULARY, VOCABULARY, load_mamba, make_mamba, ssm_settings, write_original

IDS = torch.randint(VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def assert_same_logits(folder, reference, tolerance=1e-5):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model) is PLAIN_FAMILIES[reference.config.model_type].model_class
    expected = reference(IDS).logits
    actual = model(IDS, compress_prompt=False).logits
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
    return model


@pytest.mark.smoke
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_format(tmp_path, tied, family):
    source = make_mamba(tied, family=family)
    source.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    report = convert_checkpoint(str(tmp_path / "hf"), tmp_path / "out")
    model = assert_same_logits(tmp_path / "out", source)
    assert model.config.model_type == PLAIN_FAMILIES[family].model_type
    assert model.config.tie_word_embeddings == report.tied == tied
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert max(report.checks.values()) < 1e-5
    assert any("UNTRAINED" in note for note in report.notes)
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) != tied


@pytest.mark.parametrize(
    ("tied", "with_head", "config"),
    [
        (True, True, {}),
        (True, False, {"tie_embeddings": True}),
        (False, True, {"tie_embeddings": False}),
        (True, True, {"attn_layer_idx": [], "attn_cfg": {}, "d_intermediate": 0}),
    ],
)
def test_original_format(tmp_path, tied, with_head, config, family):
    source = make_mamba(tied, family=family)
    folder = write_original(source, tmp_path / "original", with_head, **config)
    report = convert_checkpoint(str(folder), tmp_path / "out")
    model = assert_same_logits(tmp_path / "out", source)
    assert model.config.vocab_size == PADDED_VOCABULARY != VOCABULARY
    assert model.config.tie_word_embeddings == tied
    assert "original" in report.kind
    config = model.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 0, 0)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_groups_of_heads(tmp_path, groups):
    """As Codestral is configured, with what older versions of transformers wrote besides."""
    source = make_mamba(False, family="mamba2", n_groups=groups, time_step_limit=(0.01, 0.5))
    source.save_pretrained(tmp_path / "hf")
    break_config(norm_before_gate=True, intermediate_size=2 * HIDDEN, rms_norm=True)(tmp_path / "hf")
    convert_checkpoint(str(tmp_path / "hf"), tmp_path / "out")
    model = assert_same_logits(tmp_path / "out", source)
    assert model.config.n_groups == groups
    assert tuple(model.config.time_step_limit) == (0.01, 0.5)
    write_original(source, tmp_path / "original", ssm_cfg=ssm_settings(source) | {"dt_limit": [0.01, 0.5]})
    break_config(tie_embeddings=False)(tmp_path / "original")
    convert_checkpoint(str(tmp_path / "original"), tmp_path / "out2")
    assert_same_logits(tmp_path / "out2", source)


@pytest.mark.parametrize("limit", [[0.0, float("inf")], [0.0, {"__float__": "Infinity"}]])
def test_step_limits_in_either_spelling(tmp_path, limit):
    source = make_mamba(family="mamba2")
    source.save_pretrained(tmp_path / "hf")
    break_config(time_step_limit=limit)(tmp_path / "hf")
    convert_checkpoint(str(tmp_path / "hf"), tmp_path / "out")
    model = assert_same_logits(tmp_path / "out", source)
    assert tuple(model.config.time_step_limit) == (0.0, float("inf"))


def test_what_transformers_configuration_has_by_default(tmp_path):
    """Whether embeddings and head are tied, where config.json does not say: Mamba-1's are, Mamba-2's are not."""
    for family, tied in (("mamba", True), ("mamba2", False)):
        source = make_mamba(tied, family=family)
        folder, out = tmp_path / family, tmp_path / f"{family}-out"
        source.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config.pop("tie_word_embeddings", None)
        (folder / "config.json").write_text(json.dumps(config))
        assert convert_checkpoint(str(folder), out).tied == tied
        assert_same_logits(out, source)


@pytest.mark.parametrize("grouped", [True, False])
def test_norm_of_older_transformers(tmp_path, monkeypatch, grouped):
    """Before 5.22 the reference itself is wrong for several groups: it is mended, and the report says so."""

    class OldNorm(torch.nn.Module):
        def __init__(self, size, group_size=None, eps=1e-6):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(size))
            self.variance_epsilon = eps

        def forward(self, x, gate):
            return self.weight * torch.nn.functional.rms_norm(x * torch.nn.functional.silu(gate), x.shape[-1:], eps=1e-5)

    source = make_mamba(family="mamba2", n_groups=2 if grouped else 1)
    source.save_pretrained(tmp_path / "hf")
    monkeypatch.setattr(modeling_mamba2, "MambaRMSNormGated", OldNorm)
    report = convert_checkpoint(str(tmp_path / "hf"), tmp_path / "out")
    assert any("groups of channels as one" in note for note in report.notes) == grouped
    assert_same_logits(tmp_path / "out", source)
    if grouped:  # without the mending the comparison fails
        monkeypatch.setattr(verification, "_normalizes_groups_as_one", lambda model: False)
        assert_refused(tmp_path / "hf", tmp_path, "Verification failed", overwrite=True)


def test_kernels_of_transformers_stay_out(hf_folder, tmp_path, mamba, monkeypatch):
    """Where mamba-ssm is installed, transformers' operators are its kernels, on the CPU too."""
    modeling = modeling_mamba if mamba.config.model_type == "mamba" else modeling_mamba2
    operators = [name for name in vars(modeling) if name.startswith(("mamba_", "mamba2_", "causal_"))]
    assert len(operators) >= 4
    expected = mamba(IDS).logits
    for name in operators:
        torch_function = inspect.unwrap(getattr(modeling, name))
        kernel = functools.wraps(torch_function)(lambda *_, **__: pytest.fail("a CUDA kernel was called on the CPU"))
        monkeypatch.setattr(modeling, name, kernel)
    convert_checkpoint(str(hf_folder), tmp_path / "out")
    actual = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS, compress_prompt=False).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


MAMBA1_SSM = {"d_state": 6, "dt_rank": 5, "layer": "Mamba1", "expand": 1, "d_conv": 3, "bias": True, "conv_bias": False}
MAMBA2_SSM = {
    **{"layer": "Mamba2", "d_state": 6, "headdim": HEAD, "ngroups": 2, "chunk_size": 32, "expand": 1, "d_conv": 3},
    **{"bias": True, "conv_bias": False, "dt_min": 0.01, "dt_max": 0.2, "dt_init_floor": 1e-3, "dt_limit": [0, 1]},
    # without effect, or with the only value that this model knows
    **{"A_init_range": [1, 16], "D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False, "d_ssm": HIDDEN},
    **{"use_mem_eff_path": True, "sequence_parallel": True, "process_group": None, "conv_init": None},
}


@pytest.mark.parametrize("ssm", [MAMBA1_SSM, MAMBA2_SSM])
def test_original_ssm_settings(tmp_path, ssm):
    family = "mamba2" if ssm is MAMBA2_SSM else "mamba"
    source = make_mamba(family=family, expand=1, conv_kernel=3, use_bias=True, use_conv_bias=False)
    folder = write_original(source, tmp_path / "original", ssm_cfg=ssm)
    convert_checkpoint(str(folder), tmp_path / "out")
    model = assert_same_logits(tmp_path / "out", source)
    if ssm is MAMBA2_SSM:
        config = model.config
        assert (config.time_step_min, config.time_step_max, config.time_step_floor) == (0.01, 0.2, 1e-3)
        assert tuple(config.time_step_limit) == (0, 1)
        assert config.chunk_size == 32


def test_defaults_of_the_original_mixer(tmp_path):
    """What ssm_cfg does not name has the default of the original constructor, not of transformers' configuration."""
    source = make_mamba(family="mamba2", state_size=128, head_dim=64, num_heads=1, n_groups=1)
    folder = write_original(source, tmp_path / "original", ssm_cfg={"layer": "Mamba2"})
    convert_checkpoint(str(folder), tmp_path / "out")
    assert assert_same_logits(tmp_path / "out", source).config.chunk_size == 256


def test_legacy_bin_without_memory_map(tmp_path, mamba):
    folder = write_original(mamba, tmp_path / "original")
    torch.save(mamba.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert_checkpoint(str(folder), tmp_path / "out")
    assert_same_logits(tmp_path / "out", mamba)


def test_half_precision_keeps_some_weights_in_float32(hf_folder, tmp_path, mamba):
    report = convert_checkpoint(str(hf_folder), tmp_path / "out", dtype="bfloat16")
    kept = ("A_log", ".D", "dt_proj.bias", "dt_bias", "adaptation.bias")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in written.items():
        assert tensor.dtype == (torch.float32 if name.endswith(kept) else torch.bfloat16), name
        if name in mamba.state_dict():
            torch.testing.assert_close(tensor, mamba.state_dict()[name].to(tensor.dtype), rtol=0, atol=0)
    assert report.checks["the folder, loaded again"] < 1e-6


def test_half_precision_source_stays(tmp_path, mamba):
    mamba.to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    assert convert_checkpoint(str(tmp_path / "hf"), tmp_path / "out").dtype == "bfloat16"
    assert_same_logits(tmp_path / "out", mamba.float())


def test_initialized_compressor(hf_folder, tmp_path, mamba):
    report = convert_checkpoint(str(hf_folder), tmp_path / "out", initialize_compressor=True)
    model = assert_same_logits(tmp_path / "out", mamba)
    size, compressor = mamba.config.hidden_size, model.backbone.compressor
    in_proj = mamba.backbone.layers[0].mixer.in_proj.weight
    torch.testing.assert_close(compressor.key[0].weight, in_proj[:size], rtol=0, atol=0)
    torch.testing.assert_close(compressor.query[2].weight, in_proj[3 * size : 4 * size], rtol=0, atol=0)
    assert any("paper's start" in note for note in report.notes)


def test_compressor_needs_expand_2(tmp_path, family, monkeypatch):
    make_mamba(family=family, expand=1).save_pretrained(tmp_path / "hf")
    monkeypatch.setattr(convert, "_verified_model", lambda *_: pytest.fail("the work began before this was refused"))
    assert_refused(tmp_path / "hf", tmp_path, "expand=2", initialize_compressor=True)


def test_family_asked_for(hf_folder, tmp_path, family):
    ours = PLAIN_FAMILIES[family].model_type
    other = next(plain for plain in PLAIN_FAMILIES.values() if plain.model_type != ours)
    possible = {"mamba": "'remamba' or 'memmamba'", "mamba2": "'remamba2'"}[family]
    assert_refused(hf_folder, tmp_path, f"becomes {possible}, not '{other.model_type}'", to=other.model_type)
    assert_refused(hf_folder, tmp_path, "to must be one of", to="mamba")
    convert_checkpoint(str(hf_folder), tmp_path / "out", to=ours)


def test_settings_are_written_and_checked_first(hf_folder, tmp_path, monkeypatch):
    convert_checkpoint(str(hf_folder), tmp_path / "out", settings={"compression_span": 0.4})
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.compression_span == 0.4
    monkeypatch.setattr(convert, "locate", lambda *_: pytest.fail("looked for the source before checking settings"))
    with pytest.raises(ValueError, match="compression_span"):
        convert_checkpoint(str(hf_folder), tmp_path / "other", settings={"compression_span": 1.5})


def test_files_that_come_along(hf_folder, tmp_path):
    GenerationConfig(max_new_tokens=7, eos_token_id=[0, 3]).save_pretrained(hf_folder)
    (hf_folder / "tokenizer.json").write_text("{}")
    (hf_folder / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    report = convert_checkpoint(str(hf_folder), tmp_path / "out")
    assert not any("tokenizer" in note for note in report.notes)
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"eos_token": "x"}'
    assert GenerationConfig.from_pretrained(tmp_path / "out").max_new_tokens == 7
    os.remove(hf_folder / "tokenizer.json")
    report = convert_checkpoint(str(hf_folder), tmp_path / "other")
    assert any("no tokenizer" in note for note in report.notes)


def break_config(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return change


def break_tensors(change):
    def rewrite(folder):
        tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
        change(tensors)
        torch.save(tensors, folder / "pytorch_model.bin")

    return rewrite


def cut(name):
    def truncate(folder):
        os.truncate(folder / name, os.path.getsize(folder / name) // 2)

    return truncate


def add_code(folder):
    torch.save({"backbone.embedding.weight": torch.zeros(2, 2), "run": os.system}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (break_config(model_type="llama"), "another kind.*llama.*Give a Mamba-1 or Mamba-2"),
        (break_config(model_type="remamba"), "ReMamba checkpoint already"),
        (break_config(model_type="remamba2"), "ReMamba-2 checkpoint already"),
        (break_config(model_type="memmamba"), "MemMamba checkpoint already"),
        (break_config(hidden_size=28), "has the shape|describe a Mamba-2.*hidden_size"),
        (break_config(hidden_size="wide"), "does not describe a Mamba.*expected int"),
        (break_config(state_size=7), "has the shape"),
        (break_config(num_hidden_layers=3), "missing.*layers.2"),
        (break_config(num_hidden_layers=1), "unknown.*layers.1"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
        (cut("model.safetensors"), "damaged or cut off.*Get the file again"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "PEFT adapter.*--adapter"),
    ],
)
def test_broken_transformers_checkpoints(hf_folder, tmp_path, breaking, message):
    breaking(hf_folder)
    assert_refused(hf_folder, tmp_path, message)


def drop(*names):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        for name in names:
            del tensors[f"backbone.layers.1.mixer.{name}"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


@pytest.mark.parametrize(
    ("family", "breaking", "message"),
    [
        ("mamba", break_config(model_type="mamba2"), "Mamba-2 by its config.json.*those of Mamba-1"),
        ("mamba2", break_config(model_type="mamba"), "Mamba-1 by its config.json.*those of Mamba-2"),
        ("mamba2", break_config(n_groups=4), "has the shape"),
        ("mamba2", break_config(num_heads=8), "does not describe a Mamba-2.*num_heads"),
        ("mamba2", drop("norm.weight"), "1 missing.*norm.weight"),
        ("mamba2", drop("dt_bias", "A_log"), "2 missing.*A_log"),
        ("mamba", drop("dt_proj.bias"), "1 missing.*dt_proj.bias"),
    ],
    indirect=["family"],
)
def test_checkpoints_that_contradict_themselves(hf_folder, tmp_path, breaking, message):
    breaking(hf_folder)
    assert_refused(hf_folder, tmp_path, message)


def test_groups_that_do_not_divide_the_heads(tmp_path):
    make_mamba(family="mamba2", n_groups=3).save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match="no multiple of n_groups=3"):
        convert_checkpoint(str(tmp_path / "hf"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (break_config(ssm_cfg={"layer": "Mamba3"}), "'Mamba3'.*none of"),
        (break_config(ssm_cfg={"layer": "Mamba1", "d_state": 6, "headdim": 64}), "Mamba-1 does not know.*headdim"),
        (break_config(ssm_cfg={"layer": "Mamba2", "dt_rank": 5}), "Mamba-2 does not know.*dt_rank"),
        (break_config(d_model="wide"), "config.json.*(wrong type|describe)"),
        (break_config(ssm_cfg="Mamba2"), "config.json.*wrong type"),
        (break_config(rms_norm=False), "LayerNorm"),
        (break_config(attn_layer_idx=[1]), "attention"),
        (break_config(d_intermediate=64), "MLP"),
        (cut("pytorch_model.bin"), "damaged or cut off"),
        (add_code, "more than tensors, which is refused"),
        (break_config(tie_embeddings=False), None),  # a head that equals the table: nothing is lost
        (break_tensors(lambda t: t["backbone.norm_f.weight"].fill_(float("nan"))), "NaN"),
    ],
)
def test_broken_original_checkpoints(tmp_path, mamba, breaking, message):
    folder = write_original(mamba, tmp_path / "original")
    breaking(folder)
    if message is None:
        assert not convert_checkpoint(str(folder), tmp_path / "out").tied
    else:
        assert_refused(folder, tmp_path, message)


def ssm(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        break_config(ssm_cfg=config["ssm_cfg"] | changes)(folder)

    return change


@pytest.mark.parametrize(
    ("family", "breaking", "message"),
    [
        ("mamba", ssm(layer="Mamba2", headdim=HEAD, dt_rank=None), "dt_rank"),
        ("mamba", break_config(ssm_cfg={"layer": "Mamba2", "headdim": HEAD}), "Mamba-2 by its .*those of Mamba-1"),
        ("mamba2", break_config(ssm_cfg={"d_state": 6}), "Mamba-1 by its .*those of Mamba-2"),
        ("mamba2", ssm(D_has_hdim=True), "D_has_hdim=True"),
        ("mamba2", ssm(rmsnorm=False), "rmsnorm=False"),
        ("mamba2", ssm(norm_before_gate=True), "norm_before_gate=True"),
        ("mamba2", ssm(d_ssm=HIDDEN), "d_ssm=32.*gated MLP"),
        ("mamba2", ssm(headdim=48), "headdim=48"),
        ("mamba2", ssm(headdim="x"), "headdim='x'"),
        ("mamba2", ssm(dt_limit=None), "config.json.*wrong type"),
        ("mamba2", ssm(ngroups=8), "has the shape"),
        ("mamba2", break_config(norm_epsilon=1e-6), "norm_epsilon"),
        ("mamba2", break_tensors(lambda t: t.pop("backbone.layers.1.mixer.D")), "1 missing.*mixer.D"),
        ("mamba2", break_tensors(lambda t: t.update({"backbone.layers.0.mixer.D": torch.ones(64)})), "mixer.D.*the shape"),
    ],
    indirect=["family"],
)
def test_original_settings_that_cannot_be_honoured(tmp_path, mamba, breaking, message):
    folder = write_original(mamba, tmp_path / "original")
    breaking(folder)
    assert_refused(folder, tmp_path, message)


def assert_refused(source, tmp_path, message, **options):
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(str(source), tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_missing_shard(tmp_path, mamba):
    mamba.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    shard = min((tmp_path / "hf").glob("*.safetensors"))
    shard.unlink()
    assert_refused(tmp_path / "hf", tmp_path, f"lacks shards.*{shard.name}")


@pytest.mark.parametrize("source", ["nobody/nothing", "./nothing", "a/b/c"])
def test_no_such_source(tmp_path, source):
    assert_refused(source, tmp_path, "Hub")


def test_only_files_that_are_read_are_downloaded(tmp_path, monkeypatch):
    """Codestral's repository holds its weights a second time, as consolidated.safetensors."""
    patterns = []

    def download(source, revision, allow_patterns):
        patterns.append(allow_patterns)
        return tmp_path

    monkeypatch.setattr(checkpoint_files, "snapshot_download", download)
    assert checkpoint_files.locate("owner/name") == tmp_path
    read = ["config.json", "model-00001-of-00003.safetensors", "adapter_model.safetensors", "tokenizer.model"]
    assert list(filter_repo_objects([*read, "consolidated.safetensors"], allow_patterns=patterns[0])) == read
    assert len(patterns) == 2, "without safetensors the .bin files come next"


def test_local_folder_has_no_revision(hf_folder, tmp_path):
    assert_refused(hf_folder, tmp_path, "no revision", revision="main")


def test_failed_verification_leaves_nothing(hf_folder, tmp_path, monkeypatch):
    """A converter that mixes up two weights is caught by the logits."""
    assemble = convert._assemble

    def swapped(family, tensors, settings):
        first, second = (f"backbone.layers.{layer}.mixer.D" for layer in (0, 1))
        return assemble(family, tensors | {first: tensors[second], second: tensors[first]}, settings)

    monkeypatch.setattr(convert, "_assemble", swapped)
    assert_refused(hf_folder, tmp_path, "Verification failed")


def test_verification_allows_what_rounding_does(tmp_path):
    """A deep random model amplifies rounding; what is allowed follows, but stays far below what a wrong weight does."""
    source = make_mamba(layers=24, hidden_size=96, initializer_range=0.3)
    settings = source.config.to_dict()
    del settings["model_type"]
    tensors = {name: tensor for name, tensor in source.state_dict().items() if name != "lm_head.weight"}
    expected = verification.transformers_reference(PLAIN_FAMILIES["mamba"], settings, tensors)
    shallow = make_mamba()
    assert verification.reference(shallow, verification.transformers_logits).noise < 1e-5 < expected.noise
    source.save_pretrained(tmp_path / "hf")
    report = convert_checkpoint(str(tmp_path / "hf"), tmp_path / "out")
    assert report.checks["plain logits against transformers' Mamba-1"] < expected.tolerance


def test_failed_reload_leaves_nothing(hf_folder, tmp_path, monkeypatch, family):
    """What was written is what is checked, not what was in memory."""
    model_class = PLAIN_FAMILIES[family].model_class
    save = model_class.save_pretrained

    def damaged(self, folder, **options):
        save(self, folder, **options)
        shutil.copyfile(hf_folder / "model.safetensors", folder / "model.safetensors")

    monkeypatch.setattr(model_class, "save_pretrained", damaged)
    assert_refused(hf_folder, tmp_path, "Verification failed.*missing_keys")


def test_existing_output(hf_folder, tmp_path, mamba):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for overwrite, message in ((False, "exists"), (True, "not a checkpoint's folder")):
        with pytest.raises(CheckpointError, match=message):
            convert_checkpoint(str(hf_folder), tmp_path / "out", overwrite=overwrite)
    (tmp_path / "out" / "config.json").write_text("{}")
    convert_checkpoint(str(hf_folder), tmp_path / "out", overwrite=True)
    assert_same_logits(tmp_path / "out", mamba)
    assert not (tmp_path / "out" / "notes.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]
    assert (tmp_path / "out").stat().st_mode & 0o777 == (tmp_path / "hf").stat().st_mode & 0o777
    weights, config = (tmp_path / "out" / "model.safetensors", tmp_path / "hf" / "config.json")
    assert weights.stat().st_mode & 0o777 == config.stat().st_mode & 0o777


def test_source_is_not_overwritten(hf_folder, tmp_path):
    with pytest.raises(CheckpointError, match="holds the source"):
        convert_checkpoint(str(hf_folder), hf_folder, overwrite=True)
    load_mamba(hf_folder)


def test_unwritable_output_comes_before_the_work(hf_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "locate", lambda *_: pytest.fail("the work began before the output was checked"))
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "missing" / "out", tmp_path / "file" / "out"):
        with pytest.raises(CheckpointError, match="no folder"):
            convert_checkpoint(str(hf_folder), output)

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("remamba_hf.conversion.output_folder.tempfile.mkdtemp", refuse)
    with pytest.raises(CheckpointError, match=r"Cannot write.*Permission denied"):
        convert_checkpoint(str(hf_folder), tmp_path / "out")


def test_full_disk(hf_folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("remamba_hf.conversion.output_folder.shutil.disk_usage", lambda _: usage)
    assert_refused(hf_folder, tmp_path, "GB free")
