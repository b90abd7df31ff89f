# SPDX-License-Identifier: Apache-2.0
"""The command: what it prints, what it refuses, and that nothing is half-written."""

import contextlib
import functools
import inspect
import os
import re
import shutil
import sys
import types

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from remamba_hf import MemMambaConfig, MemMambaForCausalLM
from remamba_hf.checkpoint_files import CheckpointError
from remamba_hf.cli import main
from remamba_hf.families import ALL_FAMILIES, FAMILIES
from remamba_hf.modeling import optional_kernels
from remamba_hf.notes_picture import layer_groups, plot_notes
from remamba_hf.reading import LayerNotes, load_for_reading, plot_kept, question_prompt, read_and_answer
from remamba_hf.training.book_tokens import train_book_tokenizer

DOCUMENT = "It is a truth universally acknowledged, that a single man must be in want of a wife.\n" * 12


# A family's tiny configuration, and the channels of its convolution.
COMPRESSION = dict(compression_span=0.5, compression_ratio=0.1)
TINY = {
    "remamba": (dict(state_size=4, **COMPRESSION), 48),
    "remamba2": (dict(state_size=4, num_heads=6, head_dim=8, n_groups=2, **COMPRESSION), 48 + 2 * 2 * 4),
    "memmamba": (dict(state_size=4, note_size=8, note_heads=2, pool_size=5, chunk_size=16, cross_layer_period=1), 48),
}


def make_checkpoint(model_type, folder):
    torch.manual_seed(3)
    tokenizer = train_book_tokenizer([DOCUMENT], 280)
    family = ALL_FAMILIES[model_type]
    model = family.model_class(
        family.config_class(vocab_size=280, hidden_size=24, num_hidden_layers=2, **TINY[model_type][0])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_reader." in name:  # what is read counts, and some notes are read more than others
                parameter.add_(torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=list(FAMILIES))
def checkpoint(request, tmp_path_factory):
    """Of a model that compresses prompts."""
    return make_checkpoint(request.param, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def memmamba(tmp_path_factory):
    return make_checkpoint("memmamba", tmp_path_factory.mktemp("memmamba"))


@pytest.fixture(scope="module", params=list(ALL_FAMILIES))
def any_checkpoint(request, tmp_path_factory):
    return make_checkpoint(request.param, tmp_path_factory.mktemp("any"))


@pytest.fixture
def broken(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "broken")


def generate(checkpoint, *options, prompt=DOCUMENT):
    return main(["generate", "--model", str(checkpoint), "--prompt", prompt, "--max-new-tokens", "8", *options])


def test_generate_prints_the_answer_alone_on_stdout(any_checkpoint, capsys):
    model, tokenizer = load_for_reading(str(any_checkpoint))
    kept = "kept " if ALL_FAMILIES[model.config.model_type].compresses else "notes "
    ids = tokenizer(question_prompt(DOCUMENT, "Who?"), return_tensors="pt")["input_ids"]
    new = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    expected = tokenizer.decode(new, skip_special_tokens=True)
    capsys.readouterr()
    for stream in ("--stream", "--no-stream"):
        assert generate(any_checkpoint, "--question", "Who?", stream) == 0
        out, err = capsys.readouterr()
        assert out.strip() == expected.strip()
        for word in ("prompt ", kept, "prefill ", "decode ", "state ", "cpu, float32"):
            assert word in err
    assert f"{ids.shape[1]:,} tokens" in err


def test_generate_settings_reach_the_model(checkpoint, capsys):
    assert (
        generate(checkpoint, "--compression-span", "0.25", "--compression-ratio", "0.5", "--compression-start", "0.1") == 0
    )
    kept = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("kept"))
    assert generate(checkpoint, "--no-compression") == 0
    assert "not compressed" in capsys.readouterr().err
    assert generate(checkpoint, "--compare-plain", "--temperature", "1.5", "--seed", "5") == 0
    err = capsys.readouterr().err
    assert err.count("prefill ") == 2
    assert "not compressed" in err
    model, tokenizer = load_for_reading(str(checkpoint))
    reading = read_and_answer(
        model, tokenizer, DOCUMENT, compression_start=0.1, compression_span=0.25, compression_ratio=0.5, max_new_tokens=2
    )
    assert f"{len(reading.positions):,} of the {reading.window.length:,} in the window" in kept


def test_prompt_file_and_stdin(any_checkpoint, tmp_path, capsys, monkeypatch):
    (tmp_path / "book.txt").write_text(DOCUMENT)
    answers = []
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(read=lambda: DOCUMENT))
    for source in (str(tmp_path / "book.txt"), "-"):
        arguments = ["generate", "--model", str(any_checkpoint), "--prompt-file", source, "--max-new-tokens", "8"]
        assert main(arguments) == 0
        answers.append(capsys.readouterr().out)
    assert generate(any_checkpoint) == 0
    assert answers == [capsys.readouterr().out] * 2


