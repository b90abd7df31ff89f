# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share."""

import argparse
from typing import Any

# Of a configuration's `compression_NAME`: type, sign in the help, meaning.
COMPRESSION_SETTINGS = (
    ("start", float, "S", "where the window begins, as a share of the prompt"),
    ("span", float, "P", "the window's length as a share of the prompt"),
    ("ratio", float, "RHO", "share of the window that is kept (given here, compression_max_kept does not bound it)"),
)


def add_compression_settings(parser: argparse.ArgumentParser, note: str) -> None:
    """`--compression-start`, `--compression-span` and `--compression-ratio`; `note` ends the help of each."""
    for name, kind, metavar, text in COMPRESSION_SETTINGS:
        parser.add_argument(flag(f"compression_{name}"), type=kind, metavar=metavar, help=text + note)


def compression_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Those that were given, by the names that a configuration and `generate` have for them."""
    names = [f"compression_{name}" for name, *_ in COMPRESSION_SETTINGS]
    return {name: getattr(options, name) for name in names if getattr(options, name, None) is not None}


def positive(text: str) -> int:
    """The type of options that count something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def at_least_zero(text: str) -> float:
    """The type of options that measure something."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError("must be a finite number of at least 0")
    return value


def flag(setting: str) -> str:
    """A setting's name on the command line."""
    return f"--{setting.replace('_', '-')}"
