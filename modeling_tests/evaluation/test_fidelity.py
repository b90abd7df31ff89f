# SPDX-License-Identifier: Apache-2.0
import json
import math

import numpy as np
import pytest
import torch

from modeling_tests.modeling.tiny_models import tiny_memmamba
from remamba_hf.evaluation import fidelity

VOCABULARY, SIZE = 11, 6


def random_logits(rows=2, length=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, length, VOCABULARY, generator=generator, dtype=torch.float64)
    ids = torch.randint(VOCABULARY, (rows, length), generator=generator)
    embeddings = torch.randn(VOCABULARY, SIZE, generator=generator, dtype=torch.float64)
    return logits, ids, embeddings


def naive_expected(logits, embeddings):
    weights = [math.exp(value) for value in logits.tolist()]
    return sum(weight / sum(weights) * embedding for weight, embedding in zip(weights, embeddings, strict=True))


def naive_cosine(one, other):
    return (one @ other).item() / math.sqrt((one @ one).item() * (other @ other).item())


@pytest.mark.parametrize("distance", [0, 1, 4])
def test_etmf_is_the_mean_cosine_of_a_token_and_what_is_predicted(distance):
    logits, ids, embeddings = random_logits()
    cosines = [
        naive_cosine(embeddings[ids[row, j - distance]], naive_expected(logits[row, j], embeddings))
        for row in range(2)
        for j in range(distance, 9)
    ]
    expected = fidelity.expected_embeddings(logits, embeddings)
    value = fidelity.token_fidelity(expected, ids, embeddings, distance)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(sum(cosines) / len(cosines), abs=1e-12)


def test_chance_is_the_mean_over_all_pairs_of_a_row():
    logits, ids, embeddings = random_logits()
    cosines = [
        naive_cosine(embeddings[ids[row, i]], naive_expected(logits[row, j], embeddings))
        for row in range(2)
        for i in range(9)
        for j in range(9)
    ]
    expected = fidelity.expected_embeddings(logits, embeddings)
    chance = sum(cosines) / len(cosines)
    assert fidelity.chance_fidelity(expected, ids, embeddings).item() == pytest.approx(chance, abs=1e-12)
    corrected = fidelity.corrected_token_fidelity(expected, ids, embeddings, 3)
    assert corrected.item() == pytest.approx(fidelity.token_fidelity(expected, ids, embeddings, 3).item() - chance)


def test_etmf_rewards_copying_and_the_corrected_form_what_is_remembered():
    _, ids, embeddings = random_logits(rows=1, length=400)
    embeddings = embeddings + 3.0  # a direction that all share: any two tokens are alike
    copies = 50.0 * torch.nn.functional.one_hot(ids, VOCABULARY).double()
    remembers = copies.roll(8, dims=1)
    copying, remembering = (fidelity.expected_embeddings(logits, embeddings) for logits in (copies, remembers))
    assert fidelity.token_fidelity(copying, ids, embeddings).item() == pytest.approx(1.0)
    assert fidelity.token_fidelity(copying, ids, embeddings, 8) > 0.7, "by the shared direction alone"
    assert abs(fidelity.corrected_token_fidelity(copying, ids, embeddings, 8)) < 0.03
    chance = fidelity.chance_fidelity(remembering, ids, embeddings).item()
    assert fidelity.corrected_token_fidelity(remembering, ids, embeddings, 8).item() == pytest.approx(1 - chance)


def test_expected_embeddings_of_half_precision_are_computed_in_float32():
    logits, _, embeddings = random_logits()
    result = fidelity.expected_embeddings(logits.bfloat16(), embeddings.bfloat16())
    assert result.dtype == torch.float32
    wanted = fidelity.expected_embeddings(logits.bfloat16().double(), embeddings.bfloat16().double())
    torch.testing.assert_close(result.double(), wanted, atol=1e-5, rtol=1e-5)


def test_distances_without_a_token_are_refused():
    logits, ids, embeddings = random_logits()
    with pytest.raises(ValueError, match="0 to 8"):
        fidelity.token_fidelity(fidelity.expected_embeddings(logits, embeddings), ids, embeddings, 9)


def noise(positions, size, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((positions, size)))


def test_eclmf_is_the_paper_s_formula():
    x, y = noise(40, 7), noise(40, 7, seed=1) * 2 + noise(40, 7)
    # The same minimum as ordinary least squares of rows sqrt(lambda) I -> 0 below the data.
    stacked = np.vstack([x.numpy(), math.sqrt(1e-4) * np.eye(7)])
    weights = np.linalg.lstsq(stacked, np.vstack([y.numpy(), np.zeros((7, 7))]), rcond=None)[0]
    residual = math.sqrt(((y.numpy() - x.numpy() @ weights) ** 2).sum())
    wanted = 1 - residual / (math.sqrt((x.numpy() ** 2).sum()) + 1e-6)
    assert fidelity.layer_fidelity(x, y) == pytest.approx(wanted, abs=1e-9)
    assert fidelity.layer_fidelity(x, y, penalty=100.0) < wanted - 0.01


