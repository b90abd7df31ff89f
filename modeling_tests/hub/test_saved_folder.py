# SPDX-License-Identifier: Apache-2.0
"""A saved folder is all that a process without this package needs, and saving it again keeps it so."""

import ast
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline

import remamba_hf
from remamba_hf.families import ALL_FAMILIES

from .conftest import EVERYTHING, FLOAT32, make_model

MODELING = Path(remamba_hf.__file__).parent / "modeling"
AUTO_MAP = {
    "remamba": {
        "AutoConfig": "configuration_remamba.ReMambaConfig",
        "AutoModel": "modeling_remamba.ReMambaModel",
        "AutoModelForCausalLM": "modeling_remamba.ReMambaForCausalLM",
    },
    "remamba2": {
        "AutoConfig": "configuration_remamba2.ReMamba2Config",
        "AutoModel": "modeling_remamba2.ReMamba2Model",
        "AutoModelForCausalLM": "modeling_remamba2.ReMamba2ForCausalLM",
    },
    "memmamba": {
        "AutoConfig": "configuration_memmamba.MemMambaConfig",
        "AutoModel": "modeling_memmamba.MemMambaModel",
        "AutoModelForCausalLM": "modeling_memmamba.MemMambaForCausalLM",
    },
}


def needed_files(family: str) -> set[str]:
    """What Python imports for the classes of `auto_map`, however deep."""
    needed, to_read = set(), {f"{reference.split('.')[0]}.py" for reference in AUTO_MAP[family].values()}
    while to_read:
        name = to_read.pop()
        needed.add(name)
        tree = ast.walk(ast.parse((MODELING / name).read_text()))
        to_read |= {f"{node.module}.py" for node in tree if isinstance(node, ast.ImportFrom) and node.level} - needed
    return needed


CODE = {family: needed_files(family) for family in ALL_FAMILIES}
IN_A_CLEAN_PROCESS = """
ids = load_file(IDS)["ids"]
for name, folder in FOLDERS.items():
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    backbone = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    assert config.a_key_of_the_user == "kept", config
    for key, value in run(model, ids).items():
        RESULTS[f"{name}.{key}"] = value
    with torch.no_grad():
        RESULTS[f"{name}.hidden"] = backbone(ids, **EVERYTHING[config.model_type]).last_hidden_state
    RESULTS[f"{name}.generated"] = model.generate(ids, max_new_tokens=6, do_sample=False)
    RESULTS[f"{name}.sampled_beams"] = model.generate(ids, max_new_tokens=4, num_beams=2, do_sample=False)
    half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    RESULTS[f"{name}.dtypes"] = {key: str(value.dtype) for key, value in half.state_dict().items()}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pipe = pipeline("text-generation", folder, trust_remote_code=True, dtype=torch.float32)
    text = "It is a truth universally acknowledged"
    RESULTS[f"{name}.text"] = pipe(text, max_new_tokens=5, do_sample=False)[0]["generated_text"]
    RESULTS[f"{name}.tokens"] = tokenizer(text)["input_ids"]
    if RESAVED:
        model.save_pretrained(f"{RESAVED}/{name}")
        tokenizer.save_pretrained(f"{RESAVED}/{name}")
        backbone.save_pretrained(f"{RESAVED}/{name}-backbone")
"""


@torch.no_grad()
def expected_of(model, tokenizer, ids) -> dict:
    how = EVERYTHING[model.config.model_type]
    out = model(ids, **how)
    notes = out.get("note_positions")
    text = "It is a truth universally acknowledged"
    tokens = tokenizer(text)["input_ids"]
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    return {
        "logits": out.logits,
        "positions": out.compressed_positions if notes is None else torch.stack(notes),
        "hidden": model.backbone(ids, **how).last_hidden_state,
        "generated": model.generate(ids, max_new_tokens=6, do_sample=False),
        "sampled_beams": model.generate(ids, max_new_tokens=4, num_beams=2, do_sample=False),
        "text": pipe(text, max_new_tokens=5, do_sample=False)[0]["generated_text"],
        "tokens": tokens,
    }


def check(results: dict, name: str, family: str, expected: dict) -> None:
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(results[f"{name}.{key}"], value, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: k + m)
        else:
            assert results[f"{name}.{key}"] == value, key
    for key, dtype in results[f"{name}.dtypes"].items():
        assert dtype == ("torch.float32" if key.endswith(FLOAT32[family]) else "torch.bfloat16"), key


def has_code(folder: Path, family: str) -> None:
    assert {path.name for path in folder.glob("*.py")} == CODE[family]
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP[family]
    assert AutoConfig.from_pretrained(folder).auto_map == AUTO_MAP[family]