def test_reading_tells_what_was_kept(checkpoint, tmp_path):
    pytest.importorskip("matplotlib")
    model, tokenizer = load_for_reading(str(checkpoint))
    calls = []
    reading = read_and_answer(
        model,
        tokenizer,
        DOCUMENT,
        "Who?",
        max_new_tokens=5,
        prefill_chunk_length=64,
        prefill_progress=lambda *counts: calls.append(counts),
    )
    ids = tokenizer(question_prompt(DOCUMENT, "Who?"), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(ids, compress_prompt=True)
    assert reading.positions == expected.compressed_positions[0].tolist()
    assert reading.scores == pytest.approx(expected.compression_scores[0].tolist(), abs=1e-5)
    assert reading.prompt_tokens == ids.shape[1]
    assert reading.new_tokens == 5
    assert reading.decode_rate > 0
    assert all(reading.window.start <= position < reading.window.stop for position in reading.positions)
    assert sum(passage.text.count("[") for passage in reading.passages) == len(reading.passages)
    assert {p for passage in reading.passages for p in range(passage.start, passage.stop)} >= set(reading.positions)
    config = model.config
    convolved = TINY[config.model_type][1]
    floats = config.num_hidden_layers * (config.intermediate_size * config.state_size + convolved * config.conv_kernel)
    assert reading.state_bytes == 4 * floats
    assert calls[-1][0] == calls[-1][1]
    assert not model._forward_hooks
    plot_kept(reading, tmp_path / "kept.png")
    plot_kept(reading, tmp_path / "kept.svg")
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.png", "kept.svg"]
    plain = read_and_answer(model, tokenizer, DOCUMENT, compress_prompt=False, max_new_tokens=1)
    assert plain.decode_rate is None
    with pytest.raises(ValueError, match="Nothing was compressed"):
        plot_kept(plain, tmp_path / "plain.png")


def test_watching_leaves_nothing_behind_and_no_hook_that_forbids_captured_steps(any_checkpoint):
    model, tokenizer = load_for_reading(str(any_checkpoint))
    hooked = []

    def progress(done, total):
        hooked.append(any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()))

    for own in (False, True):
        if own:  # as of accelerate
            model.forward = functools.wraps(model.forward)(functools.partial(type(model).forward, model))
        before = vars(model).get("forward")
        with contextlib.suppress(ValueError):
            read_and_answer(model, tokenizer, "A text.", max_new_tokens=0)
        reading = read_and_answer(model, tokenizer, "A text. " * 50, max_new_tokens=3, prefill_progress=progress)
        assert reading.new_tokens == 3
        assert vars(model).get("forward") is before
    assert hooked
    assert not any(hooked)


