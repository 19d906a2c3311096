"""ONNX Runtime, which everybody takes from here: `from dycoke_edge.ort import onnxruntime`.

Its wheels since 1.29 send telemetry. Only a variable that is set before the library loads keeps it quiet: its own call,
`disable_telemetry_events`, comes after it has written a device id to the user's cache folder and opened an uploader.
"""

from __future__ import annotations

import os
import sys

SWITCH = "ORT_DISABLE_TELEMETRY"

TELEMETRY_OFF = "onnxruntime" not in sys.modules  # an application that imported it sooner has to set SWITCH itself
os.environ[SWITCH] = "1"  # in child processes too

import onnxruntime  # noqa: E402 - SWITCH comes first

if not hasattr(onnxruntime, "InferenceSession"):  # a folder that pip left behind counts as a package
    raise ImportError(f"{list(onnxruntime.__path__)} holds parts of it only", name="onnxruntime")

if not TELEMETRY_OFF:
    onnxruntime.disable_telemetry_events()  # fewer events, where it is too late for none

__all__ = ["SWITCH", "TELEMETRY_OFF", "onnxruntime"]
