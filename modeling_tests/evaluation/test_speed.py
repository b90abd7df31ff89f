# SPDX-License-Identifier: Apache-2.0
"""`remamba eval speed`, and the clock behind it."""

import json
import mmap
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_tests.modeling.tiny_models import tiny_memmamba, tiny_model
from remamba_hf.cli import main
from remamba_hf.evaluation import speed, timing

VOCABULARY = 300


@pytest.fixture(scope="module")
def folders(plain_folder, tmp_path_factory):
    """One checkpoint of every kind."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(3)
    sizes = dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64, eos_token_id=2)).save_pretrained(root / "llama")
    tiny_model(torch.float32, vocab_size=VOCABULARY).save_pretrained(root / "remamba")
    tiny_memmamba(torch.float32, vocab_size=VOCABULARY).save_pretrained(root / "memmamba")
    found = {name: root / name for name in ("llama", "remamba", "memmamba")}
    return {**found, "mamba": plain_folder}


def run(folders, names, output, *more):
    models = [str(folders[name]) for name in names]
    sizes = ("--lengths", "24", "48", "--batch-sizes", "1", "2", "--new-tokens", "6", "--repeats", "2")
    return main(["eval", "speed", "--model", *models, "--device", "cpu", "--output", str(output), *sizes, *more])


def test_every_kind_of_model_is_measured(folders, tmp_path, capsys):
    output = tmp_path / "new" / "speed.json"
    assert run(folders, folders, output) == 0
    results = json.loads(output.read_text())
    found = {(cell["model"], cell["way"], cell["rows"], cell["length"]) for cell in results["speed"]}
    ways = {"llama": [""], "memmamba": [""], folders["mamba"].name: [""], "remamba": ["compression on", "compression off"]}
    sizes = [(rows, length) for rows in (1, 2) for length in (24, 48)]
    assert found == {(name, way, *size) for name, several in ways.items() for way in several for size in sizes}
    assert len(found) == len(results["speed"])
    for cell in results["speed"]:
        for name in ("prefill", "step"):
            low, high = cell[f"{name}_range_s"]
            assert 0 < low <= cell[f"{name}_s"] <= high < 60
        assert cell["repeats"] == 2
    windows = {cell["window"] for cell in results["speed"] if cell["way"] == "compression on"}
    assert windows == {12, 24}, "half of the prompt"
    states = {(cell["model"], cell["rows"], cell["length"]): cell["state_bytes"] for cell in results["speed"]}
    for rows in (1, 2):
        assert states["memmamba", rows, 24] == states["memmamba", rows, 48] == rows * states["memmamba", 1, 24]
    assert states["llama", 1, 48] == 2 * 2 * 2 * 8 * (48 + 5) * 4, "keys and values of two layers and heads"
    config = tiny_model(torch.float32).config
    mixer = config.intermediate_size * (config.conv_kernel + config.state_size)
    assert states["remamba", 1, 24] == 4 * config.num_hidden_layers * mixer
    assert {"torch", "transformers", "remamba_hf", "device", "threads"} <= set(results["environment"])
    assert results["date"].endswith("+00:00")
    identity = results["description"]["models"]["llama"]["identity"]
    assert len(identity["sha256"]) == 64
    out = capsys.readouterr().out
    assert out == output.with_suffix(".md").read_text()
    for line in ("| prefill, s, by tokens | 24 | 48 |", "| decoding, ms a token, by tokens |", "| state, MB, by tokens |"):
        assert line in out
    assert "| remamba, compression on, batch 2 |" in out


def test_run_goes_on_and_refuses_other_settings(folders, tmp_path, capsys, monkeypatch):
    output = tmp_path / "speed.json"
    measure = speed.measure_cell
    asked = []

    def interrupted(checkpoint, model, cell, options, settings):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(cell)
        return measure(checkpoint, model, cell, options, settings)

    monkeypatch.setattr(speed, "measure_cell", interrupted)
    assert run(folders, ["remamba"], output) == 130
    before = json.loads(output.read_text())["speed"]
    assert len(before) == 3
    del asked[:]
    monkeypatch.setattr(speed, "measure_cell", lambda *given: asked.append(given[2]) or measure(*given))
    assert run(folders, ["remamba"], output) == 0
    assert json.loads(output.read_text())["speed"][:3] == before
    assert len(asked) == 5
    capsys.readouterr()
    assert run(folders, ["remamba"], output, "--new-tokens", "9") == 1
    assert "other settings (settings.new_tokens: 6 there, 9 now)" in capsys.readouterr().err
    assert run(folders, ["remamba"], output, "--no-compress") == 1
    assert "(description.models.remamba.ways.compression on: {" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory: 1 GB")]
)
def test_what_does_not_fit_is_recorded(folders, tmp_path, capsys, monkeypatch, error):
    generate = timing.generate_tokens

    def full(model, ids, *given, **options):
        if ids.shape == (2, 48):
            raise error
        return generate(model, ids, *given, **options)

    monkeypatch.setattr(timing, "generate_tokens", full)
    output = tmp_path / "speed.json"
    assert run(folders, ["memmamba"], output) == 0
    cells = {(cell["rows"], cell["length"]): cell for cell in json.loads(output.read_text())["speed"]}
    assert cells[2, 48]["error"] == speed.OUT_OF_MEMORY
    assert [shape for shape, cell in cells.items() if "error" in cell] == [(2, 48)]
    assert "| out of memory |" in capsys.readouterr().out


def test_other_failures_end_the_run(folders, tmp_path, monkeypatch):
    def broken(*given, **options):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(timing, "generate_tokens", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        speed.main(["--model", str(folders["memmamba"]), "--device", "cpu", "--output", str(tmp_path / "speed.json")])


def test_prompts_beyond_the_positions_are_not_read(folders, tmp_path):
    assert run(folders, ["llama"], tmp_path / "speed.json", "--lengths", "24", "59", "--batch-sizes", "1") == 0
    first, second = json.loads((tmp_path / "speed.json").read_text())["speed"]
    assert "error" not in first
    assert second["error"] == "64 positions, needs 65"


def test_errors_are_shown_where_there_is_nothing_else(folders, tmp_path, capsys):
    output = tmp_path / "speed.json"
    assert run(folders, ["llama"], output, "--lengths", "59", "--batch-sizes", "1") == 1
    out, err = capsys.readouterr()
    assert out == output.with_suffix(".md").read_text()
    assert "| prefill, s, by tokens | 59 |\n|---|---|\n| llama | 64 positions, needs 65 |\n" in out
    assert "decoding" not in out
    assert "nothing could be measured (64 positions, needs 65): give shorter --lengths" in err


@pytest.mark.parametrize("option", ["--output", "--plot"])
def test_files_that_cannot_be_written_are_found_first(folders, tmp_path, capsys, monkeypatch, option):
    monkeypatch.setattr(speed, "measure_all", lambda *_: pytest.fail("measured first"))
    (tmp_path / "file").write_text("")
    bad = tmp_path / "file" / ("speed.json" if option == "--output" else "speed.png")
    assert run(folders, ["llama"], tmp_path / "speed.json", option, str(bad)) == 1
    assert f"{bad} cannot be written ({bad.parent} is no folder): name another file" in capsys.readouterr().err


def test_a_picture_of_no_known_format_is_refused_first(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "measure_all", lambda *_: pytest.fail("measured first"))
    assert run(folders, ["llama"], tmp_path / "speed.json", "--plot", str(tmp_path / "speed.chess")) == 1
    assert "speed.chess should end in one of" in capsys.readouterr().err


def test_compression_is_set_and_limited(folders, tmp_path):
    output = tmp_path / "speed.json"
    more = ("--compress", "--compression-span", "0.25", "--lengths", "40", "--batch-sizes", "1")
    assert run(folders, ["remamba"], output, *more) == 0
    (cell,) = json.loads(output.read_text())["speed"]
    assert (cell["way"], cell["window"]) == ("compression on", 10)


@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        (["llama"], ["--compress"], "leave out --compress"),
        (["llama", "memmamba"], ["--compression-span", "0.5"], "leave out --compression-span"),
        (["remamba"], ["--no-compress", "--compression-span", "0.5"], "nothing to set: leave out --compression-span"),
        (["remamba", "remamba"], [], "two models are called remamba"),
        (["remamba"], ["--new-tokens", "5"], "at least 6"),
        (["remamba"], ["--device", "abacus"], "no device 'abacus'"),
    ],
)
def test_what_means_nothing_is_refused(folders, tmp_path, capsys, names, more, message):
    assert run(folders, names, tmp_path / "speed.json", *more) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_several_processes_are_refused(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(folders, ["remamba"], tmp_path / "speed.json") == 1
    assert "measured by one process" in capsys.readouterr().err


class Sleeper(torch.nn.Module):
    """Takes a while to read a prompt, longer for its first tokens, and a tenth of that for every other."""

    device = torch.device("cpu")
    generation_config = None

    def generate(self, ids, max_new_tokens, do_sample, logits_processor=(), **options):
        time.sleep(0.05)
        for token in range(max_new_tokens):
            if token:
                time.sleep(0.02 if token <= timing.WARM_TOKENS else 0.002)
            for process in logits_processor:
                process(ids, None)
        return SimpleNamespace()


def test_reading_first_tokens_and_decoding_are_told_apart():
    times = timing.time_generation(Sleeper(), torch.zeros(1, 4), 26, timing.Clock("cpu"), {})
    assert times.prefill == pytest.approx(0.05, abs=0.015)
    assert times.step == pytest.approx(0.0021, abs=0.0015)
    cell = timing.measure_generation(Sleeper(), torch.zeros(1, 4), 7, 9, {}, most_seconds=0.4)
    assert 1 <= cell["repeats"] <= 2, "as many as there is time for"
    assert cell["state_bytes"] is None
    assert timing.measure_generation(Sleeper(), torch.zeros(1, 4), 7, 9, {}, most_seconds=0.01)["repeats"] == 1


def test_peak_is_that_of_a_measurement():
    clock = timing.Clock("cpu")
    clock.start_peak()
    before = clock.peak_bytes()
    if before is None:
        pytest.skip("the system does not tell")
    with mmap.mmap(-1, 1 << 26) as held:  # unlike a tensor, in no memory that the process was left with
        held.write(bytes(1 << 26))
        assert clock.peak_bytes() >= before + (1 << 25)
    most = clock.peak_bytes()
    clock.start_peak()
    assert clock.peak_bytes() <= most - (1 << 25)


def test_picture_has_a_panel_for_every_measure(folders, tmp_path):
    pytest.importorskip("matplotlib")
    assert run(folders, ["memmamba"], tmp_path / "speed.json", "--plot", str(tmp_path / "pictures" / "speed.png")) == 0
    assert (tmp_path / "pictures" / "speed.png").stat().st_size > 10_000
