# SPDX-License-Identifier: Apache-2.0
"""Everything that travels with a checkpoint. Imports only torch and transformers, and its own files as `from .x import y`."""
