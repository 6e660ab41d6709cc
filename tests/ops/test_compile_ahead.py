"""Every kernel that the ops launch compiles for the GPUs we ship to, on a machine without one."""

from __future__ import annotations

import pytest

from triton_kernels import group_advantage, group_grpo_loss, grpo_loss, token_kl
from triton_kernels._register import Shipped
