# SPDX-License-Identifier: Apache-2.0
"""Plain Mamba in both formats becomes ReMamba with the same logits; whatever cannot is refused with nothing written."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig, MambaForCausalLM

from remamba_hf import ReMambaForCausalLM
from remamba_hf.checkpoint_files import CheckpointError
from remamba_hf.conversion import convert, convert_checkpoint, verification

from .conftest import PADDED_VOCABULARY, VOCABULARY, make_mamba, write_original

IDS = torch.randint(VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def assert_same_logits(folder, reference, tolerance=1e-5):
    model = ReMambaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = reference(IDS).logits
    actual = model(IDS, compress_prompt=False).logits
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
    return model


@pytest.mark.smoke
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_format(tmp_path, tied):
    source = make_mamba(tied)
    source.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    report = convert_checkpoint(str(tmp_path / "hf"), tmp_path / "out")
    model = assert_same_logits(tmp_path / "out", source)
    assert model.config.model_type == "remamba"
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
def test_original_format(tmp_path, tied, with_head, config):
    source = make_mamba(tied)
    folder = write_original(source, tmp_path / "original", with_head, **config)
    report = convert_checkpoint(str(folder), tmp_path / "out")
    model = assert_same_logits(tmp_path / "out", source)
    assert model.config.vocab_size == PADDED_VOCABULARY != VOCABULARY
    assert model.config.tie_word_embeddings == tied
    assert "original" in report.kind


def test_original_ssm_settings(tmp_path):
    source = make_mamba(expand=1, conv_kernel=3, use_bias=True, use_conv_bias=False)
    ssm = {"d_state": 6, "dt_rank": 5, "expand": 1, "d_conv": 3, "bias": True, "conv_bias": False, "layer": "Mamba1"}
    folder = write_original(source, tmp_path / "original", ssm_cfg=ssm)
    convert_checkpoint(str(folder), tmp_path / "out")
    assert_same_logits(tmp_path / "out", source)


def test_legacy_bin_without_memory_map(tmp_path, mamba):
    folder = write_original(mamba, tmp_path / "original")
    torch.save(mamba.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert_checkpoint(str(folder), tmp_path / "out")
    assert_same_logits(tmp_path / "out", mamba)


def test_half_precision_keeps_some_weights_in_float32(hf_folder, tmp_path, mamba):
    report = convert_checkpoint(str(hf_folder), tmp_path / "out", dtype="bfloat16")
    kept = ("A_log", ".D", "dt_proj.bias", "adaptation.bias")
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
    torch.testing.assert_close(compressor.query[2].weight, in_proj[3 * size :], rtol=0, atol=0)
    assert any("paper's start" in note for note in report.notes)


def test_settings_are_written_and_checked_first(hf_folder, tmp_path, monkeypatch):
    convert_checkpoint(str(hf_folder), tmp_path / "out", settings={"compression_span": 0.4})
    assert ReMambaForCausalLM.from_pretrained(tmp_path / "out").config.compression_span == 0.4
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
        (break_config(model_type="llama"), "another kind.*llama.*Give a Mamba-1"),
        (break_config(model_type="mamba2"), "Mamba-2"),
        (break_config(model_type="remamba"), "ReMamba checkpoint already"),
        (break_config(hidden_size=28), "has the shape"),
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


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (break_config(ssm_cfg={"layer": "Mamba2"}), "Mamba-2.*Mamba-1"),
        (break_config(ssm_cfg={"d_state": 6, "headdim": 64}), "headdim"),
        (break_config(rms_norm=False), "LayerNorm"),
        (break_config(attn_layer_idx=[1]), "attention"),
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


def test_local_folder_has_no_revision(hf_folder, tmp_path):
    assert_refused(hf_folder, tmp_path, "no revision", revision="main")


def test_failed_verification_leaves_nothing(hf_folder, tmp_path, monkeypatch):
    """A converter that mixes up two weights is caught by the logits."""
    assemble = convert._assemble

    def swapped(tensors, settings):
        first, second = (f"backbone.layers.{layer}.mixer.D" for layer in (0, 1))
        return assemble(tensors | {first: tensors[second], second: tensors[first]}, settings)

    monkeypatch.setattr(convert, "_assemble", swapped)
    assert_refused(hf_folder, tmp_path, "Verification failed")


def test_verification_allows_what_rounding_does(tmp_path):
    """A deep random model amplifies rounding; what is allowed follows, but stays far below what a wrong weight does."""
    source = make_mamba(layers=24, hidden_size=96, initializer_range=0.3)
    settings = source.config.to_dict()
    del settings["model_type"]
    tensors = {name: tensor for name, tensor in source.state_dict().items() if name != "lm_head.weight"}
    expected = verification.transformers_reference(settings, tensors)
    shallow = make_mamba()
    assert verification.reference(shallow, verification.transformers_logits).noise < 1e-5 < expected.noise
    source.save_pretrained(tmp_path / "hf")
    report = convert_checkpoint(str(tmp_path / "hf"), tmp_path / "out")
    assert report.checks["plain logits against transformers' Mamba"] < expected.tolerance


def test_failed_reload_leaves_nothing(hf_folder, tmp_path, monkeypatch):
    """What was written is what is checked, not what was in memory."""
    save = ReMambaForCausalLM.save_pretrained

    def damaged(self, folder, **options):
        save(self, folder, **options)
        shutil.copyfile(hf_folder / "model.safetensors", folder / "model.safetensors")

    monkeypatch.setattr(ReMambaForCausalLM, "save_pretrained", damaged)
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
    MambaForCausalLM.from_pretrained(hf_folder)


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
