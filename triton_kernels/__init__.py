"""The ops of dsm: usable on their own, without the trainer and without Megatron."""

from triton_kernels._common import LossOutput, LossStats
from triton_kernels._register import implementations, load_cpp
from triton_kernels._version import __version__
from triton_kernels.attention.packed_attention import packed_attention
from triton_kernels.attention.packed_layout import PackedLayout
from triton_kernels.head.linear_grpo_loss import LinearGrpoLoss, linear_grpo_loss
from triton_kernels.head.linear_kl import linear_kl
from triton_kernels.head.linear_logprob import LinearLogprob, linear_logprob
from triton_kernels.policy.group_advantage import group_advantage
from triton_kernels.policy.group_grpo_loss import group_grpo_loss
from triton_kernels.policy.grpo_loss import grpo_loss
from triton_kernels.policy.objective import Objective
from triton_kernels.policy.process_advantage import process_advantage
from triton_kernels.policy.token_kl import token_kl

load_cpp()

__all__ = [
    "__version__",
    "LinearGrpoLoss",
    "LinearLogprob",
    "LossOutput",
    "LossStats",
    "Objective",
    "PackedLayout",
    "group_advantage",
    "group_grpo_loss",
    "grpo_loss",
    "implementations",
    "linear_grpo_loss",
    "linear_kl",
    "linear_logprob",
    "packed_attention",
    "process_advantage",
    "token_kl",
]
