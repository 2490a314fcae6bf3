"""NVIDIA devices: the driver's checkpoint calls, behind one process a machine that keeps the driver initialised."""
