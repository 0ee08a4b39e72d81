"""GPUs of paper that divide tokens: copies between them are ordered by events, and NCCL's calls pair up."""

import ctypes
import itertools
import threading
from collections import defaultdict
from contextlib import ExitStack
from functools import partial
from queue import SimpleQueue
from types import SimpleNamespace

import numpy as np
import pytest

from runtime.backend import tensorrt_backend
from runtime.block_backend import BlockOptions
from runtime.engine_tensorrt import Device
from runtime.group import Group
from runtime.group_backend import GroupBackend
from runtime.group_cuda import NcclLink, begin, link_of, use_gpu
from tests.export.graphs.test_dit import relative_l2
from tests.runtime.fake_gpu import FakeTensorRT
from tests.runtime.test_blocks_tensorrt import Event, StreamingCupy, runs_onnx
from tests.runtime.test_parallel import given_to, velocities
from wan22.bundle import open_bundle
from wan22.errors import UserError
from wan22.parallel import Devices, Split

NAME, HEADS = "ti2v-5b-tiny", 4


class TimedEvent(Event):
    """Counts when it was recorded, and knows whose memory it guards."""

    moments = itertools.count()

    def __init__(self, disable_timing=False):
        super().__init__()

    def record(self, stream):
        super().record(stream)
        self.moment = next(self.moments)


class Card(StreamingCupy):
    """One of several GPUs, whose streams have their own numbers."""

    numbers = itertools.count(100)
    streams_by_number = {}  # noqa: RUF012

    def __init__(self):
        super().__init__(pinned_bytes=2**30)
        self.copies = []
        self.cuda.Event = TimedEvent
        self.strided = 0
        self.cuda.runtime.memcpyPeerAsync = self.copy_between
        self.cuda.runtime.memcpyDefault, self.cuda.runtime.memcpy2DAsync = 4, self.copy_pitched

    def stream(self, non_blocking=False):
        made = super().stream(non_blocking)
        made.ptr = next(self.numbers)
        self.streams_by_number[made.ptr] = made
        return made

    def copy_between(self, target, to_gpu, source, from_gpu, size, stream):
        if to_gpu != from_gpu:
            ready = self.streams_by_number[stream].waited[-1]
            assert ready.recorded_on not in self.streams, "a copy waits for the GPU that it reads"
        self.copies.append((from_gpu, to_gpu, size))
        ctypes.memmove(target, source, size)

    def copy_pitched(self, target, to_pitch, source, from_pitch, *sizes_and_rest):
        """A copy whose GPUs the driver finds by the addresses."""
        width, height, kind, stream = sizes_and_rest
        assert kind == self.cuda.runtime.memcpyDefault
        assert width <= min(to_pitch, from_pitch)
        assert self.streams_by_number[stream] in self.streams
        self.strided += 1
        for row in range(height):
            ctypes.memmove(target + row * to_pitch, source + row * from_pitch, width)


@pytest.fixture
def cards():
    """Two GPUs, as :class:`Device`."""
    with ExitStack() as stack:
        found = []
        for number in range(2):
            trt = FakeTensorRT(None)
            trt.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=runs_onnx)
            device = stack.enter_context(Device(trt, Card()))
            device.number = number
            found.append(device)
        yield found


