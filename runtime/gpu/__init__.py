"""The only place that knows CUDA: device memory, kernels, cuBLAS, and the decoder that runs on them.

Knows the bundle and the contract. Knows nothing of ONNX Runtime, TensorRT, cameras or servers, and never imports torch.
`cuda.bindings` is imported when a device is opened, not before: without a GPU everything here imports.
"""
