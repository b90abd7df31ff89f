# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/run_gpu.py` and `benchmarks/report.py`: what they measure, refuse, record and go on from, on tiny models. No
time is ever asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import remamba_hf

BENCHMARKS = Path(remamba_hf.__file__).parent.parent / "benchmarks"
if not (BENCHMARKS / "run_gpu.py").exists():
    pytest.skip("needs the repository's benchmarks/", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))  # where their scripts find each other

import peers  # noqa: E402
import report  # noqa: E402
import run_gpu  # noqa: E402

SMALL = run_gpu.SIZES["tiny"]._replace(
    decode_rows=(1, 2), decode_prompts=(8, 24), prefill_lengths=(32, 64), long_lengths=(48, 96), training=(("tiny", 2, 32),)
)
CEILINGS = run_gpu.Ceilings(copy=1e6, matmul=1e6)
FIELDS = run_gpu.Cell._fields


@pytest.fixture(autouse=True)
def _small_and_without_mamba_ssm(monkeypatch):
    """Wherever these tests run, mamba_ssm cannot be imported; nothing waits for long samples."""
    patch_world(monkeypatch)


def patch_world(monkeypatch):
    monkeypatch.setitem(run_gpu.SIZES, "tiny", SMALL)
    monkeypatch.setattr(run_gpu, "FEW_TOKENS", 2)
    monkeypatch.setattr(run_gpu, "code_digest", lambda: "as these tests found it")  # whoever edits meanwhile
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)


def run(output, *words):
    run_gpu.main(["--device", "cpu", "--sample-seconds", "0.002", "--output", str(output), *(words or ("--shape", "tiny"))])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The file of one whole run over a tiny shape, and of a second one that adds some of another."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch_world(monkeypatch)
        output = tmp_path_factory.mktemp("run") / "gpu_tiny.json"
        run(output)
        run(output, "--shape", "tiny2", "--parts", "prefill")
    return output


def read(path):
    return json.loads(path.read_text())


def test_a_run_measures_all_that_was_planned(finished):
    results = read(finished)
    planned = run_gpu.cells(SMALL, ("tiny",), run_gpu.PARTS) + run_gpu.cells(SMALL, ("tiny2",), ("prefill",))
    assert [tuple(cell[field] for field in FIELDS) for cell in results["cells"]] == [tuple(cell) for cell in planned]
    assert {cell.part for cell in planned} == set(run_gpu.PARTS) - {"gate"}
    for cell in results["cells"]:
        if cell["model"] == "mamba_ssm":
            continue
        assert "error" not in cell, cell
        assert cell["repeats"] == 5
        assert cell["fastest_s"] <= cell["median_s"] <= cell["slowest_s"]
        if cell["median_s"] > 0:  # a difference of two times, which a busy machine can turn round
            assert cell["share_of_limit"] == pytest.approx(cell["limit_s"] / cell["median_s"])
    lora = [cell for cell in results["cells"] if cell["variant"] == "lora"]
    assert [cell["active_adapters"] for cell in lora] == [2 * 4]  # two layers of four projections
    assert results["environment"]["device"] == "cpu"
    assert results["ceilings"]["copy"] > 0


def test_a_missing_peer_is_recorded_everywhere(finished):
    results = read(finished)
    for part in ("decode", "prefill", "training"):
        errors = [cell["error"] for cell in results["cells"] if cell["part"] == part and cell["model"] == "mamba_ssm"]
        assert errors, part
        assert all("ModuleNotFoundError" in error for error in errors)
    gate = {(entry["shape"], entry["model"]): entry for entry in results["gate"]}
    assert "ModuleNotFoundError" in gate["tiny", "mamba_ssm"]["error"]
    assert gate["tiny2", "transformers"]["passed"]


