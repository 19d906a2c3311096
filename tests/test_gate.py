"""The frame gate: passes whatever happens, however small; holds back noise and light."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dycoke_edge.runtime.gate import FrameGate, block_means

Image = NDArray[np.uint8]
Picture = NDArray[np.floating[Any]]
SIZE = 384
RANDOM = np.random.default_rng(0)


def scene(size: int = SIZE, dark: float = 40.0, bright: float = 200.0) -> Picture:
    """A still picture with areas, edges and texture, levels `dark` to `bright`: fp64 [R, R, 3]."""
    random = np.random.default_rng(1)
    areas = random.uniform(dark, bright, (6, 6, 3)).repeat(-(-size // 6), 0).repeat(-(-size // 6), 1)
    return np.asarray(areas[:size, :size] + random.normal(0, 4, (size, size, 3)))


def shot(picture: Picture, noise: float = 0.0, random: np.random.Generator = RANDOM) -> Image:
    """What a camera makes of it."""
    taken = picture + random.normal(0, noise, picture.shape) if noise else picture
    return np.asarray(taken.round().clip(0, 255), np.uint8)


def gate(picture: Picture, noise: float = 0.0, threshold: float = 4.0) -> FrameGate:
    watching = FrameGate(threshold)
    watching.remember(shot(picture, noise))
    return watching


def test_nothing_is_held_back_before_the_first_frame_and_after_a_cut() -> None:
    watching = FrameGate(4.0)
    assert not watching.repeats(shot(scene()))
    watching.remember(shot(scene()))
    assert watching.repeats(shot(scene())) and watching.nbytes > 0
    watching.forget()
    assert not watching.repeats(shot(scene())) and watching.nbytes == 0


@pytest.mark.parametrize(("size", "worst"), [(100, 4.0), (336, 8.0), (384, 8.0), (391, 8.0)])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_noise_alone_is_held_back(size: int, worst: float, share: float) -> None:
    noise = share * worst
    watching = gate(scene(size), noise)
    assert all(watching.repeats(shot(scene(size), noise)) for _ in range(20))


@pytest.mark.parametrize("noise", [0.0, 3.0])
@pytest.mark.parametrize("light", [0.85, 0.95, 1.05, 1.15])
def test_light_is_held_back(light: float, noise: float) -> None:
    assert gate(scene(), noise).repeats(shot(scene() * light, noise))


def test_the_colour_of_light_is_held_back() -> None:
    assert gate(scene()).repeats(shot(scene() * [1.1, 1.0, 0.92]))


@pytest.mark.parametrize("light", [0.0, 0.3, 0.7, 1.5])
def test_light_switched_on_or_off_is_not(light: float) -> None:
    assert not gate(scene(), 1.0).repeats(shot(scene() * light, 1.0))


def test_a_covered_lens_is_not() -> None:
    for level in (0, 90, 255):
        assert not gate(scene(), 1.0).repeats(np.full((SIZE, SIZE, 3), level, np.uint8))


@settings(max_examples=150, deadline=None)
@given(
    top=st.integers(0, SIZE - 8),
    left=st.integers(0, SIZE - 8),
    height=st.integers(8, 40),
    width=st.integers(8, 40),
    contrast=st.integers(40, 120),
    darker=st.booleans(),
    noise=st.sampled_from([0.0, 1.0, 3.0]),
    light=st.sampled_from([0.9, 1.0, 1.1]),
)
def test_a_small_object_anywhere_is_seen_through_noise_and_light(
    top: int, left: int, height: int, width: int, contrast: int, darker: bool, noise: float, light: float
) -> None:
    """8 x 8 of 384 x 384 pixels is two hundredths of the width. 40 levels is a grey coat before a grey wall."""
    with_object = scene(dark=60, bright=110)
    with_object[top : top + height, left : left + width] += -min(contrast, 60) if darker else contrast
    watching = gate(scene(dark=60, bright=110), noise)
    assert not watching.repeats(shot(with_object * light, noise))


@settings(max_examples=60, deadline=None)
@given(top=st.integers(0, SIZE - 8), left=st.integers(0, SIZE - 8), colour=st.integers(0, 2))
def test_a_change_of_colour_alone_is_seen(top: int, left: int, colour: int) -> None:
    changed = scene()
    changed[top : top + 8, left : left + 8, colour] += 50
    assert not gate(scene(), 1.0).repeats(shot(changed, 1.0))


def test_one_lamp_in_the_dark_is_not_taken_for_light() -> None:
    """A factor for all blocks that one block decides would explain away any change of that block."""
    night = np.full((SIZE, SIZE, 3), 6.0)
    on, off = night.copy(), night
    on[200:212, 100:112] = 230
    dim = night.copy()
    dim[200:212, 100:112] = 195
    for before, after in ((on, off), (off, on), (on, dim)):
        assert not gate(before, 1.0).repeats(shot(after, 1.0))


def test_a_screen_that_dims_is_not_taken_for_light() -> None:
    room, dimmed = np.full((SIZE, SIZE, 3), 90.0), np.full((SIZE, SIZE, 3), 90.0)
    room[:, :150], dimmed[:, :150] = 200, 175
    assert not gate(room, 1.0).repeats(shot(dimmed, 1.0))


def test_a_moving_camera_is_seen_even_on_fine_texture() -> None:
    texture = np.random.default_rng(2).uniform(60, 200, (SIZE, SIZE + 40, 3))
    assert not gate(texture[:, :SIZE]).repeats(shot(texture[:, 40:]))


def test_frames_of_pure_noise_are_encoded() -> None:
    """Noise raises the threshold, but not to where nothing is seen any more."""
    watching = FrameGate(4.0)
    watching.remember(RANDOM.integers(0, 256, (SIZE, SIZE, 3), np.uint8))
    assert not watching.repeats(RANDOM.integers(0, 256, (SIZE, SIZE, 3), np.uint8))


@pytest.mark.parametrize("what", ["light", "shadow"])
def test_a_slow_drift_is_not_held_back_for_ever(what: str) -> None:
    """Every step is far below the threshold; compared with the last encoded frame they add up."""
    watching, passed, picture = gate(scene(), 1.0), 0, scene()
    for step in range(200):
        if what == "light":
            picture = scene() * (1 + step * 0.005)
        else:
            picture = scene()
            picture[:, :150] *= 1 - step * 0.004
        image = shot(picture.clip(0, 250), 1.0)
        if not watching.repeats(image):
            watching.remember(image)
            passed += 1
    assert 2 <= passed < 60


def test_steps_of_a_drift_are_held_back_one_by_one() -> None:
    picture = scene()
    picture[:, :150] *= 0.995
    assert gate(scene(), 1.0).repeats(shot(picture, 1.0))


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 400))
def test_every_pixel_is_in_a_block(size: int) -> None:
    image = np.random.default_rng(size).integers(0, 256, (size, size, 3), np.uint8)
    means = block_means(image)
    assert means.dtype == np.float32 and len(means) == max(1, min(48, size // 4))
    edges = [number * size // len(means) for number in range(len(means))] + [size]
    for row, column in ((0, 0), (len(means) - 1, len(means) - 1), (len(means) // 2, 0)):
        block = image[edges[row] : edges[row + 1], edges[column] : edges[column + 1]]
        np.testing.assert_allclose(means[row, column], block.reshape(-1, 3).mean(0), rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(low=st.floats(0.5, 20), factor=st.floats(1, 8), contrast=st.integers(1, 80))
def test_a_higher_threshold_never_passes_more(low: float, factor: float, contrast: int) -> None:
    changed = scene()
    changed[100:110, 100:110] += contrast
    image = shot(changed)
    if gate(scene(), threshold=low).repeats(image):
        assert gate(scene(), threshold=low * factor).repeats(image)
