# SPDX-License-Identifier: Apache-2.0
"""Everything that travels with a checkpoint: imports torch, transformers and, by `from .x import y`, its own files."""
