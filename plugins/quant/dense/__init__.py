"""Linear layers whose weights are stored as they are, with norm, gate and residual in their kernels."""
