# SPDX-License-Identifier: Apache-2.0
"""What travels with a checkpoint runs on other people's machines: it may compute, and nothing else."""

import ast
import re
import sys
from pathlib import Path

import pytest

import remamba_hf
from remamba_hf.families import ALL_FAMILIES

FOLDER = Path(remamba_hf.__file__).parent / "modeling"
FILES = sorted(FOLDER.glob("*.py"))
# Of the standard library, only what computes. optional_kernels.py imports kernel packages by constant names.
ALLOWED_MODULES = {
    "__future__",
    "abc",
    "collections",
    "contextlib",
    "contextvars",
    "copy",
    "dataclasses",
    "enum",
    "functools",
    "itertools",
    "math",
    "operator",
    "typing",
    "warnings",
    "weakref",
}
ALLOWED_IN = {"optional_kernels.py": {"importlib"}, "recurrent_model.py": {"pathlib"}}
THIRD_PARTY = {"torch", "transformers"}
# Triton's language has names that elsewhere read files.
ALLOWED_ON = {
    "convolution_kernels.py": {"tl"},
    "decode_kernels.py": {"tl", "triton"},
    "note_kernels.py": {"tl"},
    "scan_gradients.py": {"tl"},
    "scan_kernels.py": {"tl"},
    "tail_kernels.py": {"tl"},
    "token_loss.py": {"tl"},
}
FORBIDDEN_NAMES = {
    *("eval", "exec", "compile", "open", "input", "breakpoint", "__import__", "globals", "vars", "setattr", "delattr"),
    *("__builtins__", "__loader__"),
}
FORBIDDEN_ATTRIBUTES = {
    *("environ", "putenv", "getenv", "system", "popen", "spawn", "fork", "hub", "cpp_extension", "load_inline"),
    *("load", "save", "load_library", "jit", "write", "write_text", "write_bytes", "unlink", "mkdir", "__subclasses__"),
    *("__globals__", "__builtins__", "from_file", "tofile", "download_url_to_file", "multiprocessing", "rpc"),
}


def of_an_allowed_owner(node: ast.Attribute, name: str) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ALLOWED_ON.get(name, set())


def violations(source: str, name: str = "file.py") -> list[str]:
    """Everything in a file that must not travel, as `line: reason`."""
    found = []
    tree = ast.parse(source)
    optional = {id(node) for top in tree.body if isinstance(top, ast.Try) for node in ast.walk(top)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            modules = []
        for module in modules:
            root = module.split(".")[0]
            standard = ALLOWED_MODULES | ALLOWED_IN.get(name, set())
            if root == "remamba_hf":
                found.append(f"{node.lineno}: absolute import of the package")
            elif root in sys.stdlib_module_names and root not in standard:
                found.append(f"{node.lineno}: import of {module}")
            elif root not in sys.stdlib_module_names and root not in THIRD_PARTY and id(node) not in optional:
                found.append(f"{node.lineno}: third-party import of {module} outside a top-level try")
            found += [f"{node.lineno}: {module}" for part in module.split(".")[1:] if part in FORBIDDEN_ATTRIBUTES]
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level != 1 or node.module is None or "." in node.module:
                found.append(f"{node.lineno}: a relative import that is not `from .x import y`")
            if any(alias.name == "*" for alias in node.names):
                found.append(f"{node.lineno}: import *")
        if isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            found.append(f"{node.lineno}: {node.id}")
        if isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_ATTRIBUTES and not of_an_allowed_owner(node, name):
            found.append(f"{node.lineno}: .{node.attr}")
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("import_module", "exec_module")
            and "importlib" not in ALLOWED_IN.get(name, ())
        ):
            found.append(f"{node.lineno}: {node.func.attr}")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_files_only_compute(file):
    assert not violations(file.read_text(), file.name)


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.environ['A'] = '1'",
        "import socket",
        "from urllib import request",
        "import subprocess",
        "import pickle",
        "import remamba_hf",
        "from remamba_hf.modeling.selective_scan import selective_scan",
        "from . import selective_scan",
        "from .. import cli",
        "from ..cli import main",
        "from .sub.file import x",
        "from .selective_scan import *",
        "import einops",
        "if True:\n    import einops",
        "def f():\n    import mamba_ssm",
        "import importlib",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.hub.list('x')",
        "from torch.utils.cpp_extension import load_inline",
        "from torch import hub",
        "eval('1')",
        "exec('1')",
        "open('x', 'w')",
        "__import__('os')",
        "def f(path):\n    path.write_text('x')",
    ],
)
def test_the_scan_finds_what_must_not_travel(source):
    assert violations(source)