@pytest.mark.parametrize(("weights_in", "way"), [("vram", "peers"), ("disk", "peers"), ("disk", "driver")])
def test_two_gpus_compute_what_one_computes(divisible, cards, weights_in, way, monkeypatch):
    """Through each other's memory or, without NCCL, through the driver's copies, which are of whole pieces alone."""
    if way == "driver":
        monkeypatch.setattr("runtime.group_cuda.import_module", lambda *_: SimpleNamespace(available=False))
    for card in cards:
        card.reaches_peers = way == "peers"
    folder = divisible(NAME, HEADS)
    bundle = open_bundle(folder, "engines").in_groups(2)
    expected, _ = velocities(folder, NAME)
    options, devices = BlockOptions(weights_in), Devices(Split(ulysses=2), (0, 1))
    with Group(["GPU 0", "GPU 1"]) as group:
        members = [tensorrt_backend(bundle, card, options) for card in cards]
        backend = GroupBackend(bundle, group, devices, members)
        with backend.engine(bundle.component("dit")) as engine:
            for _ in range(2):
                assert relative_l2(engine(**given_to(bundle.manifest.spec.dit)), expected["dit"]) <= 1e-6
    for number, card in enumerate(cards):
        crossed = [size for source, target, size in card.cupy.copies if source != target]
        assert {target for _, target, _ in card.cupy.copies} == {number}
        layers = bundle.manifest.spec.dit.layers
        if way == "peers":
            assert len(crossed) >= 3 * layers
            assert card.cupy.strided == 2 * 2 * layers  # own and received heads, twice
        else:
            assert len(crossed) >= (3 + HEADS // 2) * layers
            assert card.cupy.strided == 2 * layers  # within the GPU


def test_two_gpus_compute_it_through_nccl_too(divisible, cards, monkeypatch):
    nccl = Nccl()
    monkeypatch.setattr("runtime.group_cuda.import_module", lambda *_: nccl)
    for card in cards:
        card.reaches_peers = False
    folder = divisible(NAME, HEADS)
    bundle, devices = open_bundle(folder, "engines").in_groups(2), Devices(Split(ulysses=2), (0, 1))
    expected, _ = velocities(folder, NAME)
    with Group(["GPU 0", "GPU 1"], deadline_s=20) as group:
        members = [tensorrt_backend(bundle, card, BlockOptions("disk")) for card in cards]
        backend = GroupBackend(bundle, group, devices, members)
        with backend.engine(bundle.component("dit")) as engine:
            assert relative_l2(engine(**given_to(bundle.manifest.spec.dit)), expected["dit"]) <= 1e-6
    assert not any(source != target for card in cards for source, target, _ in card.cupy.copies)


class Nccl:
    """NCCL's calls on host memory: a message is sent when its group ends."""

    available, NCCL_UINT8 = True, 1

    def __init__(self):
        self.mail, self.own = defaultdict(SimpleQueue), threading.local()
        self.identities = itertools.count()

    def get_unique_id(self):
        return ("id", next(self.identities))

    def groupStart(self):  # noqa: N802
        self.own.group = []

    def groupEnd(self):  # noqa: N802
        for _, work in sorted(self.own.group, key=lambda each: each[0]):  # sends first
            work()

    def NcclCommunicator(self, size, identity, rank):  # noqa: N802
        def send(ptr, count, kind, peer, stream):
            assert kind == self.NCCL_UINT8
            self.own.group.append((0, lambda: self.mail[identity, rank, peer].put(ctypes.string_at(ptr, count))))

        def recv(ptr, count, kind, peer, stream):
            self.own.group.append(
                (1, lambda: ctypes.memmove(ptr, self.mail[identity, peer, rank].get(timeout=20), count))
            )

        assert size == 2
        return SimpleNamespace(send=send, recv=recv)


def test_nccl_moves_messages_of_uneven_sizes_where_gpus_do_not_reach_each_other(cards, monkeypatch):
    nccl = Nccl()
    monkeypatch.setattr("runtime.group_cuda.import_module", lambda *name: {(".cuda.nccl", "cupy"): nccl}[name])
    for card in cards:
        card.reaches_peers = False
    rows = [slice(0, 3), slice(3, 5)]
    with Group(["GPU 0", "GPU 1"], deadline_s=20) as group:
        links = [link_of(card, group.meeting((0, 1)), rank, 2) for rank, card in enumerate(cards)]
        assert all(isinstance(link, NcclLink) for link in links)

        def exchange(rank):
            put = cards[rank].cupy.asarray
            own = put(np.arange(100 * rank, 100 * rank + 2 * (3 - rank), dtype=np.float32).reshape(2, -1))
            every = put(np.zeros(5, np.float32))
            for _ in range(2):
                links[rank].all_to_all(list(own), [every[its] for its in rows])
            heads = put(np.stack([every, every + 1000]))  # two of each member
            joined = put(np.zeros((4, 3 - rank), np.float32))
            links[rank].all_to_all([heads[:, its] for its in rows], [joined[:2], joined[2:]], pieces=2)
            return np.array(every), np.array(joined)

        found = group.run({rank: partial(exchange, rank) for rank in range(2)})
    assert found[0][0].tolist() == [0, 1, 2, 100, 101]
    assert found[1][0].tolist() == [3, 4, 5, 102, 103]
    of_first, of_last = found[0][0], found[1][0]
    for (_, joined), its in zip((found[0], found[1]), rows, strict=True):
        assert np.array_equal(joined, [of_first[its], of_first[its] + 1000, of_last[its], of_last[its] + 1000])
    assert [link.sent_bytes for link in links] == [2 * 12 + 2 * 8, 2 * 8 + 2 * 12]


def test_gpus_that_are_not_there_and_those_that_do_not_reach_each_other(monkeypatch):
    used, enabled = [], []
    runtime = SimpleNamespace(
        getDeviceCount=lambda: 2,
        deviceCanAccessPeer=lambda one, other: 0 if {one, other} == {0, 1} else 1,
        deviceEnablePeerAccess=enabled.append,
        CUDARuntimeError=OSError,
    )
    device = lambda number: SimpleNamespace(use=lambda: used.append(number))  # noqa: E731
    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime, Device=device))
    monkeypatch.setattr("runtime.group_cuda.require_module", lambda *_: cupy)
    with pytest.raises(UserError, match=r"--gpus 0,2 on a machine with 2 \| expected numbers from 0 to 1"):
        use_gpu(0, (0, 2))
    assert use_gpu(0, (0, 1)) == [1]
    assert (used, enabled) == ([0], [])
    told = []
    with Group(["GPU 0", "GPU 1"]) as group:
        assert not begin(group, (0, 1), told.append)
    assert told == ["GPUs 0 and 1 do not reach each other's memory: what they exchange goes through host memory"]
    runtime.deviceCanAccessPeer = lambda one, other: 1
    assert use_gpu(1, (0, 1)) == []
    assert enabled == [0]
    with Group(["GPU 0", "GPU 1"]) as group:
        assert begin(group, (0, 1), told.append)
    assert len(told) == 1


