# SPDX-License-Identifier: Apache-2.0
"""A page in the browser: give a long document, ask, and see what of it was kept or noted, and what it cost.

`remamba ui` serves it with Gradio. The page talks to no other host and sends no telemetry.
"""

import contextlib
import importlib.util
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .reading import load_for_reading
from .ui_html import CSS, error_html, escaped, status_html
from .ui_reader import MAX_DOCUMENT_BYTES, SUFFIXES, Reader, answer_events, document_of

_SETTINGS = {
    "compression_start": "where the window begins, as a share of the prompt",
    "compression_span": "how long the window is, as a share of the prompt",
    "compression_ratio": "how much is kept, as a share of the window",
}
_HEADERS = (
    # Nothing outside this server is loaded, whatever Gradio's own files ask for.
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        b"img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
        b"object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    ),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
_LOOPBACK = ("127.0.0.1", "localhost")
_SECONDS_OF_A_DAY = 86_400


def changed_settings(config: Any, compress: bool, values: Sequence[float | None]) -> dict[str, Any]:
    """Options of `generate`: only what differs from the model's own, since a ratio that is given lifts
    `compression_max_kept`."""
    if not compress:
        return {"compress_prompt": False}
    pairs = zip(_SETTINGS, values, strict=True)
    return {name: float(value) for name, value in pairs if value is not None and value != getattr(config, name)}


def build_page(reader: Reader, name: str) -> Any:
    """The page as `gradio.Blocks`; `name`: the model's, for the heading."""
    _check_gradio()
    import gradio as gr

    config, family = reader.model.config, reader.family
    device = f"{reader.model.device}, {str(reader.model.dtype).removeprefix('torch.')}"
    about = f"{name}, a {family.name}, on {device}"
    with gr.Blocks(title=f"{name} · remamba", analytics_enabled=False, delete_cache=(3600, _SECONDS_OF_A_DAY)) as page:
        gr.HTML(f"<h2>Ask a long document</h2><div class='remamba-note'>{escaped(about)}</div>")
        with gr.Row(equal_height=False):
            with gr.Column(scale=5):
                text, path, question = _document_fields(gr)
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", elem_id="ask")
                    stop = gr.Button("Stop", interactive=False, elem_id="stop")
                settings, length = _settings(gr, config, family.compresses)
            with gr.Column(scale=6):
                status = gr.HTML(status_html("Paste or drop a document and ask."), elem_id="status")
                answer = gr.Textbox(label="Answer", lines=2, interactive=False, elem_id="answer", buttons=["copy"])
                facts, strip, passages = (gr.HTML(elem_id=part) for part in ("facts", "strip", "passages"))
        shown = {"status": status, "answer": answer, "facts": facts, "strip": strip, "passages": passages}

        def on_ask(
            request: gr.Request, text: str, path: str | None, question: str, length: float | None, *settings: Any
        ) -> Iterator[dict[Any, Any]]:
            compression = changed_settings(config, settings[0], settings[1:]) if settings else {}
            session = str(request.session_hash)
            for event in answer_events(reader, session, text, path, question, length, compression):
                buttons = {}
                if "running" in event:
                    running = event.pop("running")
                    buttons = {ask: gr.update(interactive=not running), stop: gr.update(interactive=running)}
                yield {**{shown[part]: value for part, value in event.items()}, **buttons}

        def on_stop(request: gr.Request) -> None:
            reader.stop(str(request.session_hash))

        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        gr.on(
            [ask.click, question.submit],
            on_ask,
            [text, path, question, length, *settings],
            [*shown.values(), ask, stop],
            trigger_mode="once",
            concurrency_limit=16,  # the reader has its own line of one; this only bounds how many wait in it
            **quiet,
        )
        stop.click(on_stop, None, None, queue=False, **quiet)
        path.change(_on_file, path, status, queue=False, **quiet)
        page.unload(on_stop)
    return page


def _document_fields(gr: Any) -> tuple[Any, Any, Any]:
    """Text, file and question."""
    text = gr.Textbox(
        label="Document",
        lines=12,
        max_lines=12,  # a box that grows measures the whole text at every change
        autoscroll=False,
        placeholder="Paste a long text",
        elem_id="document",
    )
    path = gr.File(
        label=f"or a file ({', '.join(SUFFIXES)}; UTF-8; up to {MAX_DOCUMENT_BYTES >> 20} MB), read instead",
        file_types=list(SUFFIXES),
        height=150,
        elem_id="file",
    )
    question = gr.Textbox(label="Question", placeholder="Without one the text is continued", elem_id="question", lines=1)
    return text, path, question


def _settings(gr: Any, config: Any, compresses: bool) -> tuple[list[Any], Any]:
    """The fields of the settings: of the compression where the model has one, and the answer's length."""
    fields = []
    with gr.Accordion("Settings", open=False):
        if compresses:
            fields.append(gr.Checkbox(True, label="compress the document", elem_id="compress"))
            with gr.Row():
                for name, info in _SETTINGS.items():
                    own = getattr(config, name)
                    fields.append(gr.Number(own, label=name, info=f"{info}; the model's: {own:g}", elem_id=name))
        length = gr.Number(64, label="new tokens at most", precision=0, elem_id="length")
    return fields, length


def _on_file(path: str | None) -> str:
    """What the status says once a file was dropped, before anybody asks."""
    try:
        return status_html(f"{len(document_of(None, path)):,} characters in the file." if path else "")
    except (ValueError, OSError) as error:
        return error_html(str(error))


def _check_gradio() -> None:
    """Tells Gradio, before it is imported, to send and to keep nothing; says what to do where it cannot be imported."""
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False")
    if importlib.util.find_spec("gradio") is None:
        raise ValueError('The page needs gradio: pip install "remamba_hf[ui]"')


class _OwnPageOnly:
    """ASGI middleware: refuses what pages of other sites send, and adds headers that keep this page to its server."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *_HEADERS]}
            await send(message)

        if scope["type"] == "http" and scope["method"] == "POST" and (b"sec-fetch-site", b"cross-site") in scope["headers"]:
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"Only this server's own page may ask."})
        else:
            await self.app(scope, receive, send_with_headers)


@contextlib.contextmanager
def served(reader: Reader, name: str, host: str = "127.0.0.1", port: int | None = None) -> Iterator[str]:
    """Serves the page in threads of its own, and gives its address. At the end the reader is closed, and the files that were
    dropped are gone. It is never shared through Gradio's servers.

    Args:
        reader, name: as for `build_page`.
        host, port: as for `serve`.

    Raises:
        ValueError: gradio is not installed, the port is taken, or this machine has no such host.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_private_uploads())
        page = build_page(reader, name)
        stack.callback(page.close, verbose=False)
        stack.callback(reader.close)  # first of all, so that nobody waits for an answer while the server ends
        yield _launch(page, host, port)


