# SPDX-License-Identifier: Apache-2.0
"""The numerical methods, one record each, by name."""
