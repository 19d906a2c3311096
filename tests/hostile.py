"""Media that cost far more than they weigh."""

from __future__ import annotations

import base64
import io
import struct

from PIL import Image


def scans_jpeg(side: int = 2900, times: int = 20_000) -> bytes:
    """A plain progressive JPEG with its cheapest scan said over and over: some hundred kB, a minute of work."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), "grey").save(file, "JPEG", progressive=True)
    data = file.getvalue()
    starts = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    scans = [data[start:end] for start, end in zip(starts, [*starts[1:], len(data) - 2], strict=True)]
    scan = min((scan.partition(b"\xff\xc4")[0] for scan in scans[1:]), key=len)
    return data[:-2] + scan * times + data[-2:]


def slow_video(side: int = 2990, pictures: int = 64) -> str:
    """A row of pictures as a URL: all within the usual ceilings, and half a minute of work."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).convert("RGB").save(file, "JPEG", progressive=True)
    return "data:video/jpeg;base64," + ",".join([base64.b64encode(file.getvalue()).decode()] * pictures)


def wide_gif(width: int = 11_000, height: int = 11_000) -> bytes:
    """A GIF with a screen of 10 x 10 and a frame that is far larger."""
    file = io.BytesIO()
    Image.new("P", (width, height)).save(file, "GIF")
    data = bytearray(file.getvalue())
    data[6:10] = struct.pack("<HH", 10, 10)
    return bytes(data)


def large_png(width: int = 2950, height: int = 2950) -> bytes:
    """A legal picture that is small as a file, and 35 MB when it is decoded."""
    file = io.BytesIO()
    Image.new("RGBA", (width, height), "red").save(file, "PNG")
    return file.getvalue()
