"""The workstation side: a Hugging Face checkpoint to a bundle of ONNX graphs. Only here is torch.

Knows nothing of the runtime: how tokens are drawn, where KV rows live, what a camera is.
"""
