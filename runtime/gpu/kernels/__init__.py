"""The CUDA sources, and the PTX text that is made from them and shipped: `kernels.ptx`.

Sources speak the dialect of `dialect.cuh`, which NVRTC, nvcc and g++ understand. Knows nothing of Python's side.
"""