def test_held_out_form_is_that_of_the_positions_not_fitted():
    x, y = noise(60, 5), noise(60, 5, seed=1) + noise(60, 5) @ noise(5, 5, seed=2) + 4.0
    fitted = torch.arange(60) % 3 > 0
    mean_x, mean_y = x[fitted].mean(0), y[fitted].mean(0)
    inputs = (x[fitted] - mean_x).numpy()
    penalty = 0.3 * (inputs**2).sum() / 5
    weights = np.linalg.inv(inputs.T @ inputs + penalty * np.eye(5)) @ inputs.T @ (y[fitted] - mean_y).numpy()
    errors = totals = 0.0
    for position in (~fitted).nonzero().flatten().tolist():
        wanted = (y[position] - mean_y).numpy()
        errors += ((wanted - (x[position] - mean_x).numpy() @ weights) ** 2).sum()
        totals += (wanted**2).sum()
    assert fidelity.held_out_fidelity(x, y, fitted, penalty=0.3) == pytest.approx(1 - errors / totals, abs=1e-12)


def test_noise_deceives_the_paper_s_form_and_not_the_held_out_one():
    x, y = noise(64, 64), noise(64, 64, seed=1)
    fitted = torch.arange(64) < 32
    assert fidelity.layer_fidelity(x, y) > 0.95
    assert fidelity.held_out_fidelity(x, y, fitted) < 0
    many = torch.cat([x, noise(300, 64, seed=3)])
    linear = many @ noise(64, 64, seed=2) + 1.0
    assert fidelity.held_out_fidelity(many, linear, torch.arange(364) < 300) > 0.999


def test_only_the_paper_s_form_depends_on_scale():
    x, y = noise(80, 4), noise(80, 4, seed=1) + noise(80, 4)
    fitted = torch.arange(80) < 40
    assert fidelity.held_out_fidelity(x, y, fitted) == pytest.approx(fidelity.held_out_fidelity(100 * x, 7 * y, fitted))
    assert abs(fidelity.layer_fidelity(x, y) - fidelity.layer_fidelity(100 * x, y)) > 0.3
    for wrong in (torch.ones(80, dtype=torch.bool), torch.zeros(80, dtype=torch.bool)):
        with pytest.raises(ValueError, match="positions to fit on"):
            fidelity.held_out_fidelity(x, y, wrong)


def test_a_model_is_measured_by_its_blocks_and_logits():
    model = tiny_memmamba()
    passages = torch.randint(2, 50, (3, 24), generator=torch.Generator().manual_seed(1))
    result = fidelity.measure(model, passages, distances=(0, 5), gaps=(1, 2, 5))
    outputs = [model(passage[None], output_hidden_states=True) for passage in passages]
    embeddings = model.get_input_embeddings().weight
    blocks = [torch.cat([output.hidden_states[layer][0] for output in outputs]).float() for layer in range(3)]
    values = [
        fidelity.token_fidelity(fidelity.expected_embeddings(output.logits, embeddings), passage[None], embeddings, 5).item()
        for output, passage in zip(outputs, passages, strict=True)
    ]
    assert result["etmf"]["5"]["paper"]["mean"] == pytest.approx(sum(values) / 3, abs=1e-9)
    assert result["etmf"]["5"]["corrected"]["mean"] == pytest.approx(sum(values) / 3 - result["chance"]["mean"], abs=1e-9)
    assert result["etmf"]["5"]["paper"]["standard_error"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(3), abs=1e-9)
    assert len(result["eclmf"]["1"]["paper"]["layers"]) == 2
    in_sample = fidelity.layer_fidelity(blocks[0], blocks[2])
    assert result["eclmf"]["2"]["paper"]["layers"] == [pytest.approx(in_sample, abs=1e-9)]
    fitted = torch.tensor(([True] * 12 + [False] * 12) * 3)
    held_out = fidelity.held_out_fidelity(blocks[0], blocks[2], fitted)
    assert result["eclmf"]["2"]["held_out_r2"]["mean"] == pytest.approx(held_out, abs=1e-9)
    assert result["eclmf"]["5"] is None, "three layers have no gap of five"


