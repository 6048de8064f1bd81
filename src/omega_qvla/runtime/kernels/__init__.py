"""Integer kernels.  ``reference`` is exact pure PyTorch and the oracle for every other one."""