def test_a_run_that_was_cut_goes_on(finished, tmp_path, monkeypatch):
    whole = read(finished)
    output = tmp_path / "cut.json"
    missing = [cell for cell in whole["cells"] if cell["shape"] == "tiny" and cell["model"] == "llama"]
    left = [cell for cell in whole["cells"] if cell not in missing]
    output.write_text(json.dumps({**whole, "cells": left}))
    measured = []

    def measure(cell, taken, bench):
        measured.append(cell)
        assert read(output)["cells"][: len(left)] == left  # on the disk all along
        return {"median_s": 1.0}

    monkeypatch.setattr(run_gpu, "measure", measure)
    monkeypatch.setattr(run_gpu, "check_shape", lambda *_: pytest.fail("the gate was passed already"))
    run(output)
    assert [tuple(cell) for cell in measured] == [tuple(cell[field] for field in FIELDS) for cell in missing]
    assert read(output)["cells"] == left + [{**cell._asdict(), "median_s": 1.0} for cell in measured]


def test_a_run_of_other_settings_or_code_is_not_continued(finished, tmp_path):
    with pytest.raises(SystemExit, match="other settings"):
        run(finished, "--shape", "tiny", "--repeats", "6")
    output = tmp_path / "other.json"
    output.write_text(json.dumps({**read(finished), "code": "of yesterday"}))
    with pytest.raises(SystemExit, match="code"):
        run(output)
    output.write_text('{"what": "benchma')
    with pytest.raises(SystemExit, match=r"Cannot go on from .*other\.json"):
        run(output)


def test_the_digest_is_that_of_the_code(tmp_path, monkeypatch):
    monkeypatch.undo()
    package = tmp_path / "remamba_hf"
    (package / "modeling").mkdir(parents=True)
    (package / "modeling" / "scan.py").write_text("a = 1")
    monkeypatch.setattr(run_gpu.remamba_hf, "__file__", str(package / "__init__.py"))
    first = run_gpu.code_digest()
    (package / "notes.txt").write_text("no code")
    assert run_gpu.code_digest() == first
    (package / "modeling" / "scan.py").write_text("a = 2")
    assert run_gpu.code_digest() != first


def test_no_measurement_begins_when_the_time_is_over(finished, tmp_path):
    output = tmp_path / "late.json"
    output.write_text(json.dumps({**read(finished), "cells": []}))
    with pytest.raises(SystemExit, match="same command again"):
        run(output, "--shape", "tiny", "--limit-seconds", "0")
    assert read(output)["cells"] == []


@pytest.mark.parametrize(
    ("broken", "value"),
    [
        ("mixer.A_log", 1.5),
        ("mixer.x_proj.weight", 1.5),
        ("adaptation.bias", 1.5),
        ("compressor.query.2.weight", 1.5),
        ("mixer.out_proj.weight", float("nan")),
    ],
)
def test_a_broken_weight_fails_the_gate_and_nothing_is_timed(tmp_path, monkeypatch, broken, value):
    reference_of = run_gpu.reference_of

    def reference_and_break(contender):
        reference = reference_of(contender)
        for name, parameter in contender.model.named_parameters():
            if name.endswith(broken):
                parameter.data.mul_(value)
        return reference

    monkeypatch.setattr(run_gpu, "reference_of", reference_and_break)
    monkeypatch.setattr(run_gpu, "measure", lambda *_: pytest.fail("timed"))
    output = tmp_path / "broken.json"
    for _ in range(2):  # the second time from what the first recorded
        with pytest.raises(SystemExit, match="gate failed"):
            run(output)
    results = read(output)
    assert results["cells"] == []
    assert results["ceilings"] is None
    assert not results["gate"][0]["passed"]


def test_a_wrong_step_fails_the_gate(tmp_path, monkeypatch):
    from remamba_hf.modeling import mamba_mixer

    step = mamba_mixer.selective_scan_step
    monkeypatch.setattr(mamba_mixer, "selective_scan_step", lambda *inputs: step(*inputs) + 0.1)
    with pytest.raises(SystemExit, match="decoding, logits"):
        run(tmp_path / "broken.json")
    checks = {check["name"]: check["passed"] for check in read(tmp_path / "broken.json")["gate"][0]["checks"]}
    assert checks["prefill, logits"]


