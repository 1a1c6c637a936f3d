# SPDX-License-Identifier: Apache-2.0
"""Exceptions of pyro_latentde. Each message says what was expected, what came, where, and what to try."""

__all__ = [
    "CheckpointError",
    "DataError",
    "GradientPathError",
    "InitError",
    "LatentDEError",
    "ShapeError",
    "SolveError",
]


class LatentDEError(Exception):
    """Base class of every error this package raises on purpose."""


class SolveError(LatentDEError):
    """A solve was asked for something impossible, or rows of it failed and ``on_failure="raise"``."""


class GradientPathError(LatentDEError):
    """A gradient that was asked for could not be computed, so it is refused instead of being silently zero."""


class ShapeError(LatentDEError, ValueError):
    """Shapes, dtypes or devices of states, times, parameters or data do not fit together."""


class InitError(LatentDEError):
    """No starting point with a finite log-density and gradient was found."""


class DataError(LatentDEError, ValueError):
    """Observations or times given by the user cannot be used as they are."""


class CheckpointError(LatentDEError):
    """A saved file cannot be read, or does not belong to what it is loaded into."""
