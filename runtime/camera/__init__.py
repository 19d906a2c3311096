"""Cameras: a stream to frames, frames to windows, windows to answers and alerts.

What brings frames in (frame, failure, uri, redact, source, av_source, file_source, gst_source, pattern, picker,
buffer, backoff, reader, probe) must not know of models, prompts, rules or events. Nothing here knows how
events leave (of sinks, only the watcher: it gives plain functions a queue) or who asks over HTTP (serve).
"""