def test_tokens_that_the_reference_finds_bad_fail_the_gate():
    lineup = peers.Lineup("tiny", "cpu", torch.float32)
    contender = peers.Contender(lineup.base)
    prompt = torch.arange(40)[None]
    reference = run_gpu.reference_of(contender)
    assert run_gpu.regret(contender, reference, prompt, 4, allowed=1e-3)["passed"]
    contender.generate = lambda ids, steps: torch.cat([ids, torch.full((1, steps), 7)], dim=1)
    wrong = run_gpu.regret(contender, reference, prompt, 4, allowed=0.1)
    assert not wrong["passed"], wrong


def test_a_peer_that_computes_something_else_is_not_timed(tmp_path, monkeypatch):
    make = run_gpu.Lineup.load

    def load(self, name):
        contender = make(self, name)
        if name == "transformers":
            for parameter in contender.model.parameters():
                parameter.data = 2 * parameter.data
        return contender

    monkeypatch.setattr(run_gpu.Lineup, "load", load)
    output = tmp_path / "peer.json"
    run(output, "--shape", "tiny2", "--parts", "prefill")
    errors = [cell["error"] for cell in read(output)["cells"] if cell["model"] == "transformers"]
    assert len(errors) == len(SMALL.prefill_lengths)
    assert all("other logits" in error for error in errors)
    assert all("error" not in cell for cell in read(output)["cells"] if cell["model"] == "remamba2")


def test_a_failure_of_our_own_is_recorded_and_told(finished, tmp_path, monkeypatch):
    def measure(cell, taken, bench):
        if cell.part == "long_prompt":
            raise torch.OutOfMemoryError("no memory for this\nand more")
        return {"median_s": 1.0}

    monkeypatch.setattr(run_gpu, "measure", measure)
    output = tmp_path / "failing.json"
    output.write_text(json.dumps({**read(finished), "cells": []}))
    with pytest.raises(SystemExit, match="2 measurements of this package's models failed"):
        run(output, "--shape", "tiny", "--parts", "long_prompt", "training")
    cells = read(output)["cells"]
    errors = [cell.get("error") for cell in cells if cell["part"] == "long_prompt"]
    assert errors == ["OutOfMemoryError: no memory for this"] * 2
    assert cells[-1]["part"] == "training"  # what comes later was measured


def test_what_would_take_too_long_is_not_repeated():
    bench = run_gpu.Bench("cpu", torch.float32, SMALL, repeats=5, sample_seconds=0.1, cell_seconds=10)
    runs = []
    with pytest.raises(RuntimeError, match="too slow"):
        bench.repeated(lambda: runs.append(1), expected=2.1)
    assert runs == []
    assert bench.repeated(lambda: 3.0, expected=1.9) == ([3.0] * 5, None)


@pytest.mark.parametrize("shape", ["tiny", "tiny2"])
def test_the_gate_in_bfloat16_allows_twice_what_torch_errs(shape):
    bench = run_gpu.Bench("cpu", torch.bfloat16, SMALL, repeats=5, sample_seconds=0.1, cell_seconds=10)
    entries = {entry["model"]: entry for entry in run_gpu.check_shape(shape, bench)}
    own = entries[peers.SHAPES[shape].family.model_type]
    assert own["passed"], own
    for check in own["checks"]:
        if "plain_torch_error" in check:
            assert 1e-4 < check["plain_torch_error"] < 0.05  # it is bfloat16, and compared with float32
            assert check["allowed"] == pytest.approx(min(2 * check["plain_torch_error"], 0.1))
    assert entries["transformers"]["passed"], entries["transformers"]


