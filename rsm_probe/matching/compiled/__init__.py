"""The auction for CPU and GPU, and loops of the cheaper methods, compiled on first use.

Begin with `cpu_auction.py`. `gpu_auction.py` is the same auction as a Triton program, and `gpu_batches.py` prepares its
batches. On CPUs, `simd.py` selects the auction's searches: vector instructions (`numba_internals.py`, the only module
that uses internals of Numba and llvmlite) or plain Numba (`plain_searches.py`).
"""