def test_each_family_travels_with_its_own_files():
    """Nothing of another family, nothing that nobody needs, and nothing left at home."""
    users = {}
    for family, code in CODE.items():
        for name in code:
            users.setdefault(name, set()).add(family)

    def files_of(*families: str) -> set[str]:
        return {name for name, of in users.items() if of == set(families)}

    assert files_of("remamba") == {"configuration_remamba.py", "modeling_remamba.py"}
    assert files_of("remamba2") == {"configuration_remamba2.py", "modeling_remamba2.py", "state_space_dual.py"}
    memory = {"note_kernels.py", "note_memory.py", "note_pool.py"}
    assert files_of("memmamba") == {"configuration_memmamba.py", "modeling_memmamba.py"} | memory
    assert files_of("remamba", "memmamba") == {
        *("mamba_mixer.py", "scan_gradients.py", "scan_kernels.py", "selective_scan.py")
    }
    compression = {"configuration_two_stage.py", "selective_compression.py", "two_stage_generation.py", "two_stage_model.py"}
    assert files_of("remamba", "remamba2") == compression
    assert not files_of("remamba2", "memmamba")
    assert set.union(*CODE.values()) == {path.name for path in MODELING.glob("*.py")} - {"__init__.py"}


@pytest.mark.smoke
def test_clean_process_loads_saves_and_loads_again(tmp_path, python, tokenizer, input_ids):
    """Tied in one file, and untied in bfloat16 in shards; all families in one process."""
    from safetensors.torch import save_file

    save_file({"ids": input_ids}, tmp_path / "ids.safetensors")
    folders, expected, families = {}, {}, {}
    for family in ALL_FAMILIES:
        for kind, options in (("tied", {}), ("untied", {"max_shard_size": "20KB"})):
            model = make_model(family, tied=kind == "tied")
            if kind == "untied":
                model.to(torch.bfloat16)
            name = f"{family}-{kind}"
            folder = tmp_path / name
            model.save_pretrained(folder, **options)
            tokenizer.save_pretrained(folder)
            folders[name], families[name] = str(folder), family
            expected[name] = expected_of(model.float(), tokenizer, input_ids)
            has_code(folder, family)
        assert len(list((tmp_path / f"{family}-untied").glob("*.safetensors"))) > 2
        assert "lm_head.weight" not in load_file(tmp_path / f"{family}-tied" / "model.safetensors")

    given = {"IDS": str(tmp_path / "ids.safetensors")}
    results = python(IN_A_CLEAN_PROCESS, FOLDERS=folders, RESAVED=str(tmp_path / "again"), **given)
    for name, values in expected.items():
        check(results, name, families[name], values)
        has_code(tmp_path / "again" / name, families[name])
        has_code(tmp_path / "again" / f"{name}-backbone", families[name])

    again = {name: str(tmp_path / "again" / name) for name in folders}
    results = python(IN_A_CLEAN_PROCESS, FOLDERS=again, RESAVED="", **given)
    for name, values in expected.items():
        check(results, name, families[name], values)


@torch.no_grad()
@pytest.mark.smoke
@pytest.mark.parametrize("flag", [{}, {"trust_remote_code": False}])
def test_installed_package_needs_no_flag(tmp_path, input_ids, family, flag):
    model = make_model(family)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **flag)
    assert type(loaded) is ALL_FAMILIES[family].model_class
    assert type(AutoModel.from_pretrained(tmp_path / "model", **flag)) is ALL_FAMILIES[family].model_class.backbone_class
    assert not any(name.startswith("transformers_modules.model") for name in sys.modules)
    torch.testing.assert_close(
        loaded(input_ids, **EVERYTHING[family]).logits, model(input_ids, **EVERYTHING[family]).logits, rtol=0, atol=0
    )
    loaded.save_pretrained(tmp_path / "again")
    has_code(tmp_path / "again", family)


@torch.no_grad()
def test_backbone_and_language_model_load_from_each_others_folders(tmp_path, input_ids, family):
    model = make_model(family)
    model.save_pretrained(tmp_path / "causal")
    model.backbone.save_pretrained(tmp_path / "backbone")
    has_code(tmp_path / "backbone", family)
    expected = model(input_ids, **EVERYTHING[family])
    hidden = model.backbone(input_ids, **EVERYTHING[family]).last_hidden_state
    for folder in ("causal", "backbone"):
        backbone, info = AutoModel.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["missing_keys"]
        torch.testing.assert_close(backbone(input_ids, **EVERYTHING[family]).last_hidden_state, hidden, rtol=0, atol=0)
        # A tied head needs nothing but the backbone.
        causal, info = AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["missing_keys"]
        torch.testing.assert_close(causal(input_ids, **EVERYTHING[family]).logits, expected.logits, rtol=1e-6, atol=1e-6)


