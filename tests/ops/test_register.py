"""Which implementation serves an op: read off the dispatcher, here and where Triton and csrc are missing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from triton_kernels import implementations
from triton_kernels._common import INTERPRET
from triton_kernels._triton import HAS_TRITON

OPS = ("group_advantage", "token_kl", "grpo_loss", "group_grpo_loss")

WITHOUT_TRITON_AND_CPP = """
import sys
sys.modules["triton"] = sys.modules["triton_kernels._C"] = None
import torch
from triton_kernels import Objective, group_grpo_loss, grpo_loss, implementations, token_kl
from triton_kernels.policy.token_kl import token_kl_kernel
served = {op: implementations()[op] for op in %r}
assert all(by == {"cpu": "PyTorch reference", "cuda": "PyTorch reference"} for by in served.values()), served
assert token_kl(torch.tensor([-1.0]), torch.tensor([-3.0]), "k1").tolist() == [2.0]
with torch.inference_mode():
    one, cu = torch.tensor([-1.0]), torch.tensor([0, 1], dtype=torch.int32)
    assert token_kl(one, one - 2, "k1").tolist() == [2.0]
    assert grpo_loss(one, one, one, one, one, cu, Objective()).loss == -1
    assert group_grpo_loss(one, one, one, one, one, cu, cu, Objective(ratio="sequence")).loss == 0
try:
    token_kl_kernel[(1,)]()
except RuntimeError as error:
    print(error)
"""


def test_implementations_in_this_process() -> None:
    served = implementations()
    if INTERPRET:
        expected = {"cpu": "Triton (interpreter)", "cuda": "Triton (interpreter)"}
    else:
        built = importlib.util.find_spec("triton_kernels._C") is not None
        expected = {
            "cpu": "C++" if built else "PyTorch reference",
            "cuda": "Triton" if HAS_TRITON else "PyTorch reference",
        }
    assert {op: served[op] for op in OPS} == dict.fromkeys(OPS, expected)


@pytest.mark.no_interpret
def test_reference_serves_without_triton_and_cpp() -> None:
    script = WITHOUT_TRITON_AND_CPP % (OPS,)
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "token_kl_kernel is a Triton kernel and Triton is not installed: pip install triton"
