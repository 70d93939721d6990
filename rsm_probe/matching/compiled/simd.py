"""The searches that dominate the auction's time: by vector instructions or in plain Numba.

Both give the same matchings to the last bit; plain Numba takes two to four times as long. It is used if the
environment variable `RSM_PROBE_SIMD` is 0, or if vector instructions do not compile.
"""

from __future__ import annotations

import warnings

import numpy as np
from numba import NumbaError, njit

from rsm_probe.execution.devices import vector_instructions
from rsm_probe.matching.compiled.plain_searches import (
    CANDIDATE_LANES,
    FEWEST_FOR_CANDIDATES,
    LANES,
    lowest_value,
)


def _do_vectors_compile():
    try:
        from rsm_probe.matching.compiled.numba_internals import search_once

        square = np.ones((1, LANES), np.float32)
        difference = search_once(square, np.zeros((1, CANDIDATE_LANES), np.int32), square[0])
    except (AttributeError, ImportError, LookupError, NumbaError, RuntimeError, TypeError, ValueError) as error:
        warnings.warn(
            f"matching on CPUs takes two to four times as long: its vector instructions do not compile ({error}); "
            f"RSM_PROBE_SIMD=0 chooses plain Numba without this warning",
            stacklevel=2,
        )
        return False
    return difference == 0


VECTORISED = vector_instructions() and _do_vectors_compile()
if VECTORISED:
    from rsm_probe.matching.compiled.numba_internals import (
        best_candidate,
        best_in_float64,
        best_lanes,
        lanes_above,
        lowest_bit,
    )
else:
    from rsm_probe.matching.compiled.plain_searches import (
        best_candidate,
        best_in_float64,
        best_lanes,
        lanes_above,
        lowest_bit,
    )

__all__ = [
    "CANDIDATE_LANES",
    "FEWEST_FOR_CANDIDATES",
    "LANES",
    "best_candidate",
    "best_in_float64",
    "best_lanes",
    "compiled",
    "lanes_above",
    "lowest_bit",
    "lowest_value",
]


def compiled(function=None, **options):
    """Let Numba compile a function on first use and cache it on disk; the function releases the GIL."""
    if function is None:
        return lambda decorated: compiled(decorated, **options)
    if not VECTORISED:  # Numba's cache key ignores which functions a function calls
        function.__qualname__ = f"plain.{function.__qualname__}"
    return njit(cache=True, nogil=True, **options)(function)