@contextlib.contextmanager
def _private_uploads() -> Iterator[None]:
    """A folder for dropped files that only this user can read; Gradio's own is everybody's."""
    variable = "GRADIO_TEMP_DIR"
    before = os.environ.get(variable)
    with tempfile.TemporaryDirectory(prefix="remamba-ui-", ignore_cleanup_errors=True) as folder:
        os.environ[variable] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[variable]
            else:
                os.environ[variable] = before


def _launch(page: Any, host: str, port: int | None) -> str:
    _check_gradio()
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    # A name of another site that leads to this machine (DNS rebinding) is not this page's.
    hosts = list(_LOOPBACK) if host in _LOOPBACK else ["*"]
    try:
        _, address, _ = page.queue(max_size=64, api_open=False).launch(
            server_name=host,
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            max_file_size=MAX_DOCUMENT_BYTES,
            theme=_theme(gr),
            css=CSS,
            app_kwargs={
                "middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=hosts), Middleware(_OwnPageOnly)],
                "docs_url": None,
                "redoc_url": None,
                "openapi_url": None,
            },
        )
    except OSError:  # Gradio's message names its own arguments
        place = host if port is None else f"{host}, port {port}"
        fix = "It is taken, or not this machine's: give another --port or --host."
        raise ValueError(f"The page cannot be served at {place}. {fix}") from None
    return str(address)


def _theme(gr: Any) -> Any:
    """Fonts that are on every machine, and grey that can be read."""
    fonts = {"font": ["ui-sans-serif", "system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return gr.themes.Default(**fonts).set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500")


def serve(
    checkpoint: str,
    revision: str | None = None,
    *,
    device: str | None = None,
    dtype: str = "auto",
    host: str = "127.0.0.1",
    port: int | None = None,
    prefill_chunk_length: int = 4096,
    ready: Callable[[str], None] = print,
) -> None:
    """Serves the page until it is interrupted (KeyboardInterrupt).

    Args:
        checkpoint, revision, device, dtype: as for `load_for_reading`.
        host: 127.0.0.1 can be reached from this machine only; 0.0.0.0 from everywhere, and whoever reaches it may ask.
        port: default: the first free one from 7860 on.
        prefill_chunk_length: tokens read at a time; a reading can be stopped between two chunks.
        ready: called with the page's address.

    Raises:
        CheckpointError: what `load_for_reading` refuses.
        ValueError: gradio is not installed, a tokenizer that `Reader` refuses, or the page cannot be served there.
    """
    _check_gradio()  # before the model is loaded
    reader = Reader(*load_for_reading(checkpoint, revision, device, dtype), prefill_chunk_length)
    folder = Path(checkpoint).expanduser()
    with served(reader, folder.resolve().name if folder.is_dir() else checkpoint, host, port) as address:
        ready(address)
        threading.Event().wait()
