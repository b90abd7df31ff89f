# SPDX-License-Identifier: Apache-2.0
"""Evaluation: tasks, metrics, tables and plots."""
