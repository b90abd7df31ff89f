# SPDX-License-Identifier: Apache-2.0
"""A plain Mamba-1 becomes a MemMamba with an untrained memory, and keeps its logits; what it has no use for is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modeling_tests.conversion.conftest import PADDED_VOCABULARY, make_mamba, write_original
from remamba_hf import MemMambaForCausalLM
from remamba_hf.conversion import convert, convert_checkpoint, verification
from remamba_hf.modeling.configuration_memmamba import FUSIONS

LAYERS = 5  # of which one reads the layers below
# Twice as long as a chunk of the default size, so that tokens read notes.
IDS = torch.randint(PADDED_VOCABULARY, (2, 130), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def mamba():
    return make_mamba(layers=LAYERS)


@pytest.fixture
def source(mamba, tmp_path):
    mamba.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@torch.no_grad()
def assert_same_logits(folder, reference):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model) is MemMambaForCausalLM
    expected, output = reference(IDS).logits, model(IDS, output_notes=True)
    assert all((positions >= 0).any() for positions in output.note_positions), "nothing could be read"
    assert (output.logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    return model


def memory_of(folder):
    return {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if ".memory." in name}


@pytest.mark.smoke
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("write", [None, write_original], ids=["transformers", "original"])
def test_logits_are_the_source_s(tmp_path, tied, write):
    mamba = make_mamba(tied, layers=LAYERS)
    folder = tmp_path / "source"
    if write is None:
        mamba.save_pretrained(folder)
    else:
        write(mamba, folder, tie_embeddings=tied)
    report = convert_checkpoint(str(folder), tmp_path / "out", to="memmamba")
    model = assert_same_logits(tmp_path / "out", mamba)
    assert model.config.tie_word_embeddings == report.tied == tied
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert list(report.checks) == ["plain logits against transformers' Mamba-1", "the folder, loaded again"]
    assert max(report.checks.values()) < 1e-5
    assert any("UNTRAINED but harmless" in note for note in report.notes)
    assert not any("compressor" in note for note in report.notes)
    for name, tensor in mamba.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_starts_from_the_source(source, mamba, tmp_path, fusion):
    settings = dict(fusion=fusion, read_threshold=0.2, note_size=12, note_heads=3, chunk_size=4, cross_layer_period=2)
    convert_checkpoint(str(source), tmp_path / "out", to="memmamba", settings=settings)
    config = assert_same_logits(tmp_path / "out", mamba).config
    assert {name: getattr(config, name) for name in settings} == settings
    assert memory_of(tmp_path / "out")["backbone.layers.0.memory.note.weight"].shape == (12, config.hidden_size)


def test_the_memory_is_new_and_always_the_same(source, tmp_path):
    for name, seed in (("one", 1), ("other", 2)):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        convert_checkpoint(str(source), tmp_path / name, to="memmamba")
        assert torch.equal(torch.get_rng_state(), before)
    one, other = memory_of(tmp_path / "one"), memory_of(tmp_path / "other")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    for name, tensor in one.items():
        starts_at_zero = name.endswith(("output.weight", "bias", "sink"))
        assert bool(tensor.any()) != starts_at_zero, name
    notes = [one[f"backbone.layers.{layer}.memory.note.weight"] for layer in range(LAYERS)]
    assert not torch.equal(notes[0], notes[1])


def test_half_precision(source, mamba, tmp_path):
    report = convert_checkpoint(str(source), tmp_path / "out", to="memmamba", dtype="bfloat16")
    assert report.dtype == "bfloat16"
    kept = ("A_log", ".D", "dt_proj.bias", "write_score.weight", "write_score.bias", "sink")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert tensor.dtype == (torch.float32 if name.endswith(kept) else torch.bfloat16), name
    for name, parameter in mamba.named_parameters():
        parameter.data = parameter.to(torch.bfloat16).float() if not name.endswith(kept) else parameter
    assert_same_logits(tmp_path / "out", mamba)


def assert_refused(source, tmp_path, message, **options):
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(str(source), tmp_path / "out", **{"to": "memmamba", **options})
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(initialize_compressor=True), "MemMamba has no compressor.*--init-compressor"),
        (dict(adapter="adapter"), "Adapters of ReMamba.*MemMamba.*leave out --adapter"),
        (dict(settings={"compression_span": 0.3}), "MemMamba has no settings.*compression_span.*--to remamba"),
        (dict(settings={"note_sise": 8}), "MemMamba has no settings.*note_sise.*spelling"),
        (dict(settings={"note_size": 7}), "note_size=7 is no multiple of note_heads=4"),
        (dict(settings={"pool_size": 0}), "pool_size.*at least 1"),
        (dict(settings={"note_size": 8}, to=None), "no settings.*note_size.*--to memmamba"),
        (dict(settings={"note_size": 8}, to="remamba"), "ReMamba has no settings.*note_size.*--to memmamba"),
    ],
    ids=str,
)
def test_refused_before_the_source_is_looked_for(source, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(convert, "locate", lambda *_: pytest.fail("looked for the source first"))
    assert_refused(source, tmp_path, message, **options)


def test_settings_of_another_architecture_s_family(source, tmp_path):
    """Mamba-2's chunks are not MemMamba's, and a ReMamba has none."""
    assert_refused(source, tmp_path, r"ReMamba has no settings \['chunk_size'\]", to=None, settings={"chunk_size": 32})


def test_sources_that_cannot_become_one(tmp_path):
    make_mamba(family="mamba2").save_pretrained(tmp_path / "mamba2")
    assert_refused(tmp_path / "mamba2", tmp_path, "becomes 'remamba2', not 'memmamba'.*give a Mamba-1")
    make_mamba().save_pretrained(tmp_path / "mamba")
    convert_checkpoint(str(tmp_path / "mamba"), tmp_path / "memmamba", to="memmamba")
    assert_refused(tmp_path / "memmamba", tmp_path, "MemMamba checkpoint already")


def test_a_memory_that_changes_the_logits_is_found(source, tmp_path, monkeypatch):
    """Notes are read in the pass that is compared, although its length is less than a chunk of the default size."""
    assemble = convert._assemble

    def loud(*args):
        model = assemble(*args)
        torch.nn.init.ones_(model.backbone.layers[0].memory.token_reader.output.weight)
        return model

    monkeypatch.setattr(convert, "_assemble", loud)
    assert_refused(source, tmp_path, "Verification failed.*Mamba-1 and of the converted model")


def test_a_memory_that_was_written_wrong_is_found(source, tmp_path, monkeypatch):
    """The logits do not show it."""
    save = MemMambaForCausalLM.save_pretrained

    def damaged(self, folder, **options):
        save(self, folder, **options)
        tensors = load_file(folder / "model.safetensors")
        first, second = (f"backbone.layers.{layer}.memory.note.weight" for layer in (0, 1))
        tensors[first], tensors[second] = tensors[second], tensors[first]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(MemMambaForCausalLM, "save_pretrained", damaged)
    assert_refused(source, tmp_path, "Verification failed.*memory.note.weight")


def test_verification_leaves_the_configuration_as_it_was(source, tmp_path):
    convert_checkpoint(str(source), tmp_path / "out", to="memmamba")
    model = MemMambaForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.chunk_size == 64
    verification.plain_logits(model)
    assert model.config.chunk_size == 64
