"""Other number formats: half precision, fixed point, and torchao's kernels."""