def test_reading_tells_what_was_noted(memmamba, tmp_path):
    """As one pass over the whole prompt gives it, whatever the chunks that it was read in."""
    pytest.importorskip("matplotlib")
    model, tokenizer = load_for_reading(str(memmamba))
    calls = []
    reading = read_and_answer(
        model,
        tokenizer,
        DOCUMENT,
        "Who?",
        max_new_tokens=5,
        prefill_chunk_length=50,
        prefill_progress=lambda *counts: calls.append(counts),
    )
    ids = tokenizer(question_prompt(DOCUMENT, "Who?"), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(ids, output_notes=True)
    config = model.config
    assert len(reading.notes) == config.num_hidden_layers
    for layer, notes in enumerate(reading.notes):
        assert notes.positions == expected.note_positions[layer][0].tolist()
        assert notes.scores == pytest.approx(expected.note_scores[layer][0].tolist(), abs=1e-5)
        assert notes.reads == pytest.approx(expected.note_reads[layer][0].tolist(), abs=1e-4)
        assert len(set(notes.positions)) == config.pool_size
        assert 0 < sum(notes.reads) < 1
    largest = {}
    for notes in reading.notes:
        for position, read in zip(notes.positions, notes.reads, strict=True):
            largest[position] = max(read, largest.get(position, 0))
    best = max(largest, key=largest.get)
    assert largest[best] > 0.01
    assert reading.passages[0].start <= best < reading.passages[0].stop
    assert reading.passages[0].score == largest[best]
    assert {p for passage in reading.passages for p in range(passage.start, passage.stop)} >= set(largest)
    assert (reading.positions, reading.scores, reading.window.length) == ([], [], 0)
    assert f"{len(largest)} tokens; most read: {largest[best]:.2f}" in reading.report()
    memory = config.chunk_size * (config.note_size + 1) + (config.pool_size + 1) * (config.note_size + 3)
    mixer = config.intermediate_size * (config.state_size + config.conv_kernel)
    assert reading.state_bytes == 4 * config.num_hidden_layers * (mixer + memory)
    assert calls[-1] == (ids.shape[1],) * 2
    assert not model._forward_hooks
    assert not model._forward_pre_hooks

    plot_notes(reading, tmp_path / "notes.png")
    plot_notes(reading, tmp_path / "notes.svg")
    assert (tmp_path / "notes.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.png", "notes.svg"]
    with pytest.raises(ValueError, match="Nothing was compressed"):
        plot_kept(reading, tmp_path / "kept.png")
    short = read_and_answer(model, tokenizer, "a", max_new_tokens=1)
    assert not any(notes.positions for notes in short.notes)
    assert "0 in 2 layers, of 0 tokens" in short.report()
    with pytest.raises(ValueError, match=r"pools were empty.*Give a longer document"):
        plot_notes(short, tmp_path / "short.png")


def test_picture_of_many_layers_and_of_empty_ones(memmamba, tmp_path):
    pytest.importorskip("matplotlib")
    assert [list(group) for group in layer_groups(2)] == [[0], [1]]
    for layers in (6, 7, 24, 25, 64):
        groups = layer_groups(layers)
        assert [layer for group in groups for layer in group] == list(range(layers))
        assert len(groups) <= 6
        assert len({len(group) for group in groups[:-1]}) == 1
    reading = read_and_answer(*load_for_reading(str(memmamba)), DOCUMENT, max_new_tokens=1)
    reading.notes = [*reading.notes, LayerNotes([], [], []), LayerNotes([3], [1e-9], [0.0])] * 6
    plot_notes(reading, tmp_path / "notes.svg")
    picture = (tmp_path / "notes.svg").read_text()
    for words in ("layers 0 to 3", "layers 20 to 23"):
        assert words in picture, words


def test_question_prompt_is_that_of_the_recall_task():
    from remamba_hf.training.recall_data import QUESTIONS

    head, tail = QUESTIONS[0]
    assert question_prompt("Text.\n", f"{head.removeprefix('Question: ')} Ann{tail.removesuffix(chr(10) + 'Answer:')}") == (
        f"Text.\n\n{head} Ann{tail}"
    )


def cut(folder):
    os.truncate(folder / "model.safetensors", 3000)


def remove(*names):
    return lambda folder: [os.remove(folder / name) for name in names]


def replace_by(model_class, config):
    def replace(folder):
        shutil.rmtree(folder)
        model_class(config).save_pretrained(folder)

    return replace


def test_generate_draws_what_was_noted(memmamba, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert generate(memmamba, "--plot", str(tmp_path / "notes.pdf")) == 0
    assert (tmp_path / "notes.pdf").read_bytes().startswith(b"%PDF")
    assert f"plot     {tmp_path / 'notes.pdf'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--compression-span", "0.3"], "--compression-span"),
        (["--compression-start", "0"], "--compression-start"),
        (["--no-compression"], "--no-compression"),
        (["--compare-plain", "--compression-ratio", "0.5"], "--compression-ratio, --compare-plain"),
    ],
)
def test_nothing_to_compress(memmamba, capsys, monkeypatch, options, named):
    monkeypatch.setattr("remamba_hf.reading.load_for_reading", lambda *_: pytest.fail("loaded the weights first"))
    assert generate(memmamba, *options) == 1
    out, err = capsys.readouterr()
    assert not out
    assert f"is a MemMamba, which compresses no prompts: leave out {named}." in err


