# SPDX-License-Identifier: Apache-2.0
"""examples/finetune_lora.py on tiny models: from a plain checkpoint to an adapter, and a run that is cut off and resumed."""

import argparse
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

import remamba_hf
from modeling_tests.modeling.tiny_models import assert_close, tiny_memmamba, tiny_model
from remamba_hf.training.book_tokens import train_book_tokenizer

peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")

SCRIPT = Path(remamba_hf.__file__).parent.parent / "examples" / "finetune_lora.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs the repository's examples/")
TEXT = "The secret number of Ada is 12345. Question: What is the secret number of Ben?\nAnswer: That is a secret."
# Draws that matter: windows and vectors kept vary widely.
DRAWN = dict(train_compression_span=(0.2, 0.8), train_compression_ratio=(0.05, 0.9))
IDS = dict(bos_token_id=0, eos_token_id=0, pad_token_id=1)


@pytest.fixture(scope="module")
def example():
    specification = importlib.util.spec_from_file_location("finetune_lora", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer():
    return train_book_tokenizer([TEXT], vocab_size=300)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def data(example, tmp_path):
    """Prompts of different lengths."""
    path = tmp_path / "data.jsonl"
    pairs = [{**pair, "prompt": pair["prompt"][-60 - 7 * number :]} for number, pair in enumerate(example.made_pairs(20))]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def saved(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def options(model, data, output, *more) -> list[str]:
    few = (
        "--steps 6 --save-steps 3 --batch 4 --rows 2 --rank 4 --eval-rows 3 --max-new-tokens 3 --logging-steps 1 --workers 1"
    )
    paths = ["--model", str(model), "--data", str(data), "--output", str(output)]
    return [*paths, *few.split(), "--held-out", "0.2", "--max-tokens", "128", "--learning-rate", "0.01", *more]


def run(example, monkeypatch, *arguments):
    """The script's main, without worker processes, which cost seconds."""
    made = example.training_arguments

    def without_workers(given: argparse.Namespace):
        given.tiny = True
        return made(given)

    with monkeypatch.context() as patched:
        patched.setattr(example, "training_arguments", without_workers)
        patched.setattr("sys.argv", ["finetune_lora.py", *arguments])
        example.main()


def adapter_of(folder):
    return remamba_hf.checkpoint_files.read_tensors(folder, stems=("adapter_model",))


@pytest.mark.parametrize("family", ["remamba", "remamba2", "memmamba"])
def test_a_resumed_run_is_the_whole_run_bit_for_bit(example, family, tokenizer, data, tmp_path, monkeypatch):
    """Weights, losses and answers; the draws of the compression among what is taken up again."""
    if family == "memmamba":
        model = tiny_memmamba(torch.float32, vocab_size=300)
    else:
        model = tiny_model(torch.float32, family=family, vocab_size=300, **DRAWN)
    for name, token in IDS.items():
        setattr(model.config, name, token)
        setattr(model.generation_config, name, token)
    base = saved(model, tokenizer, tmp_path / "base")
    run(example, monkeypatch, *options(base, data, tmp_path / "whole"))
    whole = adapter_of(tmp_path / "whole" / "adapter")
    record = json.loads((tmp_path / "whole" / "training.json").read_text())
    assert record["steps"] == 6

    def resumed(name, without=(), more=()):
        shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / name / "checkpoint-3")
        cut_off = tmp_path / name / "checkpoint-5"
        cut_off.mkdir()
        shutil.copy(tmp_path / name / "checkpoint-3" / "adapter_model.safetensors", cut_off)
        for file in without:
            (tmp_path / name / "checkpoint-3" / file).unlink()
        run(example, monkeypatch, *options(base, data, tmp_path / name, "--resume", *more))
        return adapter_of(tmp_path / name / "adapter")

    again = resumed("resumed")
    assert again.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(again[name], tensor), name
    history = json.loads((tmp_path / "resumed" / "training.json").read_text())["history"]
    for key in ("loss", "grad_norm", "eval_loss", "eval_exact"):
        assert [entry[key] for entry in history if key in entry] == [
            entry[key] for entry in record["history"] if key in entry
        ]
    assert (tmp_path / "resumed" / "answers.jsonl").read_text() == (tmp_path / "whole" / "answers.jsonl").read_text()
    if family == "remamba":  # the test would notice a state that is lost, or other draws
        for name, changes in (("anew", dict(without=["optimizer.pt"])), ("drawn", dict(more=["--seed", "1"]))):
            other = resumed(name, **changes)
            assert any(not torch.equal(other[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("family", ["remamba", "remamba2"])
def test_a_plain_checkpoint_becomes_an_adapter_and_a_merged_model(example, family, tokenizer, data, tmp_path, monkeypatch):
    torch.manual_seed(0)
    sizes = dict(vocab_size=300, hidden_size=16, num_hidden_layers=2, **IDS)
    if family == "remamba":
        plain = MambaForCausalLM(MambaConfig(**sizes, state_size=4))
    else:
        plain = Mamba2ForCausalLM(Mamba2Config(**sizes, state_size=8, num_heads=4, head_dim=8, n_groups=1, chunk_size=16))
    base, output = saved(plain, tokenizer, tmp_path / "plain"), tmp_path / "run"
    run(example, monkeypatch, *options(base, data, output, "--merge", "--gradient-checkpointing", "--steps", "2"))
    answers = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 3
    assert {answer["right"] for answer in answers} == {" That is a secret."}
    model = peft.AutoPeftModelForCausalLM.from_pretrained(output / "adapter").eval()
    assert (
        type(model.get_base_model()).__name__ == {"remamba": "ReMambaForCausalLM", "remamba2": "ReMamba2ForCausalLM"}[family]
    )
    merged = AutoModelForCausalLM.from_pretrained(output / "model").eval()
    assert merged.config.use_cache
    loaded = AutoTokenizer.from_pretrained(output / "adapter")
    ids = loaded(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert_close(merged(ids).logits, expected, 1e-5, "merged")
        untrained = AutoModelForCausalLM.from_pretrained(output / "base")(ids).logits
    assert (expected - untrained).abs().max() > 1e-3


def test_a_base_of_few_bits(example, tokenizer, data, tmp_path, monkeypatch):
    """What is quantised stays as it was; the adapter loads onto codes, and onto the base before."""
    pytest.importorskip("bitsandbytes")
    base = saved(tiny_model(torch.float32, vocab_size=300, hidden_size=64, **IDS), tokenizer, tmp_path / "base")
    output, trained = tmp_path / "run", []
    add_lora = example.add_lora
    monkeypatch.setattr(example, "add_lora", lambda model, recipe: trained.append(model) or add_lora(model, recipe))
    run(example, monkeypatch, *options(base, data, output, "--bits", "4", "--dtype", "float32"))
    assert trained[0].backbone.layers[0].mixer.out_proj.weight.dtype == torch.uint8
    losses = [entry["loss"] for entry in json.loads((output / "training.json").read_text())["history"] if "loss" in entry]
    assert losses[-1] < losses[0]
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    for codes in (None, example.quantization_config(4, dtype=torch.float32)):
        model = peft.AutoPeftModelForCausalLM.from_pretrained(output / "adapter", quantization_config=codes).eval()
        assert model(input_ids=ids).logits.isfinite().all()
        assert (model.get_base_model().backbone.layers[0].mixer.in_proj.weight.dtype == torch.uint8) == (codes is not None)


def test_mistakes_are_told_before_anything_is_trained(example, tokenizer, data, tmp_path, monkeypatch, capsys):
    base = saved(tiny_model(torch.float32, vocab_size=300, **IDS), tokenizer, tmp_path / "base")
    with pytest.raises(SystemExit, match=r"--batch 5 is no multiple of 2 rows"):
        run(example, monkeypatch, *options(base, data, tmp_path / "run", "--batch", "5"))
    with pytest.raises(SystemExit, match="no checkpoint to resume"):
        run(example, monkeypatch, *options(base, data, tmp_path / "run", "--resume"))
    (tmp_path / "used" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "used" / "checkpoint-3" / "trainer_state.json").write_text("{}")
    with pytest.raises(SystemExit, match="holds checkpoint-3: add --resume"):
        run(example, monkeypatch, *options(base, data, tmp_path / "used"))
    with pytest.raises(SystemExit):
        example.parse_arguments(["--output", "x", "--model", "y"])
    assert "give --model and --data, or --tiny" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        example.parse_arguments(options(base, data, tmp_path / "run", "--bits", "4", "--merge"))
    assert "leave out --merge" in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SystemExit):
        example.parse_arguments(options(base, data, tmp_path / "run", "--bits", "4"))
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert "use examples/accelerate/ddp.yaml" in capsys.readouterr().err
    (tmp_path / "other.jsonl").write_text('{"one": "a", "another": "b"}\n')
    for name, message in (("other.jsonl", "Name yours"), ("missing.jsonl", "missing.jsonl")):
        with pytest.raises(SystemExit, match=message):
            run(example, monkeypatch, *options(base, tmp_path / name, tmp_path / "run"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(SystemExit, match="is a gpt2: give a Mamba"):
        run(example, monkeypatch, *options(base, data, tmp_path / "run"))
