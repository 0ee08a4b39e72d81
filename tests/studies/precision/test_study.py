"""A precision study from the twin to its two files."""

import json
import re
from dataclasses import replace

import pytest

from studies.precision.run import StudyOptions, precision_study
from studies.precision.twin import TwinSize
from wan22.errors import UserError

SMALL = StudyOptions(
    size=TwinSize(layers=3, width=256, latent=(2, 8, 8)),
    steps=2,
    attention_tokens=(256,),
    linears=("ffn.2",),
    command="...",
)
PRECISIONS = ("fp8", "fp8-attn", "int8", "int8+fp8-attn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("study") / "new"


@pytest.fixture(scope="module")
def seen():
    return []


@pytest.fixture(scope="module")
def study(folder, seen):
    return precision_study(SMALL, folder, lambda *call: seen.append(call))


@pytest.fixture(scope="module")
def results(study):
    return {result.variant.name: result for result in study.results}


@pytest.mark.slow
def test_the_twin_is_as_large_as_the_real_model(study):
    assert len(study.statistics) == 8
    for statistic in study.statistics:
        for real, twin in ((statistic.real.low, statistic.twin.low), (statistic.real.high, statistic.twin.high)):
            assert twin == pytest.approx(real, rel=0.15), statistic.what


@pytest.mark.slow
def test_finer_types_err_less(results):
    worst = {name: result.worst for name, result in results.items()}
    assert 0 < worst["fp16"] < worst["bf16"] < worst["fp8"] < 0.1
    assert worst["fp8"] < worst["fp8, token means at run time"] < worst["fp8 without means"]
    assert worst["int8"] < worst["int8 without factors"] < worst["int8 without means and factors"]
    assert worst["int8"] < 0.5 * worst["fp8"]
    assert worst["int8"] < worst["int8+fp8-attn"] < worst["fp8-attn"]
    assert worst["fp8"] < 0.9 * worst["fp8 without means"]
    for name in PRECISIONS:
        assert worst[f"{name}, calibrated"] < worst[name]
        assert results[f"{name}, calibrated"].psnr_db > results[name].psnr_db
    for name, plain in (("fp8", "fp8 without means"), ("int8", "int8 without means and factors")):
        possible, reached = (worst[plain] - worst[found] for found in (f"{name}, calibrated", name))
        assert reached > 0.5 * possible  # of what prompts can tell, an export without data knows most
    for name in ("nvfp4", "nvfp4, calibrated"):
        assert worst[name.replace("nvfp4", "nvfp4, rank 32")] < 0.95 * worst[name]
    assert results["int8"].psnr_db > results["fp8"].psnr_db > results["fp8 without means"].psnr_db


@pytest.mark.slow
def test_every_variant_has_an_error_for_every_step(study, results):
    assert {len(result.errors) for result in results.values()} == {len(study.timesteps)} == {2}


@pytest.mark.slow
def test_lower_precision_in_one_place_costs_less_than_in_all(study, results):
    linears = [part for part in study.parts if "attention" not in part.name]
    assert {part.name for part in linears} == {"fp8 in ffn.2", "int8 in ffn.2", "nvfp4 in ffn.2"}
    assert all(0 < part.error < results[part.name.partition(" in ")[0]].errors[0] for part in linears)


@pytest.mark.slow
def test_the_order_of_quantising_and_normalising_is_reported(study):
    assert {error.tokens for error in study.attention} == {256}
    assert all(0 < error.as_fused < 0.1 and 0 < error.as_written < 0.1 for error in study.attention)


@pytest.mark.slow
def test_the_largest_magnitudes_of_every_block_are_recorded(study):
    assert [(found.expert, found.block) for found in study.magnitudes] == [("dit", block) for block in range(3)]
    assert all(found.kept > 1 and found.headroom > 1 and found.residual > 1 for found in study.magnitudes)


@pytest.mark.slow
def test_programs_read_what_people_read(study, folder):
    content = json.loads((folder / "study.json").read_text())
    assert content["passed"] is bool(study) is True
    assert content["findings"] == study.sentences
    assert [result["relative_l2_per_step"] for result in content["results"]] == [list(r.errors) for r in study.results]
    page = (folder / "study.html").read_text()
    assert all(result["name"] in page for result in content["results"])
    pictures = re.findall(r"""(?:src|srcset|href)=["']?([^"'\s>]*)""", page)
    assert len(pictures) == 4 and all(picture.startswith("data:image/png") for picture in pictures)
    assert "<script" not in page and "@import" not in page and "url(" not in page


@pytest.mark.slow
def test_progress_ends_with_everything_done(study, seen):
    assert [done for _, done, _, _ in seen] == list(range(len(seen)))
    assert seen[-1][1] == seen[-1][2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "wan3"}, "one of t2v-a14b"),
        ({"steps": 0}, "0 steps"),
        ({"model": "t2v-a14b", "steps": 1}, "none by low_noise"),
        ({"size": TwinSize(width=128)}, "a multiple of 128, at least 256"),
        ({"size": TwinSize(layers=0)}, "0 layers"),
        ({"size": TwinSize(latent=(2, 7, 8))}, "even sides"),
    ],
)
def test_an_invalid_study_is_refused_before_any_work(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        precision_study(replace(SMALL, **change), tmp_path / "new")
    assert not (tmp_path / "new").exists()