def test_the_parts_that_start_without_effect_are_awake_in_the_gate():
    bench = run_gpu.Bench("cpu", torch.float32, SMALL, repeats=5, sample_seconds=0.1, cell_seconds=10)
    base = peers.Lineup("tiny", "cpu", bench.dtype).base
    memmamba = peers.build_memmamba(base, "cpu", bench.dtype)
    ids = torch.arange(100)[None]
    with torch.no_grad():
        plain = base(ids, compress_prompt=False).logits
        torch.testing.assert_close(memmamba(ids).logits, plain)  # before it is awake
        run_gpu.wake(memmamba, bench.dtype)
        assert run_gpu.rms_ratio(memmamba(ids).logits, plain) > 1e-2
    run_gpu.wake(base, bench.dtype)
    assert all(parameter.any() for name, parameter in base.named_parameters() if "adaptation" in name)


def test_peers_share_the_weights_in_memory():
    lineup = peers.Lineup("tiny2", "cpu", torch.bfloat16)
    theirs = lineup.load("transformers").model
    for name in ("backbone.layers.1.mixer.in_proj.weight", "backbone.embeddings.weight", "lm_head.weight"):
        assert theirs.get_parameter(name).data_ptr() == lineup.base.get_parameter(name).data_ptr()
    for name, kept in lineup.base.named_parameters():
        if kept.dtype == torch.float32 and "adaptation" not in name:  # the same numbers in whichever dtype
            assert torch.equal(kept, theirs.get_parameter(name).float()), name
    assert lineup.base.get_parameter("backbone.layers.0.mixer.A_log").dtype == torch.float32


def test_our_models_must_decode_by_graphs_where_there_is_a_gpu(monkeypatch):
    contender = peers.Contender(peers.build("tiny", "cpu", torch.float32))
    assert contender.decoding == {}
    monkeypatch.setattr(type(contender.model), "device", torch.device("cuda"))
    on_gpu = peers.Contender(contender.model)
    given = []
    monkeypatch.setattr(on_gpu.model, "generate", lambda ids, **options: given.append(options))
    on_gpu.generate(torch.zeros(1, 4, dtype=torch.long), 8)
    on_gpu.generate(torch.zeros(1, 4, dtype=torch.long), 1, compress_prompt=True)
    assert given[0] == {"max_new_tokens": 8, "do_sample": False, "compress_prompt": False, "cuda_graph": True}
    assert given[1] == {"max_new_tokens": 1, "do_sample": False, "compress_prompt": True}


def test_lora_without_effect_is_an_error():
    contender = peers.Contender(peers.build("tiny", "cpu", torch.float32))
    with pytest.raises(RuntimeError, match="8 of 8 projections"):
        run_gpu.with_lora(contender, lambda: None)


def test_limits_of_the_tiny_shape_by_hand():
    """Hidden 64, inner 128, state 8, rank 4, vocabulary 256, two layers."""
    lineup = peers.Lineup("tiny", "cpu", torch.float32)
    ours = lineup.load("remamba")
    layer = 64 * 256 + (4 * 128 + 128) + 128 * (4 + 16) + (4 * 128 + 128) + 128 * 8 + 128 + 128 * 64 + 64
    weights = 4 * (2 * layer + 64 + 256 * 64)
    state = 2 * 4 * (128 * 8 + 128 * 4)
    assert peers.bytes_read(ours.model) == weights
    assert ours.state_bytes() == state
    assert ours.state_bytes(torch.bfloat16) == state - 2 * 2 * 128 * 8
    assert run_gpu.decoding_limit(ours, 3, state, 100, CEILINGS) == pytest.approx((weights + 3 * 2 * state) / 1e6)
    multiplied = 2 * (64 * 256 + 128 * 20 + 4 * 128 + 128 * 64)
    assert peers.multiplied_weights(ours.model) == multiplied
    assert run_gpu.prefill_limit(ours, 10, "plain", CEILINGS) == pytest.approx(2 * multiplied * 10 / 1e6)
    two_stages = run_gpu.prefill_limit(ours, 10, "two_stages", CEILINGS)
    assert two_stages == pytest.approx(2 * multiplied * 10 * (1 + 0.82 + 0.18 * 0.009) / 1e6)
    head = 256 * 64
    assert run_gpu.training_limit(ours.model, 10, "plain", 0, CEILINGS) == pytest.approx(6e-5 * (multiplied + head))
    assert run_gpu.training_limit(ours.model, 10, "lora", 0, CEILINGS) == pytest.approx(4e-5 * (multiplied + head))
    half_prompt = 1 + 0.5 * (0.82 + 0.18 * 0.009)
    found = run_gpu.training_limit(ours.model, 10, "two_stages", 0.5, CEILINGS)
    assert found == pytest.approx(6e-5 * (multiplied * half_prompt + head))


