"""The auction for CPU and GPU, and the loops of the cheaper methods, compiled on first use.

Begin with `cpu_auction.py`; `gpu_auction.py` is the same auction as a Triton program, and `gpu_batches.py` decides what
is sent to it. On CPUs, `simd.py` chooses the auction's searches: by vector instructions
(`numba_internals.py`, which alone touches the insides of Numba and llvmlite) or in plain Numba (`plain_searches.py`).
"""
