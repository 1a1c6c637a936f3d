# SPDX-License-Identifier: Apache-2.0
"""Whether the plates around a site have the sizes of its batch."""

from collections.abc import Sequence

from pyro.poutine.runtime import get_plates

from pyro_latentde.errors import ShapeError

__all__ = ["check_plate_sizes"]


def check_plate_sizes(batch: Sequence[int]) -> None:
    """Refuse a batch that the enclosing plates do not fit, before Pyro does without a word of what to try.

    Args:
        batch: batch shape of a site.

    Raises:
        ShapeError: a plate whose dimension of the batch has another size than the plate, and is not 1.

    Example:
        >>> import pyro
        >>> with pyro.plate("people", 4):
        ...     check_plate_sizes((4,))
    """
    batch = tuple(batch)
    for frame in get_plates():
        if frame.dim is None or frame.size == -1 or -frame.dim > len(batch) or batch[frame.dim] in (1, frame.size):
            continue
        elsewhere = [i - len(batch) for i, size in enumerate(batch) if size == frame.size]
        hint = f"dim={elsewhere[-1]} for the plate, where the batch has {frame.size}; or " if elsewhere else ""
        raise ShapeError(
            f"the batch shape is {batch}, but plate {frame.name!r} around the site has size {frame.size} at dim "
            f"{frame.dim}. Try: {hint}a plate of size {batch[frame.dim]}, such as series_plate(series); or index what "
            "goes into the site by the plate, `with pyro.plate(...) as i: ... y0[i]`."
        )