def test_the_calls_are_those_of_the_installed_cupy():
    """Cython writes the signatures into the docstrings."""
    cupy = pytest.importorskip("cupy", reason="the API of an installed CuPy")
    nccl = pytest.importorskip("cupy.cuda.nccl", reason="its NCCL")
    told = cupy.cuda.runtime.memcpyPeerAsync.__doc__
    assert "(intptr_t dst, int dstDevice, intptr_t src, int srcDevice, size_t size, intptr_t stream)" in told
    told = cupy.cuda.runtime.memcpy2DAsync.__doc__
    assert "(intptr_t dst, size_t dpitch, intptr_t src, size_t spitch, size_t width, size_t height, " in told
    assert "MemoryKind kind, intptr_t stream)" in told
    assert cupy.cuda.runtime.memcpyDefault == 4
    assert "(int device, int peerDevice)" in cupy.cuda.runtime.deviceCanAccessPeer.__doc__
    assert "(int peerDevice)" in cupy.cuda.runtime.deviceEnablePeerAccess.__doc__
    assert "(int ndev, bytes commId, int rank" in nccl.NcclCommunicator.__doc__
    for name, buffer in (("send", "sendbuf"), ("recv", "recvbuf")):
        taken = f"(self, intptr_t {buffer}, size_t count, int datatype, int peer, intptr_t stream)"
        assert taken in getattr(nccl.NcclCommunicator, name).__doc__
    for name in ("available", "get_unique_id", "groupStart", "groupEnd", "NCCL_UINT8"):
        assert hasattr(nccl, name)
