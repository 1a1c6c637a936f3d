# SPDX-License-Identifier: Apache-2.0
"""Amortized guides: context in, distribution out."""

__all__: list[str] = []
