# SPDX-License-Identifier: Apache-2.0
"""Control of the compiled kernels: threads and caches."""

from pyro_latentde.solve.vector_field import clear_fields

__all__ = ["clear_cache", "set_num_threads"]


def set_num_threads(threads: int) -> None:
    """Set how many threads the compiled kernels use; results do not depend on it.

    Args:
        threads: At least 1. The default is the number of CPUs this process may use.

    Raises:
        ValueError: For less than one thread.

    Example:
        >>> import pyro_latentde as lde
        >>> lde.set_num_threads(2)
    """
    if threads < 1:
        raise ValueError(f"set_num_threads expects at least 1 thread, got {threads}")
    try:
        from pyro_latentde.solve.fused.cpu import set_pool_size
    except ImportError:  # no llvmlite, no kernels
        return
    set_pool_size(threads)


def clear_cache() -> None:
    """Forget every compiled kernel, in memory and on disk.

    Example:
        >>> import pyro_latentde as lde
        >>> lde.clear_cache()
    """
    clear_fields()
    try:
        from pyro_latentde.solve.fused.kernel_cache import remove_files
    except ImportError:
        return
    remove_files()
