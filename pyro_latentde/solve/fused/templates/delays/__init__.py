# SPDX-License-Identifier: Apache-2.0
"""Templates of delay equations."""
