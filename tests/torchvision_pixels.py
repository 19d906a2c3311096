"""Run by test_video_pixels.py in a process of its own: what transformers' video processor makes
of frames.

python torchvision_pixels.py FOLDER IN.npz OUT.npz

FOLDER holds torchvision, whose only wheel for this version is built for CUDA. IN holds uint8 [F,
H, W, 3] arrays and `size`; OUT gets float32 [F, 3, size, size] under the same names, and `mean`
and `std`.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

# Beside a torch for CPUs torchvision cannot load its own operators. Its Python part, all that is
# used here, only wants these two to be declared.
LIBRARY: Any = torch.library.Library
OPERATORS = LIBRARY("torchvision", "DEF")
OPERATORS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
OPERATORS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def main(folder: str, source: str, target: str) -> None:
    sys.path.append(folder)
    from transformers.models.llava_onevision.video_processing_llava_onevision import (
        LlavaOnevisionVideoProcessor,
    )

    given = dict(np.load(source))
    size = int(given.pop("size"))
    processor = LlavaOnevisionVideoProcessor(size={"height": size, "width": size})
    made = {name: pixels(processor, frames) for name, frames in given.items()}
    np.savez(target, mean=processor.image_mean, std=processor.image_std, **made)  # type: ignore[arg-type]


def pixels(processor: Any, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """float32 [F, 3, size, size] of uint8 [F, H, W, 3]."""
    video = torch.from_numpy(frames).permute(0, 3, 1, 2)
    made = processor(videos=[video], return_tensors="np")
    result: NDArray[np.float32] = made["pixel_values_videos"][0]
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
