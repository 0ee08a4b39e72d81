"""The machine's GPU, if NVIDIA's library sees one."""

import sys
import time
import types

from validate.bench.machine import Nvml, device_peak, machine


def library(used, energy):
    """The part of ``pynvml`` that is used."""
    return types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: b"A GPU",
        nvmlDeviceGetTotalEnergyConsumption=energy,
        nvmlDeviceGetMemoryInfo=lambda handle: types.SimpleNamespace(used=used()),
    )


def test_without_a_gpu_nothing_is_measured(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Nvml.open() is None
    assert machine()["gpu"] == ""
    with device_peak() as found:
        assert found is None


def test_energy_is_in_joules_and_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", library(lambda: 0, lambda handle: 5000))
    assert (Nvml.open().name, Nvml.open().joules()) == ("A GPU", 5.0)

    def unsupported(handle):
        raise RuntimeError

    monkeypatch.setitem(sys.modules, "pynvml", library(lambda: 0, unsupported))
    assert Nvml.open().joules() is None


def test_the_peak_of_the_device_is_the_largest_seen(monkeypatch):
    readings = iter([5, 90, 7])
    monkeypatch.setitem(sys.modules, "pynvml", library(lambda: next(readings, 7), lambda handle: 0))
    monkeypatch.setattr("wan22.memory.SAMPLING_SECONDS", 0.001)
    with device_peak() as found:
        while found.bytes < 90:
            time.sleep(0.001)
    assert found.bytes == 90
