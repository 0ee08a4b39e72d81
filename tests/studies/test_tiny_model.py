"""The clips that the tiny model learns from, what their captions say of them, and the judge of what it renders."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from runtime.pipeline import Pipeline
from runtime.request import Request
from studies.tiny_model.clips import FRAMES, HEIGHT, WIDTH, random_clip, render
from studies.tiny_model.evaluate import rendered
from studies.tiny_model.judge import judge, look
from studies.tiny_model.scenes import COLOURS, MOVES, ROUND, SHAPES, Content, random_content, random_placement

STILL = Content("large", "red", "square", "stands still", "dark grey")


def placement(seed: int = 0):
    return random_placement(random.Random(seed))


def test_a_seed_names_one_clip():
    first, second = (random_clip("a name") for _ in range(2))
    assert first[0] == second[0]
    assert np.array_equal(first[1], second[1])
    assert first[1].shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert not np.array_equal(first[1], random_clip("another name")[1])


def test_the_caption_says_what_was_drawn():
    content = Content("small", "red", "ball", "bounces", "dark blue", "warm light", "camera pans left")
    assert content.caption == ("a small red ball bounces in front of a dark blue wall, warm light, camera pans left")
    assert STILL.caption == "a large red square stands still in front of a dark grey wall"


def test_held_out_combinations_are_in_no_training_clip():
    combinations = [
        {(c.colour, c.shape, c.motion) for c in (random_content(random.Random(i), held_out=kept) for i in range(300))}
        for kept in (False, True)
    ]
    assert not combinations[0] & combinations[1]
    assert {colour for colour, _, _ in combinations[1]} == set(COLOURS)
    assert {shape for _, shape, _ in combinations[1]} == set(SHAPES)


def test_the_judge_is_right_about_drawn_clips():
    scenes = [random_clip(f"ground truth {index}", held_out=index % 2 == 0) for index in range(40)]
    wrong = [(content.caption, judge(content, clip).seen) for content, clip in scenes if not judge(content, clip).right]
    assert not wrong


@pytest.mark.parametrize(
    ("change", "part"),
    [({"colour": "blue"}, "colour"), ({"shape": "triangle"}, "shape"), ({"motion": "moves up slowly"}, "motion")],
)
def test_the_judge_names_what_does_not_fit(change, part):
    verdict = judge(replace(STILL, **change), render(STILL, placement()))
    assert not verdict.right
    assert {name: getattr(verdict, name) for name in ("colour", "shape", "motion")} == {
        "colour": part != "colour", "shape": part != "shape", "motion": part != "motion",
    }  # fmt: skip


@pytest.mark.parametrize("motion", [*MOVES, "bounces", "spins"])
def test_the_judge_tells_motions_apart(motion):
    seen = look(render(replace(STILL, motion=motion), placement(1)))
    assert seen.motion == (motion.split()[1] if motion.startswith("moves") else motion)


def test_a_clip_played_backwards_moves_the_other_way():
    clip = render(replace(STILL, motion="moves left quickly"), placement())
    assert (look(clip).motion, look(clip[::-1]).motion) == ("left", "right")


def test_the_judge_sees_no_object_in_an_empty_room_or_noise():
    room = np.full((FRAMES, HEIGHT, WIDTH, 3), 90, np.uint8)
    assert look(room).shape == ""
    noise = np.random.default_rng(0).integers(0, 256, room.shape, np.uint8)
    assert not judge(STILL, noise).right


def test_every_motion_and_shape_is_trained_on_about_equally_often():
    contents = [random_content(random.Random(index), held_out=False) for index in range(1000)]
    shapes = Counter(content.shape for content in contents)
    assert min(shapes.values()) > 120
    assert not any(content.motion == "spins" and content.shape in ROUND for content in contents)


@pytest.mark.slow
@pytest.mark.parametrize("colour", ["yellow", "purple", "blue"])
def test_the_engines_render_the_colour_that_a_prompt_names(flow_of, colour):
    content = Content("large", colour, "ball", "stands still", "light grey")
    with Pipeline.open(flow_of("t2v-a14b-toy").engines) as pipeline:
        verdict = judge(content, rendered(pipeline, Request(content.caption, seed=0)))
    assert verdict.colour, verdict.seen
