# SPDX-License-Identifier: Apache-2.0
"""Delay differential equations: ``ddesolve``."""
