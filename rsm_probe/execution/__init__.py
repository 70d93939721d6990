"""How work runs: on which device, in how many workers, within how much memory.

`Execution` gathers these choices and is passed through the inside as one thing. Begin with `execution.py`; `devices.py`
knows what a device has room for, `executors.py` runs tasks on threads, processes or a cluster, and `amounts.py` reads
and writes amounts of memory and time.
"""
