"""What Triton is told of engines that it runs itself, and which engines it cannot run."""

from dataclasses import replace

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from runtime.pipeline import Pipeline
from runtime.request import Request
from triton_repo.bls_repository import largest_call_bytes
from triton_repo.repository import RepositoryOptions, write_repository
from triton_repo.settings import Limits
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.stamp import Stamp

BLS = RepositoryOptions(topology="bls")
COMPONENTS = {"text_encoder", "high_noise", "low_noise", "vae_decoder_first", "vae_decoder_next"}


def config(path):
    """What Triton reads; raises for a field or a value that it does not know."""
    return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


def tensors(side):
    return {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in side}


def test_plans_become_models_of_the_tensorrt_backend(compiled, tmp_path):
    engines, repository = compiled(), tmp_path / "repository"
    write_repository(engines, repository, BLS)
    for name in COMPONENTS:
        model = repository / f"wan22_{name}"
        told = config(model / "config.pbtxt")
        assert (told.platform, told.backend, told.max_batch_size) == ("tensorrt_plan", "tensorrt", 0)
        assert (model / "1" / told.default_model_filename).read_bytes() == name.encode()
        (group,) = told.instance_group
        assert (group.kind, list(group.gpus), group.count) == (group.KIND_GPU, [0], 1)
        assert not (model / "configs").exists()


def test_a_model_names_the_profiles_that_its_own_plan_has(compiled, tmp_path):
    write_repository(compiled(), tmp_path / "repository", BLS)
    profiles = {
        name: list(config(tmp_path / f"repository/wan22_{name}/config.pbtxt").instance_group[0].profile)
        for name in COMPONENTS
    }
    assert profiles["high_noise"] == profiles["low_noise"] == ["0", "1"]  # one per size
    assert profiles["text_encoder"] == ["0"]  # both are the same to it


def test_onnx_graphs_become_models_of_the_onnxruntime_backend_with_a_variant_for_the_cpu(tiny_engines, tmp_path):
    write_repository(tiny_engines, tmp_path / "repository", BLS)
    for name in COMPONENTS:
        model = tmp_path / "repository" / f"wan22_{name}"
        on_gpu, on_cpu = config(model / "config.pbtxt"), config(model / "configs" / "cpu.pbtxt")
        assert (on_gpu.backend, on_gpu.instance_group[0].kind) == ("onnxruntime", on_gpu.instance_group[0].KIND_GPU)
        assert (on_cpu.backend, on_cpu.instance_group[0].kind) == ("python", on_cpu.instance_group[0].KIND_CPU)
        assert tensors(on_gpu.input) == tensors(on_cpu.input)
        assert tensors(on_gpu.output) == tensors(on_cpu.output)
        for told, file in ((on_gpu, on_gpu.default_model_filename), (on_cpu, "model.py")):
            (version,) = told.version_policy.specific.versions
            assert (model / str(version) / file).is_file()


def test_the_tensors_of_a_model_are_those_of_its_graph(tiny_engines, tmp_path):
    write_repository(tiny_engines, tmp_path / "repository", BLS)
    told = config(tmp_path / "repository" / "wan22_text_encoder" / "config.pbtxt")
    assert tensors(told.input) == {"input_ids": (model_config_pb2.TYPE_INT64, (1, -1))}
    assert tensors(told.output) == {"embeddings": (model_config_pb2.TYPE_FP32, (1, -1, 128))}


def test_the_pipeline_has_the_inputs_outputs_and_queue_of_the_owner(tiny_engines, tmp_path):
    for topology in ("owner", "bls"):
        write_repository(tiny_engines, tmp_path / topology, RepositoryOptions(topology=topology))
    owner, bls = (config(tmp_path / topology / "wan22" / "config.pbtxt") for topology in ("owner", "bls"))
    assert owner.input == bls.input
    assert owner.output == bls.output
    assert owner.dynamic_batching == bls.dynamic_batching
    assert owner.model_transaction_policy == bls.model_transaction_policy


@pytest.mark.parametrize(
    ("changes", "options", "told"),
    [
        ({}, {"residency": "one-expert"}, "--residency one-expert in topology bls, which keeps all engines loaded"),
        ({}, {"memory_gib": 1e-6}, "of engines, all resident in topology bls | expected at most 0.0 of 1e-06 GiB"),
        ({"backend": "tensorrt-rtx"}, {}, "tensorrt-rtx engines in topology bls"),
    ],
    ids=["one expert at a time", "a GPU that cannot hold all engines", "no backend of Triton's"],
)
def test_engines_that_cannot_all_be_resident_and_served_are_refused(compiled, tmp_path, changes, options, told):
    engines = compiled(**changes)
    with pytest.raises(UserError) as error:
        write_repository(engines, tmp_path / "repository", replace(BLS, **options))
    assert told in str(error.value)
    assert "topology owner" in str(error.value)
    assert not (tmp_path / "repository").exists()


def test_a_plan_that_was_built_for_something_else_is_refused(compiled, tmp_path):
    engines = compiled(plan_of=lambda name: Stamp("a100", Precision.FP32, ()).name if name == "low_noise" else name)
    with pytest.raises(UserError, match=r"low_noise.plan was built for target a100 \| expected h100"):
        write_repository(engines, tmp_path / "repository", BLS)
    assert not (tmp_path / "repository").exists()


def test_plans_that_do_not_tell_what_they_were_built_for_are_named(compiled, tiny_engines, tmp_path):
    unread = write_repository(compiled(), tmp_path / "repository", BLS).unread
    assert set(unread) == {f"{name}.plan" for name in COMPONENTS}
    assert write_repository(tiny_engines, tmp_path / "of graphs", BLS).unread == ()


class Weighed:
    """An engine that notes how many bytes its calls take and give."""

    def __init__(self, engine, calls):
        self.inputs, self.outputs, self._engine, self._calls = engine.inputs, engine.outputs, engine, calls

    def __call__(self, **inputs):
        outputs = self._engine(**inputs)
        given = outputs if isinstance(outputs, tuple) else (outputs,)
        self._calls.append(sum(array.nbytes for array in (*inputs.values(), *given)))
        return outputs


def test_the_largest_call_is_estimated_before_any_is_made(tiny_engines, monkeypatch):
    calls, opened = [], Pipeline.engine
    monkeypatch.setattr(Pipeline, "engine", lambda self, name: Weighed(opened(self, name), calls))
    with Pipeline.open(tiny_engines) as pipeline:
        (step,) = pipeline.denoise(Request("x", size=(128, 128), frames=9, steps=1).completed(pipeline.spec))
        assert len(list(pipeline.decode(step.latents))) == 3
        estimate = largest_call_bytes(pipeline.bundle, Limits(128 * 128, 9))
    assert max(calls) <= estimate <= 1.2 * max(calls)
