# SPDX-License-Identifier: Apache-2.0
"""The `remamba` command: doctor, convert, generate, ui, eval, card."""

import argparse
import contextlib
import importlib.metadata
import platform
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .command_options import add_compression_settings, at_least_zero, compression_settings, flag, positive
from .families import ALL_FAMILIES, Family
from .modeling.configuration_memmamba import MemMambaConfig

# Errors are sentences for users: they go to stderr alone, with this exit status. --debug shows the traceback instead.
_FAILED = 1
_PACKAGES = ("torch", "transformers", "mamba-ssm", "causal-conv1d", "triton", "peft", "accelerate", "safetensors")
# Fields of MemMamba's configuration, each with the type of its default.
_MEMORY_SETTINGS = {
    "note_size": "size of a note",
    "pool_size": "notes that a layer keeps",
    "note_heads": "heads of the attention over notes",
    "chunk_size": "tokens after which notes can be read",
    "cross_layer_period": "every such layer also reads notes of the layers below; 0: none",
    "cross_layer_group": "of how many layers below",
    "write_rule": "which notes stay: priority, fifo or periodic",
    "recency_weight": "what a token of age takes from the logarithm of a score",
    "write_threshold": "tau1: tokens with a write score of at most this leave no note",
    "read_threshold": "tau2: tokens whose read gate is at most this read nothing",
    "write_period": "of the periodic rule: tokens of a period",
    "write_span": "of the periodic rule: tokens at its beginning that leave notes",
    "write_cost": "weight of the cost of writing in the loss of a training step",
    "fusion": "how what is read joins a token: gated, residual, weighted, elementwise or conv1d",
    "fusion_position": "pre or post: before or behind the mixer",
    "pooling": "what a note stands for: none (its token), max or mean of the last tokens",
    "pooling_window": "how many tokens a pooled note stands for",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    if not options.debug:
        logging.set_verbosity_error()
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("\nremamba: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        if options.debug:
            raise
        print(f"remamba {options.command}: {error}", file=sys.stderr)
        return _FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="remamba", description="Mamba that reads long documents.")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' own messages")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="which kernels are active, which are not, why, and what to install")
    doctor.set_defaults(run=_doctor)
    _add_convert(commands.add_parser("convert", help="make a ReMamba or MemMamba checkpoint from a Mamba checkpoint"))
    _add_generate(commands.add_parser("generate", help="read a long document and answer a question about it"))
    _add_ui(commands.add_parser("ui", help="the same on a page in the browser"))
    _add_eval(commands.add_parser("eval", help="measure a model on a benchmark"))
    _add_card(commands.add_parser("card", help="write results of eval into a model's card"))
    return parser


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Makes a ReMamba or MemMamba checkpoint from a Mamba-1, or a ReMamba-2 checkpoint from a Mamba-2, in transformers' "
        "or in the original state-spaces format, and if given from an adapter that was trained on it. The result is "
        "verified by logits before OUTPUT appears."
    )
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub id of the Mamba checkpoint")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="the folder to write")
    parser.add_argument(
        "--to",
        choices=tuple(ALL_FAMILIES),
        help="the family to make; default: the one of SOURCE's architecture that compresses prompts",
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of SOURCE on the Hub")
    parser.add_argument("--adapter", metavar="ADAPTER", help="folder or Hub id of a PEFT adapter trained on SOURCE")
    parser.add_argument("--adapter-revision", metavar="REV")
    parser.add_argument(
        "--merge",
        choices=("untied", "tied"),
        default="untied",
        help="untied: exactly the trained model, embeddings and head apart; tied: both updates in the one tensor that "
        "they share, as the authors merge (default: %(default)s)",
    )
    parser.add_argument(
        "--init-compressor", action="store_true", help="start Query, Key and Value from layer 0 as in the paper"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: SOURCE's")
    parser.add_argument("--tokenizer", metavar="TOKENIZER", help="folder or Hub id to copy the tokenizer from")
    parser.add_argument("--tokenizer-revision", metavar="REV")
    add_compression_settings(parser, "; written into the configuration")
    memory = parser.add_argument_group("settings of the memory", "with --to memmamba; written into the configuration")
    for name, text in _MEMORY_SETTINGS.items():
        default = getattr(MemMambaConfig, name)
        note = f"{text} (default: {default})"
        memory.add_argument(flag(name), type=type(default), metavar=type(default).__name__.upper(), help=note)
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it is a checkpoint")
    parser.set_defaults(run=_convert)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.description = "Reads a document, answers, and prints on stderr what was kept or noted of it and how long it took."
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="folder or Hub id of a ReMamba, ReMamba-2 or MemMamba checkpoint"
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of MODEL on the Hub")
    document = parser.add_mutually_exclusive_group(required=True)
    document.add_argument("--prompt-file", type=Path, metavar="FILE", help="a text file in UTF-8; - reads stdin")
    document.add_argument("--prompt", metavar="TEXT")
    parser.add_argument("--question", metavar="TEXT", help="asked behind the document; without it the text is continued")
    parser.add_argument("--max-new-tokens", type=positive, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--temperature", type=at_least_zero, default=0.0, metavar="T", help="0 takes the likeliest token (the default)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--no-compression", action="store_true", help="read as plain Mamba does")
    parser.add_argument("--compare-plain", action="store_true", help="also answer without compression")
    add_compression_settings(parser, "; default: the checkpoint's")
    parser.add_argument(
        "--prefill-chunk-length",
        type=positive,
        default=4096,
        metavar="N",
        help="tokens read at a time: bounds memory, does not change the result (default: %(default)s)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default: cuda where there is one")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="save a picture of what was kept or noted (png, pdf, svg)")
    parser.add_argument("--stream", action=argparse.BooleanOptionalAction, default=True, help="print the answer as it comes")
    parser.set_defaults(run=_generate)


def _add_ui(parser: argparse.ArgumentParser) -> None:
    parser.description = "Serves a page on which a long document is asked, and what was kept or noted of it is marked."
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="folder or Hub id of a ReMamba, ReMamba-2 or MemMamba checkpoint"
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of MODEL on the Hub")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="0.0.0.0 lets other machines reach the page, and whoever does may ask (default: %(default)s, this one only)",
    )
    parser.add_argument("--port", type=positive, metavar="N", help="default: the first free one from 7860 on")
    parser.add_argument(
        "--prefill-chunk-length",
        type=positive,
        default=4096,
        metavar="N",
        help="tokens read at a time; a reading can be stopped between two chunks (default: %(default)s)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default: cuda where there is one")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.set_defaults(run=_ui)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    from .evaluation.eval_cli import COMMANDS  # imports nothing that a task needs

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "remamba eval TASK --model MODEL ..."
    tasks = "\n".join(f"  {name:12} {command.help}" for name, command in COMMANDS.items())
    parser.description = f"Measures a model. Every TASK has options of its own: remamba eval TASK --help\n\n{tasks}"
    parser.add_argument("task", metavar="TASK", choices=tuple(COMMANDS), help="what to measure")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(run=_eval)


def _add_card(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes results into FOLDER/README.md as the Hub reads them: the front matter's model-index, .eval_results/ for "
        "what was measured on a dataset of the Hub, and tables in the text. Give all files at once: results that an earlier "
        "run wrote are replaced. All else in the card stays as it is."
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder of the checkpoint; a missing card is made")
    parser.add_argument(
        "--results", nargs="+", required=True, type=Path, metavar="FILE", help="JSON files that remamba eval wrote"
    )
    parser.add_argument(
        "--dataset",
        nargs="+",
        default=[],
        metavar="TASK=ID",
        help="the Hub's dataset that a task's local files are of, such as longbench_e=THUDM/LongBench; without it only what "
        "was read from the Hub, and not with --limit, has an entry in .eval_results/",
    )
    parser.add_argument(
        "--books-dataset",
        metavar="ID",
        help="the same for the books of passkey, documents, perplexity, recall and fidelity, such as deepmind/pg19",
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would change, and change nothing")
    parser.set_defaults(run=_card)


def _given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Settings of compression and memory, as far as the command has them and they were given."""
    memory = {name: getattr(options, name, None) for name in _MEMORY_SETTINGS}
    return {**compression_settings(options), **{name: value for name, value in memory.items() if value is not None}}


def _doctor(options: argparse.Namespace) -> int:
    import torch

    from .modeling.optional_kernels import KERNELS, load_kernel

    print(f"python          {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in _PACKAGES:
        print(f"{package:15} {_version(package) or 'not installed'}")
    cuda = torch.cuda.is_available()
    print(f"CUDA            {_cuda_devices() if cuda else _no_cuda_reason()}\n")

    unusable: dict[str, list[str]] = {}
    for name, kernel in KERNELS.items():
        function, reason = load_kernel(name)
        if function is None:
            unusable.setdefault(kernel.package, []).append(name)
        state = "not usable" if function is None else "active" if cuda else "installed, idle without a CUDA device"
        users = ", ".join(family.name for family in ALL_FAMILIES.values() if name in family.kernels)
        print(f"{name:24} {state:12} ({kernel.package}, for {users}){f': {_one_line(reason)}' if reason else ''}")
    print()
    if not unusable:
        print("All kernels can be used." if cuda else "Kernels run on CUDA tensors only: here torch operators do the work.")
        return 0
    print("Without these kernels torch operators do the same work, with the same results, slower on CUDA.")
    if not cuda:
        print("They act on CUDA tensors only, so there is nothing to install for this machine.")
        return 0
    for package, names in unusable.items():
        print(f"For {', '.join(names)}: {_how_to_install(package)}")
    return 0


def _how_to_install(package: str) -> str:
    if _version(package) is None:
        return f'pip install --no-build-isolation "{package}", or pip install "remamba_hf[kernels]" for all of them'
    return (
        f"{package} {_version(package)} is installed, but its extension does not load with this torch. Build it for this "
        f"one: pip install --no-build-isolation --no-binary :all: --no-deps --force-reinstall {package}"
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda_devices() -> str:
    import torch

    names = [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}: {', '.join(names)}"


def _no_cuda_reason() -> str:
    import torch

    built = torch.version.cuda
    return f"no device found (torch is built for CUDA {built})" if built else "no: torch is built without it"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _convert(options: argparse.Namespace) -> int:
    from .conversion import convert_checkpoint

    report = convert_checkpoint(
        options.source,
        options.output,
        to=options.to,
        revision=options.revision,
        adapter=options.adapter,
        adapter_revision=options.adapter_revision,
        merge=options.merge,
        initialize_compressor=options.init_compressor,
        dtype=options.dtype,
        tokenizer=options.tokenizer,
        tokenizer_revision=options.tokenizer_revision,
        settings=_given_settings(options),
        overwrite=options.overwrite,
    )
    tied = "tied" if report.tied else "not tied"
    print(f"{report.output}: {report.kind}, {report.parameters:,} parameters, {report.dtype}, {tied}")
    for what, error in report.checks.items():
        print(f"verified: {what}: largest difference {error:.1e} of the largest logit")
    for note in report.notes:
        print(f"note: {note}")
    return 0


def _generate(options: argparse.Namespace) -> int:
    import torch

    from .notes_picture import plot_notes
    from .reading import check_picture, family_of, load_for_reading, plot_kept

    document = _document(options)
    if options.plot is not None:
        check_picture(options.plot)
        if options.no_compression:
            raise ValueError("--plot shows what was kept: leave out --no-compression.")
    if options.no_compression and (options.compare_plain or _given_settings(options)):
        raise ValueError("--no-compression leaves nothing to set or compare: leave out --compression-* and --compare-plain.")
    family = family_of(options.model, options.revision)
    if not family.compresses:
        _check_nothing_to_compress(options, family)
    if not options.debug:
        logging.disable_progress_bar()  # of loading weights
    model, tokenizer = load_for_reading(options.model, options.revision, options.device, options.dtype)
    torch.manual_seed(options.seed)
    compression = {"compress_prompt": False} if options.no_compression else _given_settings(options)
    reading = _read(options, model, tokenizer, document, **compression)
    print(reading.report(), file=sys.stderr)
    if options.plot is not None:
        (plot_kept if family.compresses else plot_notes)(reading, options.plot)
        print(f"plot     {options.plot}", file=sys.stderr)
    if options.compare_plain:
        print("\nwithout compression:", file=sys.stderr)
        plain = _read(options, model, tokenizer, document, compress_prompt=False)
        print(plain.report(), file=sys.stderr)
    return 0


def _ui(options: argparse.Namespace) -> int:
    from .ui import serve

    if not options.debug:
        logging.disable_progress_bar()  # of loading weights
    with _sigterm_exits():
        serve(
            options.model,
            options.revision,
            device=options.device,
            dtype=options.dtype,
            host=options.host,
            port=options.port,
            prefill_chunk_length=options.prefill_chunk_length,
            ready=lambda address: print(f"{address}  (Ctrl+C ends it)", flush=True),
        )
    return 0


@contextlib.contextmanager
def _sigterm_exits() -> Iterator[None]:
    """`kill`, and what ends services and containers, lets files be deleted as Ctrl+C does."""
    if threading.current_thread() is not threading.main_thread():  # others can set no handler
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _eval(options: argparse.Namespace) -> int:
    from .evaluation.eval_cli import COMMANDS

    if not options.debug:
        logging.disable_progress_bar()  # of loading weights
    COMMANDS[options.task].run(options.arguments, f"remamba eval {options.task}")
    return 0


def _card(options: argparse.Namespace) -> int:
    from .evaluation.card import named_datasets, plan_update

    if not options.debug:
        logging.disable_progress_bar()  # of loading weights
    datasets = named_datasets(options.dataset, options.books_dataset)
    update = plan_update(options.folder, options.results, datasets)
    for note in update.notes:
        print(f"note: {note}", file=sys.stderr)
    if options.dry_run:
        print("".join(change.diff(options.folder) for change in update.changes), end="")
    else:
        update.apply()
    done = "would be changed" if options.dry_run else "changed"
    files = ", ".join(change.path.relative_to(options.folder).as_posix() for change in update.changes)
    print(
        f"{options.folder}: {update.scores} numbers; {f'{done}: {files}' if files else 'all there already'}", file=sys.stderr
    )
    return 0


def _check_nothing_to_compress(options: argparse.Namespace, family: Family) -> None:
    switches = [name for name in ("no_compression", "compare_plain") if getattr(options, name)]
    given = [flag(name) for name in (*_given_settings(options), *switches)]
    if given:
        raise ValueError(f"{options.model} is a {family.name}, which compresses no prompts: leave out {', '.join(given)}.")


def _read(options: argparse.Namespace, model: Any, tokenizer: Any, document: str, **compression: Any) -> Any:
    """One reading with its progress bar; the answer goes to stdout, as it comes or at the end."""
    from transformers import TextStreamer

    from .reading import prefill_bar, read_and_answer

    sampling: dict[str, Any] = {"do_sample": options.temperature > 0}
    if options.temperature > 0:
        sampling["temperature"] = options.temperature
    with prefill_bar() as progress:
        reading = read_and_answer(
            model,
            tokenizer,
            document,
            options.question,
            max_new_tokens=options.max_new_tokens,
            prefill_progress=progress,
            prefill_chunk_length=options.prefill_chunk_length,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if options.stream else None,
            **compression,
            **sampling,
        )
    if not options.stream:
        print(reading.answer)
    return reading


def _document(options: argparse.Namespace) -> str:
    if options.prompt is not None:
        return options.prompt
    if str(options.prompt_file) == "-":
        return sys.stdin.read()
    try:
        return options.prompt_file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{options.prompt_file} is not a text file in UTF-8. Convert it to UTF-8 first.") from None
    except OSError as error:
        raise ValueError(f"Cannot read {options.prompt_file}: {error.strerror}. Check the path.") from None


if __name__ == "__main__":
    sys.exit(main())