def test_limits_of_an_attention_model_by_hand():
    """Two layers of 64 channels, four heads, inner 128, vocabulary 256, the head apart from the embedding."""
    llama = peers.Lineup("tiny", "cpu", torch.float32).load("llama")
    multiplied = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    weights = 4 * (multiplied + 2 * 2 * 64 + 64 + 256 * 64)
    assert peers.bytes_read(llama.model) == weights
    assert llama.context_bytes() == 2 * 2 * 64 * 4
    assert llama.state_bytes() == 0
    assert run_gpu.decoding_limit(llama, 3, 0, 100, CEILINGS) == pytest.approx((weights + 3 * 100 * 1024) / 1e6)
    operations = 2 * multiplied * 10 + 2 * 4 * 64 * (10 * 10 / 2)  # scores and sums over half of all pairs
    assert run_gpu.prefill_limit(llama, 10, "plain", CEILINGS) == pytest.approx(operations / 1e6)


def test_bytes_of_the_large_shapes():
    """As benchmarks/NOTES.md adds them up."""
    for shape, expected in (("2.8b", 5_548_487_680), ("2.7b", 5_405_189_120)):
        assert peers.bytes_read(peers.build(shape, "meta", torch.bfloat16)) == expected
    assert peers.multiplied_weights(peers.build("130m", "meta", torch.bfloat16)) == 89_653_248
    llama = peers.build_llama("2.8b", "meta", torch.bfloat16)
    assert sum(parameter.numel() for parameter in llama.parameters()) == 3_426_473_600


def test_long_prompts_of_other_lengths():
    arguments = run_gpu.parse_arguments(["--device", "cpu", "--shape", "tiny", "--long-lengths", "90", "70", "90"])
    wanted = run_gpu.cells(arguments.sizes, ["tiny"], ["long_prompt"])
    assert [(cell.model, cell.variant, cell.tokens) for cell in wanted] == [
        ("remamba", "two_stages", 70),
        ("remamba", "two_stages", 90),
    ]


