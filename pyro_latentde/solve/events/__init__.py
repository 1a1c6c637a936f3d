# SPDX-License-Identifier: Apache-2.0
"""Events: where a condition on the state changes sign, and what happens there."""
