# SPDX-License-Identifier: Apache-2.0
"""Kernels of networks: several rows side by side."""
