# SPDX-License-Identifier: Apache-2.0
"""Templates of rows side by side."""
