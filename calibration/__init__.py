"""Calibration: real frames in, a quantised bundle and the DyCoke settings for a budget out.

Not yet implemented. Knows nothing of the exporter or the runtime: it meets them in a bundle's
files. Imports neither torch nor transformers.
"""