def test_a_quick_run_covers_the_targets_and_a_full_one_more():
    quick = run_gpu.cells(run_gpu.SIZES["quick"], ("2.8b", "2.7b", "130m"), run_gpu.PARTS)
    full = run_gpu.cells(run_gpu.SIZES["full"], ("2.8b", "2.7b", "130m"), run_gpu.PARTS)
    assert set(quick) - set(full) == set()
    for shape, model in (("2.8b", "remamba"), ("2.7b", "remamba2")):
        for name in (model, "mamba_ssm", "transformers"):
            assert {("decode", 1), ("decode", 64)} <= {
                (c.part, c.rows) for c in quick if (c.shape, c.model, c.variant) == (shape, name, "plain")
            }
            assert {6144, 32_768} == {c.tokens for c in quick if c[:3] == ("prefill", shape, name)}
        assert ("decode", shape, model, "narrow_state", 64, 32) in quick
        assert {c.variant for c in quick if c[:3] == ("prefill", shape, model)} == {"plain", "two_stages"}
    assert {c.rows for c in quick if c[:3] == ("decode", "130m", "memmamba")} == {1, 16, 64}
    assert {(c.model, c.variant) for c in quick if c.part == "training"} == {
        *(("remamba", variant) for variant in ("plain", "two_stages", "lora")),
        ("mamba_ssm", "plain"),
        ("transformers", "plain"),
    }
    assert max(c.tokens for c in full if c.part == "long_prompt") == 1_048_576
    assert len(set(full)) == len(full)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cpu"], "--shape tiny"),
        (["--device", "cpu", "--shape", "tiny", "2.8b"], "another run"),
        (["--device", "cpu", "--shape", "tiny", "--repeats", "4"], "at least 5"),
        (["--device", "cpu", "--shape", "tiny", "--parts", "everything"], "invalid choice"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(words, message, capsys, tmp_path):
    with pytest.raises(SystemExit):
        run_gpu.main([*words, "--output", str(tmp_path / "never.json")])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def cell(part, model, rows, tokens, median, variant="plain", shape="2.8b", **more):
    numbers = {"median_s": median, "fastest_s": 0.9 * median, "slowest_s": 1.1 * median, "repeats": 5}
    if part != "decode":
        numbers["tokens_per_s"] = rows * tokens / median
    limit = {"limit_s": 0.8 * median, "share_of_limit": 0.8, "peak_bytes": 6_000_000_000}
    named = dict(zip(FIELDS, (part, shape, model, variant, rows, tokens), strict=True))
    return {**named, **numbers, **limit, **more}


@pytest.fixture
def results():
    cells = [
        cell("decode", "remamba", 1, 32, 0.00231),
        cell("decode", "remamba", 64, 32, 0.004),
        cell("decode", "mamba_ssm", 1, 32, 0.00378),
        {**dict(zip(FIELDS, ("decode", "2.8b", "llama", "plain", 1, 32), strict=True)), "error": "ValueError: no luck"},
        cell("prefill", "remamba", 1, 6144, 0.0843),
        cell("prefill", "remamba", 1, 32_768, 0.5),
        cell("prefill", "remamba", 1, 6144, 0.149, variant="two_stages"),
        cell("long_prompt", "remamba", 1, 32_768, 0.8, variant="two_stages"),
        cell("long_prompt", "remamba", 1, 1_048_576, 28.16, variant="two_stages"),
        cell("training", "remamba", 16, 2048, 0.2, shape="130m"),
        cell("training", "mamba_ssm", 16, 2048, 0.25, shape="130m"),
    ]
    check = {"name": "prefill, logits", "error": 0.012, "allowed": 0.02, "passed": True}
    return {
        "what": run_gpu.WHAT,
        "settings": {"dtype": "bfloat16", "repeats": 5},
        "environment": {"device": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "mamba-ssm": "2.3.2.post1", "peft": None},
        "ceilings": {"copy": 2.96e12, "matmul": 776e12},
        "gate": [{"shape": "2.8b", "model": "remamba", "passed": True, "checks": [check]}],
        "cells": cells,
    }


def test_tables(results):
    text = report.markdown(results)
    lines = text.splitlines()
    head = "| decoding, ms a token (fastest-slowest), share of the limit | B=1 | B=64 | peak at B=64, GB |"
    assert lines[lines.index(head) + 2] == "| ReMamba 2.8b | 2.31 (2.08-2.54), 80 % | 4.00 (3.60-4.40), 80 % | 6.00 |"
    assert "| transformers' Llama 3.4b | failed |  |  |" in lines
    assert "- transformers' Llama 3.4b (decode): ValueError: no luck" in lines
    assert "| ReMamba 2.8b | 84.3 (75.9-92.7), 80 % | 500 (450-550), 80 % | 6.00 |" in lines
    assert "| ReMamba 2.8b, two stages | 149 (134-164), 80 % |  |  |" in lines
    assert "| ReMamba 2.8b, two stages, µs a token | 24.41 | 26.86 |" in lines
    assert "| ReMamba 2.8b, two stages, times the shortest's | 1.00 | 1.10 |" in lines
    assert "| ReMamba 130m | 163,840 (148,945-182,044) | 1.25 | 80 % | 6.00 |" in lines
    assert "| ReMamba 2.8b | 1.2e-02 (2.0e-02) |" in lines
    assert "NVIDIA H100 80GB HBM3" in lines[-1]
    assert "torch 2.11.0, mamba-ssm 2.3.2.post1." in lines[-1]
    assert "2.96 TB/s" in lines[-1]


def test_a_row_that_only_failed_is_shown(results):
    for entry in results["cells"]:
        if entry["part"] == "long_prompt" and entry["tokens"] == 32_768:
            entry["error"] = "OutOfMemoryError: too much"
    text = report.markdown(results)
    assert "| ReMamba 2.8b, two stages, µs a token | failed | 26.86 |" in text
    assert "| ReMamba 2.8b, two stages, times the shortest's | failed | 1.00 |" in text


def test_plots_show_measurements_and_limits(results, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = {}
    save = report.save_figure
    monkeypatch.setattr(report, "save_figure", lambda figure, path: (drawn.update({path.name: figure}), save(figure, path)))
    files = report.draw(results, tmp_path, "gpu")
    expected = {"gpu_prefill_2.8b.png", "gpu_memory_2.8b.png", "gpu_decode_2.8b.png"}
    assert {file.name for file in files} == {file.name for file in tmp_path.iterdir()} == expected
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    lines = drawn["gpu_decode_2.8b.png"].axes[0].get_lines()
    assert lines[0].get_ydata() == pytest.approx([2.31, 4.0])
    assert lines[1].get_ydata() == pytest.approx([0.8 * 2.31, 0.8 * 4.0])
    assert (lines[0].get_linestyle(), lines[1].get_linestyle()) == ("-", "--")
    two_stages = drawn["gpu_prefill_2.8b.png"].axes[0].get_lines()[2]
    assert two_stages.get_xdata() == pytest.approx([6144, 32_768, 1_048_576])
    assert drawn["gpu_memory_2.8b.png"].axes[0].get_lines()[0].get_ydata() == pytest.approx([6.0, 6.0])


def test_the_report_of_a_real_run_as_a_script(finished, tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(BENCHMARKS / "report.py"), str(finished), "--output", str(tmp_path / "new")]
    root = str(BENCHMARKS.parent)
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": root, "HOME": root})
    written = {file.name for file in (tmp_path / "new").iterdir()}
    assert written == {
        "gpu_tiny.md",
        "gpu_tiny_prefill_tiny.png",
        "gpu_tiny_prefill_tiny2.png",
        "gpu_tiny_decode_tiny.png",
    }
    text = (tmp_path / "new" / "gpu_tiny.md").read_text()
    assert text.strip() == answer.stdout.strip()
    for model in ("ReMamba tiny", "ReMamba-2 tiny2, two stages", "MemMamba tiny", "ReMamba tiny, LoRA on every projection"):
        assert f"| {model} |" in text
    assert "- mamba_ssm tiny (prefill, decode, training): ModuleNotFoundError" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "is no JSON"),
        ("[]", "was not written by"),
        ('{"what": "CPU prefill"}', "was not written by"),
        (json.dumps({"what": run_gpu.WHAT, "cells": []}), "holds no measurements"),
    ],
)
def test_a_foreign_or_empty_file_is_refused(content, message, tmp_path):
    path = tmp_path / "given.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=message) as refusal:
        report.main([str(path)])
    assert "given.json" in str(refusal.value)
    assert {file.name for file in tmp_path.iterdir()} <= {"given.json"}
