"""What the tiny model knows of the world: scenes of one object in front of a wall, and the captions that say them.

A scene has what its caption names (``Content``) and what no caption names (``Placement``: where, and in what phase).
The split into training and held-out content is by a hash, so no list has to be kept.
"""

import hashlib
import random
from dataclasses import dataclass

SHAPES = ("ball", "square", "triangle")
COLOURS = {
    "red": (0.86, 0.12, 0.14),
    "yellow": (0.95, 0.83, 0.12),
    "green": (0.10, 0.68, 0.22),
    "blue": (0.13, 0.25, 0.88),
    "purple": (0.58, 0.14, 0.76),
    "white": (0.96, 0.96, 0.96),
}
SIZES = {"small": 13.0, "large": 18.0}  # outer radius in pixels
WALLS = {
    "dark blue": (0.12, 0.16, 0.34),
    "light blue": (0.56, 0.70, 0.84),
    "dark green": (0.10, 0.26, 0.17),
    "light green": (0.60, 0.76, 0.58),
    "dark grey": (0.22, 0.22, 0.23),
    "light grey": (0.66, 0.66, 0.66),
    "brown": (0.38, 0.25, 0.16),
    "pink": (0.86, 0.64, 0.68),
}
LIGHTS = {"": (1.0, 1.0, 1.0), "warm light": (1.08, 0.93, 0.72), "cool light": (0.78, 0.94, 1.10)}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = {"slowly": 0.8, "quickly": 1.5}  # pixels per frame
MOVES = tuple(f"moves {direction} {speed}" for direction in DIRECTIONS for speed in SPEEDS)
STAYS = ("stands still", "spins", "bounces")
CAMERAS = ("", "camera pans left", "camera pans right", "camera zooms in", "camera zooms out")
ROUND = ("ball",)  # nobody sees these spin
HELD_OUT_SHARE = 0.1
LATEST_PHASE = 0.6  # of a jump at the first frame, in radians


@dataclass(frozen=True)
class Content:
    """What a caption says; "" is what it leaves out: neutral light, a camera at rest."""

    size: str
    colour: str
    shape: str
    motion: str
    wall: str
    light: str = ""
    camera: str = ""

    @property
    def caption(self) -> str:
        said = f"a {self.size} {self.colour} {self.shape} {self.motion} in front of a {self.wall} wall"
        return ", ".join(part for part in (said, self.light, self.camera) if part)

    @property
    def held_out(self) -> bool:
        """Whether the combination of colour, shape and motion is kept from training, whatever the rest is."""
        digest = hashlib.sha256(f"{self.colour}/{self.shape}/{self.motion}".encode()).digest()
        return digest[0] < 256 * HELD_OUT_SHARE


VOCABULARY = {
    "size": tuple(SIZES),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "motion": (*MOVES, *STAYS),
    "wall": tuple(WALLS),
    "light": tuple(LIGHTS),
    "camera": CAMERAS,
}  # every field of Content, and what it can be


@dataclass(frozen=True)
class Placement:
    """What a caption leaves open.

    ``x`` and ``y`` are shares of the room there is, -1…1; ``bricks`` shifts the wall's panels by pixels; angles are in
    radians, ``spin`` in radians per frame.
    """

    x: float
    y: float
    angle: float
    spin: float
    phase: float
    bricks: float


def random_content(draw: random.Random, *, held_out: bool) -> Content:
    """Content of the training or of the held-out set; half of all objects move across the picture."""
    while True:
        shape = draw.choice(SHAPES)
        stays = [motion for motion in STAYS if motion != "spins" or shape not in ROUND]
        motion = draw.choice(MOVES) if draw.random() < 0.5 else draw.choice(stays)
        cameras = [camera for camera in CAMERAS if motion != "bounces" or "zooms" not in camera]
        camera = draw.choice(cameras) if motion in STAYS and draw.random() < 0.6 else ""
        content = Content(
            size=draw.choice(list(SIZES)),
            colour=draw.choice(list(COLOURS)),
            shape=shape,
            motion=motion,
            wall=draw.choice(list(WALLS)),
            light=draw.choice(list(LIGHTS)),
            camera=camera,
        )
        if content.held_out == held_out and not _hard_to_see(content):
            return content


def _hard_to_see(content: Content) -> bool:
    """A white object before a light wall, or one of the wall's colour."""
    light_wall = content.wall.startswith("light") or content.wall == "pink"
    return (content.colour == "white" and light_wall) or content.wall.endswith(content.colour)


def random_placement(draw: random.Random) -> Placement:
    return Placement(
        x=draw.uniform(-1, 1),
        y=draw.uniform(-1, 1),
        angle=draw.uniform(-0.2, 0.2),
        spin=draw.uniform(0.10, 0.14),
        phase=draw.uniform(0, LATEST_PHASE),
        bricks=draw.uniform(0, 8),
    )
