"""Outlines of the drawn classes, in a box of side 2 around the origin."""
from typing import Callable, Dict

import numpy as np

Outline = np.ndarray


def _polar(radii: np.ndarray, start: float = -np.pi / 2) -> Outline:
    """Points at these radii and at equal angles."""
    angles = start + np.arange(len(radii)) * 2 * np.pi / len(radii)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)


def _disc() -> Outline:
    return _polar(np.ones(48))


def _triangle() -> Outline:
    return np.array([[0., -1.], [1., .9], [-1., .9]])


def _square() -> Outline:
    return np.array([[-.9, -.9], [.9, -.9], [.9, .9], [-.9, .9]])


def _star() -> Outline:
    return _polar(np.array([1., .42] * 5))


def _cross() -> Outline:
    a, b = .34, 1.
    return np.array([[-a, -b], [a, -b], [a, -a], [b, -a], [b, a], [a, a],
                     [a, b], [-a, b], [-a, a], [-b, a], [-b, -a], [-a, -a]])


def _crescent() -> Outline:
    outer = np.linspace(-.62 * np.pi, .62 * np.pi, 32)
    inner = np.linspace(.62 * np.pi, -.62 * np.pi, 32)
    # The inner arc is flatter, so that the tips meet.
    tip_x, tip_y = np.cos(.62 * np.pi), np.sin(.62 * np.pi)
    arc = np.stack([
        tip_x + .75 * (np.cos(inner) - tip_x) * .55,
        tip_y * np.sin(inner) / np.sin(.62 * np.pi)
    ], 1)
    points = np.concatenate(
        [np.stack([np.cos(outer), np.sin(outer)], 1), arc[1:-1]])
    return points - np.array([.3, 0.])


def _arrow() -> Outline:
    return np.array([[0., -1.], [.9, 0.], [.35, 0.], [.35, 1.], [-.35, 1.],
                     [-.35, 0.], [-.9, 0.]])


def _heart() -> Outline:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = 16 * np.sin(t)**3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x / 16, -(y + 2.5) / 15], 1)


def _bolt() -> Outline:
    return np.array([[.15, -1.], [-.65, .15], [-.05, .15], [-.25, 1.],
                     [.65, -.2], [.05, -.2], [.45, -1.]])


def _wave() -> Outline:
    x = np.linspace(-1, 1, 24)
    upper = np.stack([x, .45 * np.sin(x * np.pi) - .3], 1)
    lower = np.stack([x, .45 * np.sin(x * np.pi) + .3], 1)[::-1]
    return np.concatenate([upper, lower])


SHAPES: Dict[str, Callable[[], Outline]] = {
    'disc': _disc,
    'triangle': _triangle,
    'square': _square,
    'star': _star,
    'cross': _cross,
    'crescent': _crescent,
    'arrow': _arrow,
    'heart': _heart,
    'bolt': _bolt,
    'wave': _wave,
}