def test_half_precision_loads_some_weights_in_float32(tmp_path, family):
    """From a float32 folder, and bit by bit."""
    model = make_model(family, tied=False)
    model_class = ALL_FAMILIES[family].model_class
    model.save_pretrained(tmp_path)
    half = model_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    for name, tensor in half.state_dict().items():
        expected = model.state_dict()[name]
        assert tensor.dtype == (torch.float32 if name.endswith(FLOAT32[family]) else torch.bfloat16), name
        assert torch.equal(tensor, expected.to(tensor.dtype)), name
    half.save_pretrained(tmp_path / "half")
    written = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in half.state_dict().items())
    assert model_class.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def strict_json(path: Path) -> dict:
    """What a reader makes of a file that does not know Python's Infinity and NaN."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


COMPRESSION = dict(train_compression_span=(0.2, 0.6), selection="stride", compression_max_kept=7)
MEMORY = dict(
    **dict(note_size=12, pool_size=3, note_heads=3, chunk_size=2, cross_layer_period=2, cross_layer_group=1),
    **dict(
        write_rule="periodic", recency_weight=0.01, write_threshold=0.1, read_threshold=0.2, write_period=9, write_span=4
    ),
    **dict(fusion="weighted", fusion_position="post", pooling="max", pooling_window=3),
)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("remamba", COMPRESSION),
        ("remamba2", COMPRESSION),
        ("remamba2", COMPRESSION | dict(time_step_limit=(0.0, math.inf))),
        ("remamba2", COMPRESSION | dict(time_step_limit=[0.01, 0.5])),
        ("memmamba", {}),
        ("memmamba", MEMORY),
    ],
    ids=str,
)
def test_every_setting_survives_saving(tmp_path, input_ids, family, settings):
    """Infinite limits, ranges, keys of the user; and nothing but JSON is written."""
    model = make_model(family, **settings)
    model.save_pretrained(tmp_path)
    strict_json(tmp_path / "config.json")
    for loaded in (AutoConfig.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path).config):
        assert type(loaded) is ALL_FAMILIES[family].config_class
        assert json.loads(loaded.to_json_string()) == json.loads(model.config.to_json_string())
        for name, value in settings.items():
            assert getattr(loaded, name) == (list(value) if isinstance(value, tuple) else value), name
        assert loaded.a_key_of_the_user == "kept"
        assert '"hidden_size": 32' in repr(loaded)


@torch.no_grad()
def test_plain_checkpoints_load_as_what_one_asks_for(tmp_path, input_ids, family):
    """AutoModelForCausalLM gives transformers' model; the family's class takes all its weights, and saves its own kind."""
    kinds = ALL_FAMILIES[family]
    own = dict(num_heads=4, head_dim=16, n_groups=1, chunk_size=16) if family == "remamba2" else {}
    asked = dict(note_size=16, chunk_size=4) if family == "memmamba" else dict(compression_span=0.4)
    added = ("memory",) if family == "memmamba" else ("compressor", "adaptation")
    torch.manual_seed(0)
    plain = kinds.plain_model_class(
        kinds.plain_config_class(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=8, **own)
    ).eval()
    plain.save_pretrained(tmp_path / "plain")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")) is kinds.plain_model_class
    model, info = kinds.model_class.from_pretrained(tmp_path / "plain", **asked, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert all(any(part in name for part in added) for name in info["missing_keys"])
    assert all(torch.equal(model.state_dict()[name], value) for name, value in plain.state_dict().items())
    torch.testing.assert_close(model(input_ids).logits, plain(input_ids).logits, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "extended")
    has_code(tmp_path / "extended", family)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "extended")
    assert type(loaded) is kinds.model_class
    assert {name: getattr(loaded.config, name) for name in asked} == asked
    expected = model(input_ids, **EVERYTHING[family])
    assert torch.equal(loaded(input_ids, **EVERYTHING[family]).logits, expected.logits)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_a_changed_vocabulary_survives_saving(tmp_path, input_ids, family, tied):
    model = make_model(family, tied=tied)
    input_ids = input_ids.clone()
    expected = model(input_ids, **EVERYTHING[family]).logits
    model.resize_token_embeddings(320)
    logits = model(input_ids, **EVERYTHING[family]).logits
    torch.testing.assert_close(logits[..., :300], expected)
    input_ids[:, 5] = 319
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == logits.shape[-1] == 320
    assert (loaded.lm_head.weight is loaded.backbone.embeddings.weight) is tied
    torch.testing.assert_close(loaded(input_ids, **EVERYTHING[family]).logits, model(input_ids, **EVERYTHING[family]).logits)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "auto", "float16"], ids=str)
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_precision_under_either_name(tmp_path, input_ids, family, name, dtype):
    make_model(family, tied=False).to(torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto", **{name: dtype})
    assert model.dtype == (torch.float16 if dtype == "float16" else torch.bfloat16)
    for key, value in model.state_dict().items():
        assert value.dtype == (torch.float32 if key.endswith(FLOAT32[family]) else model.dtype), key
    assert model(input_ids, **EVERYTHING[family]).logits.isfinite().all()
    assert model.generate(input_ids, max_new_tokens=2).shape == (2, 42)
