# SPDX-License-Identifier: Apache-2.0
"""Steady states: where a vector field is zero."""