LLAMA = LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)


PLAIN_SIZES = dict(vocab_size=30, hidden_size=16, num_hidden_layers=2, state_size=4)
PLAIN = {
    "remamba": (MambaForCausalLM, MambaConfig(**PLAIN_SIZES)),
    "remamba2": (Mamba2ForCausalLM, Mamba2Config(**PLAIN_SIZES, num_heads=4, head_dim=8, n_groups=2, chunk_size=8)),
}


def drop_a_tensor(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["backbone.compressor.key.0.bias"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (cut, "damaged or cut off"),
        (drop_a_tensor, "lacks 1 of the model's tensors"),
        (remove("model.safetensors"), "no weights"),
        (remove("config.json"), "no config.json"),
        (remove("tokenizer.json"), "no tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer of"),
        (replace_by(LlamaForCausalLM, LLAMA), "model_type is 'llama'"),
        (replace_by(*PLAIN["remamba"]), "Convert it first: remamba convert"),
        (replace_by(*PLAIN["remamba2"]), "Convert it first: remamba convert"),
        (shutil.rmtree, "no folder"),
    ],
)
def test_broken_checkpoints(broken, capsys, breaking, message):
    breaking(broken)
    assert generate(broken) == 1
    out, err = capsys.readouterr()
    assert not out
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compression-span", "1.5"], "compression_span"),
        (["--compression-start", "0.8"], "start + compression_span"),
        (["--device", "cuda:7"], "no CUDA device"),
        (["--device", "abacus"], "no device 'abacus'"),
        (["--revision", "main"], "local folder"),
        (["--plot", "missing/kept.png"], "no folder"),
        (["--plot", "kept.doc"], "should end in one of"),
        (["--plot", "kept.png", "--no-compression"], "--plot shows what was kept"),
    ],
)
def test_bad_options(checkpoint, capsys, options, message):
    if torch.cuda.is_available() and "cuda:7" in options:
        pytest.skip("there is a CUDA device")
    if "--no-compression" in options:
        pytest.importorskip("matplotlib")
    assert generate(checkpoint, *options) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"), [(b"\xff\xfe\x00", "not a text file"), (b" \n", "empty"), (None, "Cannot read")]
)
def test_bad_prompt_files(checkpoint, tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "book.txt").write_bytes(content)
    assert main(["generate", "--model", str(checkpoint), "--prompt-file", str(tmp_path / "book.txt")]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--max-new-tokens", "0"], ["--temperature", "-1"], ["--temperature", "nan"], ["--what"]]
)
def test_usage_errors(checkpoint, capsys, options):
    with pytest.raises(SystemExit) as stop:
        generate(checkpoint, *options)
    assert stop.value.code == 2


def test_debug_shows_the_traceback(broken):
    cut(broken)
    with pytest.raises(CheckpointError):
        main(["--debug", "generate", "--model", str(broken), "--prompt", "a"])


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_convert(family, tmp_path, capsys):
    model_class, config = PLAIN[family.model_type]
    model_class(config).save_pretrained(tmp_path / "mamba")
    arguments = ["convert", str(tmp_path / "mamba"), str(tmp_path / "out")]
    assert main([*arguments, "--init-compressor", "--dtype", "bfloat16", "--compression-span", "0.3"]) == 0
    out = capsys.readouterr().out
    for words in (family.plain_name, "bfloat16", "verified: plain logits", "loaded again", "UNTRAINED", "no tokenizer"):
        assert words in out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model) is family.model_class
    assert model.dtype == torch.bfloat16
    assert model.config.compression_span == 0.3
    assert main(arguments) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--to", family.model_type]) == 0
    other = next(name for name in FAMILIES if name != family.model_type)
    assert main([*arguments, "--overwrite", "--to", other]) == 1
    assert f"not '{other}'" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "twice")]) == 1
    assert "already" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mamba", "out"]


