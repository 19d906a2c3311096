"""The pixels a model gets are those of transformers' own video processor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dycoke_edge.config import Clip
from dycoke_edge.runtime.video import read_video, resize, to_pixels
from tests.clips import cfr

HERE = Path(__file__).resolve().parent
TORCHVISION = HERE.parent / ".venv" / "torchvision"
INSTALL = "pip install --no-deps --target .venv/torchvision torchvision==0.28.0"
SIZE = 96


def noise(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(height).integers(0, 256, (2, height, width, 3), np.uint8)


def gradient(height: int, width: int) -> NDArray[np.uint8]:
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return (np.stack([x, y, (x + y) / 2], -1)[None] * 255).astype(np.uint8)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NDArray[np.uint8]]:
    """Frames to resize: scaled down, up, in one direction each, and not at all."""
    clip = cfr(tmp_path_factory.mktemp("clips"), "h264-mp4", size=(320, 240))
    return {
        "noise_down": noise(241, 337),
        "noise_up": noise(40, 30),
        "noise_mixed": noise(300, 50),
        "noise_same": noise(SIZE, SIZE),
        "gradient_down": gradient(480, 640),
        "gradient_up": gradient(20, 64),
        "decoded": read_video(clip, Clip(num_frames=4), 200).pixels,
    }


@pytest.fixture(scope="module")
def theirs(
    given: dict[str, NDArray[np.uint8]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, NDArray[np.float32]]:
    """What LlavaOnevisionVideoProcessor makes of them."""
    if not TORCHVISION.is_dir():
        pytest.skip(f"transformers' video processor needs torchvision: {INSTALL}")
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("theirs")
    np.savez(folder / "in.npz", size=SIZE, **given)  # type: ignore[arg-type]
    script = HERE / "torchvision_pixels.py"
    paths = [TORCHVISION, folder / "in.npz", folder / "out.npz"]
    run = subprocess.run([sys.executable, script, *paths], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return dict(np.load(folder / "out.npz"))


NAMES = (
    "noise_down",
    "noise_up",
    "noise_mixed",
    "noise_same",
    "gradient_down",
    "gradient_up",
    "decoded",
)


@pytest.mark.parametrize("name", NAMES)
def test_the_pixels_are_those_of_transformers(
    name: str, given: dict[str, NDArray[np.uint8]], theirs: dict[str, NDArray[np.float32]]
) -> None:
    mean, std = theirs["mean"], theirs["std"]
    ours = to_pixels(resize(given[name], SIZE), mean.tolist(), std.tolist())
    assert ours.dtype == np.float32 and ours.shape == theirs[name].shape
    difference = np.abs(ours - theirs[name]) * std[:, None, None]  # back to 0..1
    assert difference.max() <= 1 / 255 + 1e-6


def test_another_filter_would_be_noticed(
    given: dict[str, NDArray[np.uint8]], theirs: dict[str, NDArray[np.float32]]
) -> None:
    plain = given["noise_down"][:, :: 241 // SIZE, :: 337 // SIZE][:, :SIZE, :SIZE]
    ours = to_pixels(np.ascontiguousarray(plain), theirs["mean"].tolist(), theirs["std"].tolist())
    assert np.abs(ours - theirs["noise_down"]).max() > 0.5


def test_pixels_are_normalised_by_channel_and_channel_first() -> None:
    frames = np.zeros((1, 2, 2, 3), np.uint8)
    frames[..., 0], frames[..., 2] = 255, 51
    pixels = to_pixels(frames, (0.5, 0.5, 0.5), (0.5, 0.25, 0.1))
    assert pixels.dtype == np.float32 and pixels.shape == (1, 3, 2, 2)
    np.testing.assert_allclose(pixels[0, :, 0, 0], [1, -2, -3], rtol=1e-5)


def test_resize_stretches_to_a_square_without_shifting() -> None:
    frames = np.zeros((2, 20, 40, 3), np.uint8)
    frames[1, :, 20:] = 200
    small = resize(frames, 10)
    assert small.shape == (2, 10, 10, 3) and small.dtype == np.uint8
    assert not small[0].any() and (small[1, :, :4] < 20).all() and (small[1, :, 6:] > 180).all()
