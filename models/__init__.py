# SPDX-License-Identifier: Apache-2.0
"""The model zoo, installed as ``pyro_latentde.models``."""

# Run from the repository's root, a bare ``import models`` would make second copies of every class.
if __name__ != "pyro_latentde.models":
    raise ImportError(
        f"the model zoo was imported as {__name__!r}; it has one name only: "
        "write `from pyro_latentde.models import systems` (or `import pyro_latentde.models`)."
    )

from pyro_latentde.models import systems
from pyro_latentde.models.goku import GOKU
from pyro_latentde.models.latent_events import LatentEvents
from pyro_latentde.models.latent_ode import LatentODE
from pyro_latentde.models.latents import Latent
from pyro_latentde.models.population import Population, Varying
from pyro_latentde.models.shooting import Shooting

__all__ = [
    "GOKU",
    "Latent",
    "LatentEvents",
    "LatentODE",
    "Population",
    "Shooting",
    "Varying",
    "systems",
]