def test_convert_to_memmamba(tmp_path, capsys):
    model_class, config = PLAIN["remamba"]
    model_class(config).save_pretrained(tmp_path / "mamba")
    arguments = ["convert", str(tmp_path / "mamba"), str(tmp_path / "out"), "--to", "memmamba"]
    settings = dict(note_size=8, pool_size=7, recency_weight=0.5, write_rule="fifo", cross_layer_period=0)
    given = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    for refused, message in (
        (["--init-compressor"], "MemMamba has no compressor"),
        (["--adapter", str(tmp_path)], "leave out --adapter"),
        (["--compression-span", "0.3"], "MemMamba has no settings ['compression_span']"),
        (["--note-size", "7"], "no multiple of note_heads"),
        (["--write-rule", "best"], "write_rule must be one of"),
    ):
        assert main([*arguments, *refused]) == 1
        assert message in capsys.readouterr().err
    assert main([*arguments, *given]) == 0
    out = capsys.readouterr().out
    for words in ("Mamba-1", "verified: plain logits", "loaded again", "UNTRAINED but harmless", "no tokenizer"):
        assert words in out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model) is MemMambaForCausalLM
    assert {name: getattr(model.config, name) for name in settings} == settings
    assert main(["convert", str(tmp_path / "mamba"), str(tmp_path / "two"), "--pool-size", "7"]) == 1
    assert "--to memmamba" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mamba", "out"]


def test_every_setting_of_the_memory_can_be_given(capsys):
    own = set(MemMambaConfig.__annotations__) - {"model_type", "plain_model_type", "family", "class_prefix"}
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    text = capsys.readouterr().out
    missing = [name for name in own - {"keys_to_ignore_at_inference"} if f"--{name.replace('_', '-')}" not in text]
    assert not missing


def test_card_without_results(memmamba, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["card", str(memmamba)])
    assert main(["card", str(memmamba), "--results", str(memmamba / "config.json")]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert "remamba card: " in err
    assert "config.json holds no results for a card" in err
    assert not (memmamba / "README.md").exists()


def test_doctor_without_kernels(capsys, monkeypatch):
    monkeypatch.setattr(optional_kernels, "load_kernel", lambda name: (None, "OSError: undefined symbol\n  xyz"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name, kernel in optional_kernels.KERNELS.items():
        line = next(line for line in out.splitlines() if line.startswith(f"{name} "))
        assert "not usable" in line
        assert "undefined symbol xyz" in line
        assert kernel.package in line
        users = [family.name for family in ALL_FAMILIES.values() if name in family.kernels]
        assert f"for {', '.join(users)})" in line
        assert users
    assert "torch operators do the same work" in out
    assert "pip install" in out
    assert "Test GPU" in out


def test_families_name_the_kernels_that_their_code_asks_for():
    """The modules that a family's model is made of, and the names that they hand to `usable_kernel`."""

    def asked_for(module, seen):
        seen.add(module.__name__)
        source = inspect.getsource(module)
        names = set(re.findall(r'usable_kernel\(\s*"(\w+)"', source))
        for part in re.findall(r"^from \.(\w+) import", source, re.MULTILINE):
            other = sys.modules[f"{module.__package__}.{part}"]
            if other.__name__ not in seen:
                names |= asked_for(other, seen)
        return names

    for family in ALL_FAMILIES.values():
        assert asked_for(sys.modules[family.model_class.__module__], set()) == set(family.kernels), family.name
    assert {name for family in ALL_FAMILIES.values() for name in family.kernels} == set(optional_kernels.KERNELS)


def test_doctor_with_kernels(capsys, monkeypatch):
    monkeypatch.setattr(optional_kernels, "load_kernel", lambda name: (print, ""))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "not usable" not in out
    assert f"torch           {torch.__version__}" in out
    state = "active" if torch.cuda.is_available() else "idle without a CUDA device"
    assert out.count(state) == len(optional_kernels.KERNELS)
