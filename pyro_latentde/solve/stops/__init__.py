# SPDX-License-Identifier: Apache-2.0
"""What happens at known times: doses, inputs with jumps, and steps that end there."""