def test_command_compares_two_models(books, memmamba_folder, plain_folder, tmp_path, capsys):
    output = tmp_path / "results" / "fidelity.json"
    common = ["--model", str(memmamba_folder), "--books", str(books), "--output", str(output), "--device", "cpu"]
    fidelity.main([*common, "--plain-model", str(plain_folder), "--length", "64", "--passages", "2", "--gaps", "1", "3"])
    results = json.loads(output.read_text())
    assert [entry["model_type"] for entry in results["models"].values()] == ["memmamba", "mamba"]
    assert list(results["models"]["plain"]["etmf"]) == ["0", "8", "16", "32"]
    assert "| ETMF, by distance | 0 | 8 | 16 | 32 |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="less than the length"):
        fidelity.main([*common, "--length", "32"])
    with pytest.raises(ValueError, match="shorter --lengths"):
        fidelity.main([*common, "--length", "1000000"])


def test_lengths_have_rows_and_a_picture(books, memmamba_folder, plain_folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    common = ["--model", str(memmamba_folder), "--plain-model", str(plain_folder), "--books", str(books), "--device", "cpu"]
    common += ["--passages", "2", "--gaps", "1", "3", "--distances", "0", "8"]
    several, one = tmp_path / "several.json", tmp_path / "one.json"
    fidelity.main([*common, "--output", str(several), "--lengths", "64", "1024", "32", "--plots", str(tmp_path / "plots")])
    out = capsys.readouterr().out
    results = json.loads(several.read_text())
    assert (results["settings"]["length"], results["settings"]["lengths"]) == (1024, [32, 64, 1024])
    for name in ("model", "plain"):
        found = fidelity.measures_by_length(results, name)
        assert list(found) == [32, 64, 1024]
        for length, measured in found.items():
            row = f"| {name}, corrected, {fidelity.short_length(length)} | "
            assert row + " | ".join(f"{measured['etmf'][at]['corrected']['mean']:.3f}" for at in ("0", "8")) + " |" in out
    assert (tmp_path / "plots" / "fidelity.png").stat().st_size > 10_000
    for length in (64, 1024):
        fidelity.main([*common, "--output", str(one), "--length", str(length)])
        of_one = json.loads(one.read_text())
        assert "lengths" not in of_one["settings"], "as files of one length have always been"
        for name in ("model", "plain"):
            measured = fidelity.measures_by_length(results, name)[length]
            for key in ("etmf", "chance", "eclmf"):
                assert measured[key] == of_one["models"][name][key]
        one.unlink()


def test_run_of_several_lengths_goes_on_behind_the_last(books, memmamba_folder, tmp_path, monkeypatch):
    output = tmp_path / "fidelity.json"
    arguments = ["--model", str(memmamba_folder), "--books", str(books), "--device", "cpu", "--passages", "2", "--gaps", "1"]
    arguments += ["--lengths", "40", "64", "--output", str(output)]
    measure = fidelity.measure
    lengths = []

    def until_the_second(model, passages, *more):
        lengths.append(passages.shape[1])
        if lengths == [40, 64]:
            raise KeyboardInterrupt
        return measure(model, passages, *more)

    monkeypatch.setattr(fidelity, "measure", until_the_second)
    with pytest.raises(KeyboardInterrupt):
        fidelity.main(arguments)
    fidelity.main(arguments)
    assert lengths == [40, 64, 64]
    assert list(fidelity.measures_by_length(json.loads(output.read_text()), "model")) == [40, 64]


def test_attention_model_is_measured_and_the_run_goes_on(books, memmamba_folder, neox_folder, tmp_path, monkeypatch):
    output = tmp_path / "fidelity.json"
    more = ("--length", "64", "--passages", "2", "--gaps", "1")
    common = ["--model", str(neox_folder), "--books", str(books), "--output", str(output), "--device", "cpu", *more]
    fidelity.main(common)
    results = json.loads(output.read_text())
    model = results["models"]["model"]
    assert (model["model_type"], model["layers"], len(model["weights"])) == ("gpt_neox", 2, 64)
    assert len(model["eclmf"]["1"]["paper"]["layers"]) == 1
    assert results["date"].endswith("+00:00")
    measured = []
    measure = fidelity.measure
    monkeypatch.setattr(fidelity, "measure", lambda model, *given: measured.append(model) or measure(model, *given))
    fidelity.main([*common, "--plain-model", str(memmamba_folder)])
    assert [type(model).__name__ for model in measured] == ["MemMambaForCausalLM"]
    assert json.loads(output.read_text())["models"]["model"] == model
    common[1] = str(memmamba_folder)
    with pytest.raises(ValueError, match="another model"):
        fidelity.main(common)
    with pytest.raises(ValueError, match="512 positions"):
        fidelity.main([*common[2:], "--model", str(neox_folder), "--length", "600"])


def test_models_without_comparable_states_are_refused():
    model = tiny_memmamba()
    model.config.num_hidden_layers += 1
    with pytest.raises(ValueError, match="hands out 4 hidden states"):
        fidelity.measure(model, torch.zeros(1, 8, dtype=torch.long))
