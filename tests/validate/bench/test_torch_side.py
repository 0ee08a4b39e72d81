"""A missing dependency of torch.compile is reported in one line before any work."""

import pytest
import torch

from validate.bench.torch_side import check_compiles
from wan22.errors import UserError


def test_a_missing_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing compiled earlier is found
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/nowhere/g++",))
    torch._dynamo.reset()
    with pytest.raises(UserError, match=r"torch.compile: .*C\+\+ compiler.*or omit --compile"):
        check_compiles(torch.device("cpu"))
