"""The device side: a bundle, a clip and a question to an answer, with numpy and one engine.

Knows nothing of torch, transformers or the exporter: what it runs is in the bundle.
"""
