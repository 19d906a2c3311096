"""TensorRT 8.6 to 11: plans of a bundle's graphs, made on the device that runs them.

`versions.py` alone knows what differs between TensorRT's versions. Nothing here imports onnx or torch: a graph is a
file that TensorRT's parser reads. `tensorrt` is imported when it is needed, not before.
"""
