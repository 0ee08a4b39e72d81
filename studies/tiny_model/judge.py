"""Says what a clip shows, without knowing its prompt: the object's colour, shape and motion. No network is involved.

Per frame: the wall's colour is the median, the object is the largest patch that differs from wall and floor. Its shape
is the one whose drawn outline covers the patch best, its colour the nearest in the palette under any of the lights.
Over the clip: where the patch goes, how its size and angle change. A pan of the camera moves the object across the
picture the other way, and that is how it is judged.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from studies.tiny_model.clips import FLOOR, HEIGHT, WIDTH, distance
from studies.tiny_model.scenes import COLOURS, LIGHTS, ROUND, SHAPES, SPEEDS, Content

Mask = NDArray[np.bool_]
Reals = NDArray[np.float64]
CONTRAST = 0.16  # of an object's pixel against the wall, as a distance in RGB of 0…1
SMALLEST = 60  # pixels of an object
TURNS = 8  # angles at which an outline is tried


@dataclass(frozen=True)
class Seen:
    """What a clip shows; "" where there is no object."""

    colour: str
    shape: str
    motion: str  # one of "left", "right", "up", "down", "stands still", "spins", "bounces"
    pixels_per_frame: float


@dataclass(frozen=True)
class Verdict:
    """Which of the three a clip gets right."""

    colour: bool
    shape: bool
    motion: bool
    seen: Seen

    @property
    def right(self) -> bool:
        return self.colour and self.shape and self.motion


def judge(content: Content, clip: NDArray[np.uint8]) -> Verdict:
    """Compares what the caption of ``content`` promises with what ``clip``, ``[F, H, W, 3]``, shows."""
    seen = look(clip)
    return Verdict(
        seen.colour == content.colour, seen.shape == content.shape, seen.motion == expected_motion(content), seen
    )


def expected_motion(content: Content) -> str:
    """The motion that is visible in the picture: a pan carries an object that stands still the other way."""
    if content.motion.startswith("moves "):
        return content.motion.split()[1]
    if content.motion != "bounces" and "pans" in content.camera:
        return {"camera pans left": "right", "camera pans right": "left"}[content.camera]
    return content.motion


def look(clip: NDArray[np.uint8]) -> Seen:
    """What is in ``clip``, ``[F, H, W, 3]`` of 0…255."""
    frames = clip.astype(np.float64) / 255
    masks = [object_mask(frame) for frame in frames]
    found = [index for index, mask in enumerate(masks) if mask.sum() >= SMALLEST]
    if len(found) < len(masks) // 2:
        return Seen("", "", "", 0.0)
    fits = [outline(masks[index]) for index in found]
    scores = {shape: sum(fit[shape][0] for fit in fits) for shape in SHAPES}
    shape = max(scores, key=lambda name: scores[name])
    centres = np.array([_centre(masks[index]) for index in found])
    angles = np.array([fit[shape][1] for fit in fits])
    motion, speed = motion_of(np.array(found, float), centres, angles, shape)
    return Seen(colour_of(frames[found], [masks[index] for index in found]), shape, motion, speed)


def object_mask(frame: Reals) -> Mask:
    """The largest patch of ``frame`` that is neither wall nor floor."""
    wall = np.median(frame[: int(FLOOR)].reshape(-1, 3), axis=0)
    away = np.linalg.norm(frame - wall, axis=-1)
    low = frame[int(FLOOR) :]  # the floor; its edge sinks when the camera zooms in
    away[int(FLOOR) :] = np.minimum(away[int(FLOOR) :], np.linalg.norm(low - np.median(low[-2:], axis=(0, 1)), axis=-1))
    labels, count = ndimage.label(ndimage.binary_opening(away > CONTRAST))
    if not count:
        return np.zeros((HEIGHT, WIDTH), bool)
    sizes = np.bincount(labels.flat)[1:]
    result: Mask = labels == 1 + int(sizes.argmax())
    return result


def outline(mask: Mask) -> dict[str, tuple[float, float]]:
    """Per shape: the best overlap (intersection over union) of its outline with ``mask``, and at which angle."""
    y, x = _centre(mask)
    area = float(mask.sum())
    found = {}
    for shape in SHAPES:
        angles = [0.0] if shape in ROUND else [turn * _symmetry(shape) / TURNS for turn in range(TURNS)]
        best = max((_overlap(mask, shape, x, y, area, angle), angle) for angle in angles)
        found[shape] = best
    return found


def _overlap(mask: Mask, shape: str, x: float, y: float, area: float, angle: float) -> float:
    radius = (area / _area_of(shape)) ** 0.5
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH] - np.array([y, x])[:, None, None]
    across = np.cos(angle) * columns + np.sin(angle) * rows
    down = np.cos(angle) * rows - np.sin(angle) * columns
    drawn = distance(shape, across, down, radius) < 0
    return float((drawn & mask).sum() / (drawn | mask).sum())


@cache
def _area_of(shape: str) -> float:
    """Area of the shape of radius 1."""
    side = np.linspace(-1.5, 1.5, 601)
    x, y = np.meshgrid(side, side)
    return float((distance(shape, x, y, 1.0) < 0).mean() * 9)


def _symmetry(shape: str) -> float:
    """The turn after which a shape looks the same, in radians."""
    return 2 * np.pi / 3 if shape == "triangle" else np.pi / 2


def _centre(mask: Mask) -> tuple[float, float]:
    rows, columns = np.nonzero(mask)
    return float(rows.mean()), float(columns.mean())


def colour_of(frames: Reals, masks: list[Mask]) -> str:
    """The palette's colour that the patches have, whatever the light; their rims, which are mixed, do not count."""
    inner = [ndimage.binary_erosion(mask) for mask in masks]
    chosen = [core if core.any() else mask for core, mask in zip(inner, masks, strict=True)]
    pixels = np.concatenate([frame[mask] for frame, mask in zip(frames, chosen, strict=True)])
    mean = np.median(pixels, axis=0)
    lit = {
        (name, light): np.clip(np.array(paint) * np.array(shade), 0, 1)
        for name, paint in COLOURS.items()
        for light, shade in LIGHTS.items()
    }
    return min(lit, key=lambda pair: float(np.linalg.norm(lit[pair] - mean)))[0]


def motion_of(time: Reals, centres: Reals, angles: Reals, shape: str) -> tuple[str, float]:
    """The motion's name and the speed in pixels per frame along it, from centres ``[n, 2]`` (row, column)."""
    span = float(time[-1] - time[0])
    lines = [np.polyfit(time, centres[:, axis], 1) for axis in (0, 1)]
    off_line = centres[:, 0] - np.polyval(lines[0], time)
    if np.ptp(off_line) > 6:  # up and down again
        return "bounces", float(np.ptp(centres[:, 0]) / span)
    velocity = np.array([line[0] for line in lines])
    if np.abs(velocity).max() > min(SPEEDS.values()) / 2:
        axis = int(np.abs(velocity).argmax())
        name = (("up", "down"), ("left", "right"))[axis][int(velocity[axis] > 0)]
        return name, float(abs(velocity[axis]))
    turned = 0.0 if shape in ROUND else _turning(time, angles, _symmetry(shape))
    return ("spins" if turned > 0.6 else "stands still"), 0.0


def _turning(time: Reals, angles: Reals, symmetry: float) -> float:
    """By how many radians the object turns steadily in all, with its symmetry undone."""
    rate = np.polyfit(time, np.unwrap(angles, period=symmetry), 1)[0]
    return float(abs(rate) * (time[-1] - time[0]))
