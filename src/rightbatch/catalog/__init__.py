"""Built-in workloads on data that ship inside dependencies: no download, no file, no network.

The list is plain data, so that `rightbatch workloads` answers without importing torch; a workload
is built when it is asked for.
"""

from rightbatch.catalog.entries import Entry, entries, names
from rightbatch.catalog.load import get, load_workload

__all__ = ["Entry", "entries", "get", "load_workload", "names"]
