# SPDX-License-Identifier: Apache-2.0
"""Engine "torch": rows with steps of their own in plain torch, the readable reference of the fused kernels."""