def test_the_scan_lets_optional_imports_pass():
    assert not violations("try:\n    import mamba_ssm\nexcept ImportError:\n    mamba_ssm = None")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_saving_finds_every_file(file):
    """transformers follows relative imports by a regular expression over lines: it must find what Python imports."""
    source = file.read_text()
    found = set(re.findall(r"^\s*from\s+\.(\S+)\s+import", source, flags=re.MULTILINE))
    found |= set(re.findall(r"^\s*import\s+\.(\S+)\s*$", source, flags=re.MULTILINE))
    imported = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.level}
    assert found == imported
    assert all((FOLDER / f"{module}.py").is_file() for module in imported)


RUN_UNDER_WATCH = """
import importlib.util
sys.dont_write_bytecode = True
import transformers.generation.utils, torch._dynamo  # what transformers itself opens comes before the watch
warm = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1))
warm.generate(torch.tensor([[1, 2]]), max_new_tokens=2)

WATCHED = ("socket.", "subprocess.", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "os.putenv",
           "os.unsetenv", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "shutil.", "pickle.", "urllib.", "tempfile.",
           "ctypes.dlopen", "webbrowser.")
def watch(event, arguments):
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if armed and (writes or event.startswith(WATCHED)):
        raise AssertionError(f"{event} {arguments}")

armed = True
sys.addaudithook(watch)
try:
    open("x", "w")
except AssertionError:
    pass
else:
    raise SystemExit("the watch does not watch")
package = type(sys)("travelling")
package.__path__ = [FOLDER]
sys.modules["travelling"] = package
from travelling.configuration_memmamba import MemMambaConfig
from travelling.configuration_remamba import ReMambaConfig
from travelling.configuration_remamba2 import ReMamba2Config
from travelling.modeling_memmamba import MemMambaForCausalLM
from travelling.modeling_remamba import ReMambaForCausalLM
from travelling.modeling_remamba2 import ReMamba2ForCausalLM
settings = dict(vocab_size=30, hidden_size=16, num_hidden_layers=2, state_size=4)
ids = torch.arange(60).view(2, 30) % 30
for model in (
    ReMambaForCausalLM(ReMambaConfig(**settings)),
    ReMamba2ForCausalLM(ReMamba2Config(**settings, num_heads=4, head_dim=8, n_groups=2)),
    MemMambaForCausalLM(MemMambaConfig(**settings, note_size=8, chunk_size=4, cross_layer_period=1)),
):
    out = model.train()(ids, labels=ids.masked_fill(torch.arange(30) < 20, -100))
    out.loss.backward()
    model.eval().generate(ids, max_new_tokens=3)
    how = {} if model.config.model_type == "memmamba" else {"compress_prompt": False}
    model.generate(ids, max_new_tokens=3, prefill_chunk_length=7, **how)
    RESULTS[model.config.model_type] = out.loss.detach()
armed = False
"""


def test_importing_and_running_touches_nothing(python):
    """No connection, process, environment variable or written file, from import to generation."""
    code = "import transformers\n" + RUN_UNDER_WATCH
    losses = python(code, FOLDER=str(FOLDER))
    assert set(losses) == set(ALL_FAMILIES)
    assert all(loss > 0 for loss in losses.values())
