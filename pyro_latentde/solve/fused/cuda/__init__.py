# SPDX-License-Identifier: Apache-2.0
"""Kernels on CUDA: the same source, one thread for each row."""
