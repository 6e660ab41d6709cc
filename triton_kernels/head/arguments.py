"""Arguments of the ops on an output head: checks, autocast, workspace, and the ranks that split the vocabulary.

T loss rows, V vocabulary or this rank's shard of it, D hidden, R ranks that split it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from triton_kernels._checks import NUMBERS, check_bytes, check_number, check_tensor, readable


def autocast(*operands: Tensor) -> list[Tensor]:
    """Operands of a GEMM in the dtype of torch.autocast, where it is on, as torch.mm would take them; fp64 stays.

    The casts are differentiable: a gradient comes back in the dtype of what was given.
    """
    kind = next((x.device.type for x in operands if isinstance(x, Tensor)), "cpu")
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return list(operands)
    dtype = torch.get_autocast_dtype(kind)
    return [x.to(dtype) if _follows_autocast(x) else x for x in operands]


def _follows_autocast(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64


def check_head(hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, ref: str = "") -> None:
    """Raise `ValueError` unless hidden states, weight and bias are those of one head; `ref` starts their names."""
    size = "E" if ref else "D"
    hidden, weight, bias = f"{ref}hidden_T{size}", f"{ref}weight_V{size}", f"{ref}bias_V"
    check_tensor(hidden, hidden_TD, ("T", size))
    check_tensor(weight, weight_VD, ("V", hidden_TD.shape[1]), like=hidden_TD)
    if hidden_TD.dtype != weight_VD.dtype:
        raise ValueError(
            f"{hidden} and {weight} must share a dtype; got {hidden_TD.dtype} and {weight_VD.dtype}: convert one with "
            ".to(dtype), or call under torch.autocast, which converts both"
        )
    if bias_V is not None:
        check_tensor(bias, bias_V, (len(weight_VD),), like=hidden_TD, dtypes=NUMBERS)


def check_softmax(temperature: float, softcap: float | None, ref_softcap: float | None = None) -> None:
    """Raise `ValueError` unless temperature and softcaps are finite and above 0."""
    check_number("temperature", temperature, above=0)
    check_number("softcap", softcap, above=0, optional=True)
    check_number("ref_softcap", ref_softcap, above=0, optional=True)


def checked_workspace(workspace_bytes: int | None, device: torch.device) -> int:
    """The workspace in bytes: as given, or 64 MiB on the CPU and 2 GiB elsewhere."""
    if workspace_bytes is None:
        return 2**26 if device.type == "cpu" else 2**31
    check_bytes("workspace_bytes", workspace_bytes)
    return workspace_bytes


def check_range(target_T: Tensor, V: int) -> None:
    """Raise `ValueError` for a token id outside of the vocabulary, where looking is free."""
    if target_T.numel() and readable(target_T):
        low, high = int(target_T.min()), int(target_T.max())
        if low < 0 or high >= V:
            raise ValueError(f"target_T must lie in 0..{V - 1}; got {low if low < 0 else high}")


def split(hidden_TD: Tensor, weight_VD: Tensor, tp_group: ProcessGroup | None) -> tuple[ProcessGroup | None, list[int]]:
    """The ranks that split the vocabulary, or None for one, and how many tokens each holds, in rank order.

    Synchronises with the device where there are several. Ranks that differ in the number of rows stop here, before the
    exchange that would hang or mix rows up.
    """
    check_group("tp_group", tp_group)
    if tp_group is None or tp_group.size() == 1:
        return None, [len(weight_VD)]
    sizes = torch.tensor([len(hidden_TD), len(weight_VD)], device=hidden_TD.device)
    rows, shards = gather(sizes, tp_group).T.tolist()
    if len(set(rows)) > 1:
        raise ValueError(f"every rank of tp_group must give the same rows; got {rows} rows, in rank order")
    return tp_group, shards


def check_group(name: str, group: ProcessGroup | None) -> None:
    """Raise `ValueError` unless this is a process group or None."""
    if group is not None and not isinstance(group, ProcessGroup):
        raise ValueError(f"{name} must be a torch.distributed.ProcessGroup or None; got {type(group).__name__}")


def gather(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """`x` of every rank, in rank order: [R, *x.shape]; without a group [1, *x.shape]."""
    if group is None:
        return x[None]
    gathered = x.new_empty(group.size(), *x.shape)
    dist.all_gather(list(gathered), x.contiguous(), group=group)
    return gathered
