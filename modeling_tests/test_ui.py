# SPDX-License-Identifier: Apache-2.0
"""The page's server without a browser: who may ask, what it keeps, where it connects to. `browser/test_page.py` has the page
itself."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import remamba_hf
from remamba_hf import ui
from remamba_hf.cli import main
from remamba_hf.reading import load_for_reading
from remamba_hf.ui import Reader, changed_settings, served

CARDS = Path(remamba_hf.__file__).parent.parent / "model_cards"

needs_cards = pytest.mark.skipif(not CARDS.is_dir(), reason="needs the repository's model_cards/")

connections: list[str] | None = None


def listen(event, arguments):
    if connections is not None and event in ("socket.connect", "socket.getaddrinfo"):
        address = arguments[1] if event == "socket.connect" else arguments[0]
        connections.append(str(address[0] if isinstance(address, tuple) else address))


def get(address, **headers):
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=10) as answer:
        return answer.headers, answer.read()


def upload(address, **headers):
    """Sends a.txt as the page does; gives where the server put it."""
    body = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\ntext\r\n--b--\r\n'
    headers["Content-Type"] = "multipart/form-data; boundary=b"
    request = urllib.request.Request(f"{address}gradio_api/upload", body, headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return Path(json.loads(answer.read())[0])


@pytest.fixture(scope="module")
def reader():
    return Reader(*load_for_reading(str(CARDS / "remamba-tiny"), device="cpu"))


@needs_cards
def test_the_server_keeps_to_itself(reader):
    pytest.importorskip("gradio")
    global connections
    sys.addaudithook(listen)  # cannot be taken away again, only fall silent
    connections = []
    try:
        with served(reader, "<b>name</b>") as address:
            assert address.startswith("http://127.0.0.1:")
            headers, page = get(address)
            assert "default-src 'self'" in headers["content-security-policy"]
            assert b"<b>name" not in page
            _, info = get(f"{address}gradio_api/info")
            assert json.loads(info) == {"named_endpoints": {}, "unnamed_endpoints": {}}
            with pytest.raises(urllib.error.HTTPError):
                get(f"{address}gradio_api/file={CARDS / 'remamba-tiny' / 'config.json'}")
            with pytest.raises(urllib.error.HTTPError, match="400"):
                get(address, Host="elsewhere.example")
            with pytest.raises(urllib.error.HTTPError, match="403"):
                upload(address, **{"Sec-Fetch-Site": "cross-site"})
            file = upload(address, **{"Sec-Fetch-Site": "same-origin"})
            assert file.read_text() == "text"
            folder = file.parent.parent
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            with pytest.raises(ValueError, match="--port"), served(reader, "a", port=int(address[:-1].rpartition(":")[2])):
                pass
        assert not folder.exists()
        assert set(connections) <= {"127.0.0.1", "localhost"}
        assert connections  # the hook listens
    finally:
        connections = None


@needs_cards
def test_the_command_refuses_what_it_cannot_serve(tmp_path, capsys):
    pytest.importorskip("gradio")
    untokenized = tmp_path / "untokenized"
    shutil.copytree(CARDS / "remamba-tiny", untokenized, ignore=shutil.ignore_patterns("tokenizer*"))
    for model_type in ("mamba", "llama"):
        (tmp_path / model_type).mkdir()
        (tmp_path / model_type / "config.json").write_text(json.dumps({"model_type": model_type}))
    for name, message in (
        ("untokenized", "has no tokenizer"),
        ("mamba", "Convert it first: remamba convert"),
        ("llama", "Give a ReMamba or ReMamba-2 or MemMamba checkpoint"),
        ("missing", "no folder"),
    ):
        assert main(["ui", "--model", str(tmp_path / name)]) == 1
        out, err = capsys.readouterr()
        assert message in err
        assert not out
        assert "Traceback" not in err


@needs_cards
@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGTERM")
def test_a_terminated_command_leaves_no_files(tmp_path):
    pytest.importorskip("gradio")
    command = [sys.executable, "-m", "remamba_hf.cli", "ui", "--model", str(CARDS / "remamba-tiny"), "--device", "cpu"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(CARDS.parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as process:
        try:
            address = process.stdout.readline()
            assert address.startswith("http://127.0.0.1:"), address
            assert list(tmp_path.glob("remamba-ui-*"))
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("remamba-ui-*"))


def test_without_gradio_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(ui.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"remamba_hf\[ui\]"):
        ui.serve("nowhere")


def test_only_changed_settings_are_given():
    config = remamba_hf.ReMambaConfig(compression_span=0.3, compression_ratio=0.1)
    assert changed_settings(config, True, (0.0, 0.3, 0.1)) == {}
    assert changed_settings(config, True, (0.0, 0.5, None)) == {"compression_span": 0.5}
    assert changed_settings(config, False, (0.0, 0.5, 0.1)) == {"compress_prompt": False}
