"""How work runs: on which device, in how many workers, within how much memory.

`Execution` gathers these choices and is passed through the inside as one thing. Begin with `execution.py`; `devices.py`
knows what a device has room for, `executors.py` runs tasks on threads, processes or a cluster, and `amounts.py` reads
and writes amounts of memory and time.
"""

from typing import TYPE_CHECKING

from rsm_probe.faces import lazy_face

if TYPE_CHECKING:
    from rsm_probe.execution.amounts import format_bytes, parse_bytes
    from rsm_probe.execution.devices import find_device
    from rsm_probe.execution.execution import Execution
    from rsm_probe.execution.executors import cluster
else:
    __getattr__, __dir__ = lazy_face(__name__)

__all__ = [
    "Execution",
    "cluster",
    "find_device",
    "format_bytes",
    "parse_bytes",
]
