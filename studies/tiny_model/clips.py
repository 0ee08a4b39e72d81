"""Scenes as clips: anti-aliased from distance functions, so every size, angle and position is exact.

The picture is 96 pixels wide and 64 high: a wall of faint vertical panels, which make a moving camera visible, a
darker floor, one object. All arrays run over frames at once.
"""

import hashlib
import random
from itertools import product

import numpy as np
from numpy.typing import NDArray

from studies.tiny_model.scenes import (
    CAMERAS,
    COLOURS,
    DIRECTIONS,
    LATEST_PHASE,
    LIGHTS,
    SIZES,
    SPEEDS,
    WALLS,
    Content,
    Placement,
    random_content,
    random_placement,
)

FRAMES, HEIGHT, WIDTH = 17, 64, 96
FLOOR = 54.0  # row where the floor begins
PANEL = 24.0  # width of two panels
PAN = 1.2  # pixels per frame
ZOOM = 1.5  # between the first and the last frame
BOUNCE = np.pi / 8.0  # radians per frame: two jumps in a clip
Reals = NDArray[np.float64]
Clip = NDArray[np.uint8]  # [F, H, W, 3]


def random_scene(seed: str, *, held_out: bool = False) -> tuple[Content, Placement]:
    """A scene; the same ``seed`` gives the same one on every machine."""
    draw = random.Random(hashlib.sha256(seed.encode()).hexdigest())
    content = random_content(draw, held_out=held_out)
    return content, random_placement(draw)


def random_clip(seed: str, *, held_out: bool = False) -> tuple[Content, Clip]:
    """What the scene of ``seed`` says, and its clip."""
    content, placement = random_scene(seed, held_out=held_out)
    return content, render(content, placement)


def render(content: Content, placement: Placement) -> Clip:
    """The clip of a scene."""
    x, y, _ = _points(content)
    picture = _background(x, y, content, placement)
    centre_x, centre_y, _ = _path(content, placement)
    across, down, radius = x - centre_x, y - centre_y, SIZES[content.size]
    cover = covered(content, placement)[..., None]
    paint = np.array(COLOURS[content.colour]) * _shading(content.shape, across, down, radius)[..., None]
    picture = picture * (1 - cover) + paint * cover
    lit = np.clip(picture * np.array(LIGHTS[content.light]), 0, 1)
    result: Clip = np.round(255 * lit).astype(np.uint8)
    return result


def covered(content: Content, placement: Placement) -> Reals:
    """The share of each pixel that the object covers, ``[F, H, W]``."""
    x, y, zoom = _points(content)
    centre_x, centre_y, angle = _path(content, placement)
    across, down = x - centre_x, y - centre_y
    turned = np.cos(angle) * across + np.sin(angle) * down, np.cos(angle) * down - np.sin(angle) * across
    result: Reals = np.clip(0.5 - distance(content.shape, *turned, SIZES[content.size]) * zoom, 0, 1)
    return result


def region(content: Content) -> NDArray[np.bool_]:
    """Where the object can be, ``[F, H, W]``: its bounding circle, wherever the placement puts it.

    It depends on the caption alone, so a loss that weighs it more has the same minimum as one that does not.
    """
    x, y, _ = _points(content)
    found = np.zeros((FRAMES, HEIGHT, WIDTH), bool)
    for side_x, side_y, phase in product((-1, 0, 1), (-1, 0, 1), (0.0, LATEST_PHASE)):
        placed = Placement(side_x, side_y, angle=0, spin=0, phase=phase, bricks=0)
        centre_x, centre_y, _ = _path(content, placed)
        found |= np.hypot(x - centre_x, y - centre_y) < SIZES[content.size] + 1
    return found


def distance(shape: str, x: Reals, y: Reals, radius: float) -> Reals:
    """How far outside the shape around the origin (below 0: inside) each point is, in its own unit of length."""
    far = np.hypot(x, y)
    if shape == "ball":
        return far - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.84 * radius
    if shape == "triangle":
        result: Reals = np.maximum(np.abs(x) * np.sqrt(0.75) - y / 2, y) - 0.58 * radius
        return result
    raise KeyError(shape)


def _points(content: Content) -> tuple[Reals, Reals, Reals]:
    """Which point of the scene each pixel shows, ``[F, H, W]`` (a still camera has one frame), and the zoom."""
    shift, zoom = _camera(content)
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH] + 0.5
    x = (columns - WIDTH / 2) / zoom + WIDTH / 2 + shift
    return x, (rows - HEIGHT / 2) / zoom + HEIGHT / 2, zoom


def _camera(content: Content) -> tuple[Reals, Reals]:
    """Shift in pixels and magnification per frame, each [F, 1, 1]; a shift grows when the camera pans right."""
    time = np.arange(FRAMES, dtype=float)[:, None, None]
    if content.camera not in CAMERAS:
        raise KeyError(content.camera)
    pan = {"camera pans left": -PAN, "camera pans right": PAN}.get(content.camera, 0.0)
    grown = ZOOM ** (time / (FRAMES - 1))
    zoom = {"camera zooms in": grown, "camera zooms out": grown[::-1]}.get(content.camera, np.ones_like(time))
    return pan * (time - (FRAMES - 1) / 2), zoom


def _background(x: Reals, y: Reals, content: Content, placement: Placement) -> Reals:
    wave = np.sin(2 * np.pi * (x + placement.bricks) / PANEL)
    panels = 1 + 0.06 * np.clip(3 * wave, -1, 1)
    floor = np.clip(y - FLOOR + 0.5, 0, 1)
    brightness = panels * (1 - floor) + 0.62 * floor
    result: Reals = brightness[..., None] * np.array(WALLS[content.wall])
    return result


def _path(content: Content, placement: Placement) -> tuple[Reals, Reals, Reals]:
    """Centre and angle of the object per frame, each [F, 1, 1]; the whole path lies inside the picture."""
    time = np.arange(FRAMES, dtype=float)[:, None, None]
    radius, still = SIZES[content.size], np.zeros_like(time)
    angle, travel_x, travel_y = still, still, still
    if content.motion.startswith("moves "):
        direction, speed = content.motion.split()[1:]
        way = SPEEDS[speed] * (time - (FRAMES - 1) / 2)
        travel_x, travel_y = (step * way for step in DIRECTIONS[direction])
    elif content.motion == "spins":
        angle = placement.angle + placement.spin * time
    reach_x = np.abs(travel_x).max() + radius + (PAN * (FRAMES - 1) / 2 if "pans" in content.camera else 0)
    room_x, room_y = WIDTH / 2 - reach_x - 1, 29 - (np.abs(travel_y).max() + radius)
    if "zooms" in content.camera:  # around the middle of the picture, where the object is therefore put
        room_x, room_y = 3.0, 2.0
    centre_x = WIDTH / 2 + placement.x * min(max(room_x, 0), 6) + travel_x
    centre_y = 30 + placement.y * min(max(room_y, 0), 3) + travel_y
    if content.motion == "bounces":
        height = 1.6 * (26 - radius)
        centre_y = FLOOR - radius - height * np.abs(np.sin(placement.phase + BOUNCE * time))
    return centre_x, centre_y, angle


def _shading(shape: str, across: Reals, down: Reals, radius: float) -> Reals:
    """A ball is lit from above left, flat objects evenly."""
    if shape != "ball":
        return np.ones_like(across)
    far = np.hypot(across + 0.35 * radius, down + 0.35 * radius) / radius
    return 1.12 - 0.32 * np.clip(far, 0, 1.5)
