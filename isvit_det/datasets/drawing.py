"""Drawing one image of the drawn data set, with the masks of its objects."""
from typing import List, NamedTuple, Tuple

import cv2
import numpy as np

from isvit_det.datasets.shapes import SHAPES

CLASSES = tuple(SHAPES)
# An object of which less than this share is visible is not annotated.
MIN_VISIBLE = .45


class Picture(NamedTuple):
    """Pixels (H, W, 3) in BGR, and the visible mask and class of objects."""
    pixels: np.ndarray
    masks: List[np.ndarray]
    labels: List[int]


def draw_picture(seed: Tuple[int, ...]) -> Picture:
    """Draw the image of a seed.

    Args:
        seed: integers such as (seed, split, index), on which alone the image
            depends.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    height, width = (int(side) for side in rng.integers(160, 257, 2))
    pixels = _background(rng, height, width)
    _clutter(rng, pixels)
    owner = np.full((height, width), -1, np.int32)
    labels, areas = [], []
    # Large objects are drawn first, so that small ones are in front.
    count = int(rng.integers(4, 12))
    sides = np.sort(np.exp(rng.uniform(np.log(18), np.log(180), count)))[::-1]
    for index, side in enumerate(sides):
        label = int(rng.integers(len(CLASSES)))
        mask = _place(rng, label, side, owner)
        _paint(rng, pixels, mask, label)
        owner[mask] = index
        labels.append(label)
        areas.append(int(mask.sum()))
    noise = rng.normal(0, rng.uniform(2, 7), pixels.shape)
    pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    masks = [owner == index for index in range(count)]
    shown = [
        index for index in range(count)
        if masks[index].sum() >= max(MIN_VISIBLE * areas[index], 40)
    ]
    return Picture(pixels, [masks[i] for i in shown],
                   [labels[i] for i in shown])


def _color(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(20, 235, 3)


def _background(rng: np.random.Generator, height: int,
                width: int) -> np.ndarray:
    """A muted gradient with blobs and sometimes stripes."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = (x * np.cos(angle) + y * np.sin(angle)) / max(height, width)
    grey = rng.uniform(60, 190)
    one, two = (grey + rng.normal(0, 22, 3) for _ in range(2))
    pixels = one + ramp[..., None] * (two - one)
    coarse = rng.normal(0, 1, (6, 6, 3)).astype(np.float32)
    pixels += rng.uniform(4, 18) * cv2.resize(
        coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    if rng.random() < .4:
        wave = np.sin(
            (x * np.sin(angle) + y * np.cos(angle)) * rng.uniform(.2, .9))
        pixels += rng.uniform(3, 12) * wave[..., None]
    return pixels


def _clutter(rng: np.random.Generator, pixels: np.ndarray) -> None:
    """Lines, arcs and dots of no class."""
    height, width = pixels.shape[:2]
    for _ in range(int(rng.integers(3, 12))):
        color = (pixels.mean((0, 1)) + rng.normal(0, 40, 3)).tolist()
        a, b = (
            tuple(int(v) for v in rng.integers(0, (width, height)))
            for _ in range(2))
        kind = rng.integers(3)
        if kind == 0:
            cv2.line(pixels, a, b, color, int(rng.integers(1, 3)))
        elif kind == 1:
            axes = tuple(int(v) for v in rng.integers(5, 60, 2))
            cv2.ellipse(pixels, a, axes, int(rng.integers(360)), 0,
                        int(rng.integers(60, 200)), color, 1)
        else:
            cv2.circle(pixels, a, int(rng.integers(1, 4)), color, -1)


def _place(rng: np.random.Generator, label: int, side: float,
           owner: np.ndarray) -> np.ndarray:
    """Mask of an object at the least occupied of three random positions."""
    height, width = owner.shape
    outline = SHAPES[CLASSES[label]]()
    angle = rng.normal(0, .3)
    stretch = np.exp(rng.normal(0, .12))
    turn = np.array([[np.cos(angle), -np.sin(angle)],
                     [np.sin(angle), np.cos(angle)]])
    outline = (outline * [stretch, 1 / stretch]) @ turn.T * side / 2
    best, best_taken = None, np.inf
    for _ in range(3):
        centre = rng.uniform([side * .3, side * .3],
                             [width - side * .3, height - side * .3])
        mask = np.zeros(owner.shape, np.uint8)
        points = np.round((outline + centre) * 16).astype(np.int32)
        cv2.fillPoly(mask, [points], 1, shift=4)
        inside = mask.astype(bool)
        taken = (owner[inside] >= 0).mean() if inside.any() else 1.
        if taken < best_taken:
            best, best_taken = inside, taken
    assert best is not None
    return best


def _paint(rng: np.random.Generator, pixels: np.ndarray, mask: np.ndarray,
           label: int) -> None:
    """Paint an object: a colour by its class, a texture and an edge."""
    if not mask.any():
        return
    around = pixels[mask].mean(0)
    for _ in range(8):
        hue = (label * 180 / len(CLASSES) + rng.normal(0, 7)) % 180
        hsv = np.array([[[hue, rng.uniform(90, 255),
                          rng.uniform(80, 255)]]]).astype(np.uint8)
        color = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0].astype(np.float64)
        if np.abs(color - around).max() > 60:
            break
    ys, xs = np.nonzero(mask)
    texture = rng.integers(4)
    shade: np.ndarray = np.zeros(len(ys))
    if texture == 1:
        angle = rng.uniform(0, np.pi)
        shade = 18 * np.sin(
            (xs * np.cos(angle) + ys * np.sin(angle)) * rng.uniform(.4, 1.2))
    elif texture == 2:
        shade = rng.normal(0, 16, len(ys))
    elif texture == 3:
        shade = 40 * ((ys - ys.min()) / max(1, np.ptp(ys)) - .5)
    pixels[ys, xs] = color + shade[:, None]
    inner = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    pixels[mask & ~inner] = color * rng.uniform(.35, .75)
