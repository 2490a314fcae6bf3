"""The Linux kernel: processes, namespaces, memory, page cache, control groups."""
