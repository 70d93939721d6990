"""How work runs: on which device, with how many workers, within which memory budget.

`Execution` combines these choices in one object, which is passed through the package. Begin with `execution.py`.
`devices.py` finds devices and their memory, `executors.py` runs tasks on threads, processes or a cluster,
`freed_memory.py` keeps memory for reuse, and `amounts.py` parses and formats amounts of memory and time.
"""

from typing import TYPE_CHECKING

from rsm_probe.faces import lazy_face

if TYPE_CHECKING:
    from rsm_probe.execution.amounts import format_bytes, parse_bytes
    from rsm_probe.execution.devices import find_device
    from rsm_probe.execution.execution import Execution
    from rsm_probe.execution.executors import cluster, processes
    from rsm_probe.execution.freed_memory import keep_freed_memory
else:
    __getattr__, __dir__ = lazy_face(__name__)

__all__ = [
    "Execution",
    "cluster",
    "find_device",
    "format_bytes",
    "keep_freed_memory",
    "parse_bytes",
    "processes",
]
