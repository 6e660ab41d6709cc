"""Megatron's forward-backward over packed micro-batches, its data-parallel buffers and its optimizer.

T loss rows, N packed tokens, D hidden, V vocabulary (this rank's shard).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor
from torch.distributed import ProcessGroup

from dsm_train.config import ModelConfig, OptimConfig
from dsm_train.megatron import weights
from dsm_train.megatron.flash import FlashAttend
from dsm_train.megatron.layers import Attend, PackedAttend
from dsm_train.megatron.model import HiddenGPTModel, forward_hidden, local_length, whole_sequence
from dsm_train.megatron.parallel import Parallel
from dsm_train.packing.microbatch import MicroBatch
from triton_kernels import LossOutput, linear_logprob


@dataclass(frozen=True)
class Head:
    """What a loss sees of the model: the states that predict the loss rows, and the output head."""

    hidden_TD: Tensor
    weight_VD: Tensor
    """This rank's rows, without those that pad the vocabulary; a rank that holds padding alone has none."""
    tp_group: ProcessGroup | None
    """The ranks that share the vocabulary; None: this rank has all of it."""
    reduce_dx: bool
    """Whether the loss op sums the hidden states' gradient over them; sequence parallelism sums it afterwards."""
    workspace_bytes: int | None
    """Memory that the logits of a chunk may take; None: the op's default."""


Loss = Callable[[Head, MicroBatch], LossOutput]
"""A loss: the micro-batch's share of the step's loss, already normalised over the whole optimizer step."""


class Model:
    """A policy in this layout: chunks to run forward, nothing to train."""

    def __init__(
        self, config: ModelConfig, vocab_size: int, chunks: Sequence[HiddenGPTModel], parallel: Parallel
    ) -> None:
        """vocab_size: the tokenizer's; the weights may be padded beyond it."""
        self.config, self.vocab_size, self.parallel = config, vocab_size, parallel
        self.chunks = list(chunks)
        self.attend = FlashAttend if config.attention == "flash" else PackedAttend
        bf16 = config.dtype == "bf16"
        self.modules: list[Any] = [Float16Module(c.config, c) if bf16 else c for c in chunks]

    def _run(
        self, loss_of: Callable[[Head, MicroBatch], Any], micro_batches: Sequence[MicroBatch], *, train: bool
    ) -> list[Any]:
        """Megatron's schedule; returns what `loss_of` gave on the last stage, in the order of micro-batches.

        Under the interleaved schedule (virtual stages) their number must be a multiple of the pipeline's ranks.
        """

        def forward_step(batches: Any, module: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            self.parallel.watchdog.beat()
            batch: MicroBatch = next(batches)
            output = forward_hidden(module, self.config, batch.token_N, batch.position_N, self.attend(batch.layout))
            return output, partial(self._loss_function, loss_of, batch)

        iterators = [iter(micro_batches) for _ in self.modules]
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.modules if len(self.modules) > 1 else self.modules[0],
            num_microbatches=len(micro_batches),
            seq_length=self.config.max_length,
            micro_batch_size=1,
            forward_only=not train,
            collect_non_loss_data=not train,
        )

    def _loss_function(
        self, loss_of: Callable[[Head, MicroBatch], Any], batch: MicroBatch, output: Tensor, non_loss_data: bool = False
    ) -> Any:
        """Megatron's loss function: (sum, 0 tokens, output), so that nothing is divided after us."""
        hidden_ND, tp = whole_sequence(output, self.chunks[-1].config), self.parallel.groups.tp
        head = Head(
            batch.states.gather(hidden_ND),
            self.head_weight(),
            tp if tp.size() > 1 else None,
            reduce_dx=not self.parallel.config.sp,
            workspace_bytes=self.config.logits_mib and self.config.logits_mib * 2**20,
        )
        result = loss_of(head, batch)
        if non_loss_data:
            return result
        return result.loss, torch.zeros([], dtype=torch.int, device=output.device), result

    def head_weight(self) -> Tensor:
        """This rank's rows of the output head [V, D] without those that pad the vocabulary. On the last stage."""
        weight_VD = self.chunks[-1].head_weight()
        first = self.parallel.groups.tp.rank() * len(weight_VD)
        return weight_VD[: max(0, self.vocab_size - first)]

    @torch.no_grad()
    def hidden(self, token_N: Tensor, position_N: Tensor, attend: Attend) -> Tensor | None:
        """States [N, D] of one packed batch, without gradient: through all stages, on the last one; None elsewhere."""
        layout, config = self.parallel, self.chunks[0].config
        ring, place = dist.get_process_group_ranks(layout.groups.pp), layout.groups.pp.rank()
        output = torch.empty(0)
        for turn, chunk in enumerate(self.chunks):  # stage `turn * pp + place`; the ring goes round once per turn
            if turn or not layout.is_first_stage:
                shape = (local_length(len(token_N), config), 1, self.config.hidden_size)
                output = torch.empty(shape, dtype=config.params_dtype, device=token_N.device)
                dist.recv(output, src=ring[place - 1], group=layout.groups.pp)
                chunk.set_input_tensor(output)
            output = forward_hidden(chunk, self.config, token_N, position_N, attend)
            if not (layout.is_last_stage and chunk is self.chunks[-1]):
                dist.send(output.contiguous(), dst=ring[(place + 1) % len(ring)], group=layout.groups.pp)
        return whole_sequence(output, config)[: len(token_N)] if layout.is_last_stage else None

    @torch.no_grad()
    def logits(self, hidden_BD: Tensor) -> Tensor:
        """Logits [B, V] over the whole vocabulary, fp32 out of the product as those of the log-probabilities.

        On the last stage, the same on each of its tensor-parallel ranks.
        """
        weight_VD = self.chunks[-1].head_weight()
        if hidden_BD.is_cuda and hidden_BD.dtype == torch.bfloat16:
            logits_BV = torch.mm(hidden_BD, weight_VD.T, out_dtype=torch.float32)
        else:
            logits_BV = torch.mm(hidden_BD.float(), weight_VD.float().T)
        return self.parallel.gather_vocabulary(logits_BV)[:, : self.vocab_size]

    @torch.no_grad()
    def logprobs(self, micro_batches: Sequence[MicroBatch], num_rows: int, temperature: float) -> Tensor:
        """Log-probability of every response token of the batch the micro-batches were packed from.

        [T], fp32, on the CPU, on every rank of the replica.
        """

        def score(head: Head, batch: MicroBatch) -> Tensor:
            return linear_logprob(
                head.hidden_TD,
                head.weight_VD,
                batch.target_T,
                temperature=temperature,
                workspace_bytes=head.workspace_bytes,
                tp_group=head.tp_group,
            ).logprob_T

        logprob_T = torch.zeros(num_rows)
        results = self._run(score, micro_batches, train=False)
        if self.parallel.is_last_stage:
            for batch, value in zip(micro_batches, results, strict=True):
                logprob_T[batch.row_T] = value.float().cpu()
        return self.parallel.from_last_stage(logprob_T)


class TrainableModel(Model):
    """A policy with gradient buffers, optimizer and learning-rate schedule."""

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        chunks: Sequence[HiddenGPTModel],
        parallel: Parallel,
        optim: OptimConfig,
        total_steps: int,
    ) -> None:
        super().__init__(config, vocab_size, chunks, parallel)
        layout, megatron = parallel.config, chunks[0].config
        # Weights are gathered at once after an update, never while the next forward pass runs (overlap_param_gather):
        # generation reads them without passing through the wrapper that would wait for them.
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_grad_reduce=layout.overlap,
        )
        self.modules = [
            DistributedDataParallel(megatron, ddp, module, disable_bucketing=i > 0, pg_collection=parallel.groups)
            for i, module in enumerate(self.modules)
        ]
        self.steps = 0
        self.restart(optim, total_steps)

    def restart(self, optim: OptimConfig, total_steps: int) -> None:
        """A fresh optimizer and schedule for `total_steps` more steps; the weights stay."""
        layout, megatron = self.parallel.config, self.chunks[0].config
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=optim.lr,
                min_lr=optim.min_lr,
                weight_decay=optim.weight_decay,
                adam_beta1=optim.beta1,
                adam_beta2=optim.beta2,
                adam_eps=optim.eps,
                clip_grad=optim.clip_grad,
                bf16=self.config.dtype == "bf16",
                params_dtype=megatron.params_dtype,
                use_distributed_optimizer=layout.distributed_optimizer,
            ),
            self.modules,
            use_gloo_process_groups=False,
            pg_collection=None,
        )
        self.schedule = OptimizerParamScheduler(
            # From lr / (warmup_steps + 1) in equal steps to lr: a warm-up from 0 would lose its first step.
            self.optimizer,
            init_lr=optim.lr / (optim.warmup_steps + 1),
            max_lr=optim.lr,
            min_lr=optim.min_lr,
            lr_warmup_steps=optim.warmup_steps,
            lr_decay_steps=max(total_steps, optim.warmup_steps + 1),
            lr_decay_style=optim.schedule,
            start_wd=optim.weight_decay,
            end_wd=optim.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
        megatron.finalize_model_grads_func = finalize_model_grads
        megatron.grad_scale_func = self.optimizer.scale_loss
        syncs = [module.no_sync for module in self.modules]
        no_sync: Any = syncs if len(syncs) > 1 else syncs[0]
        megatron.no_sync_func = no_sync if layout.overlap else None

    def forward_backward(self, micro_batches: Sequence[MicroBatch], loss: Loss) -> list[LossOutput]:
        """Accumulate the gradient of the sum of the micro-batches' losses; gives the last stage's loss outputs."""
        for module in self.modules:
            module.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(loss, micro_batches, train=True)

    def gradients(self) -> dict[str, Tensor]:
        """The full gradients of the last `forward_backward` by canonical name, on the main rank (CPU, fp32).

        {} on other ranks; all of them must call it, before `optimizer_step`, which clips.
        """
        self.gather_gradients()
        return weights.gather_full(self.chunks, self.parallel, weights.gradient)

    def gather_gradients(self) -> None:
        """Make every data-parallel rank's buffers whole; the distributed optimizer leaves each rank its shard only."""
        if not self.parallel.config.distributed_optimizer:
            return
        for module in self.modules:
            for bucket in (bucket for buffer in module.buffers for bucket in buffer.buckets):
                shards = list(bucket.grad_data.chunk(self.parallel.dp_size))
                dist.all_gather(shards, shards[self.parallel.dp_rank].clone(), group=self.parallel.groups.dp)

    def optimizer_step(self) -> float:
        """Clip, update, advance the schedule; returns the global gradient norm before clipping.

        Raises `FloatingPointError` when the norm is not finite: the weights are left as they were.
        """
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(norm):  # without loss scaling, upstream's step would write it into the weights
            raise FloatingPointError(f"the gradient norm is {norm} at optimizer step {self.steps}")
        self.optimizer.step()
        self.schedule.step(increment=1)
        self.steps += 1
        return norm

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next optimizer step."""
        return float(self.optimizer.param_groups[0]["lr"])


def adam_implementation() -> str:
    """Which package's Adam Megatron found."""
    from megatron.core import optimizer

    package = optimizer.Adam.__module__.split(".")[0]
    return {"torch": "PyTorch AdamW", "apex": "apex FusedAdam", "transformer_engine": "Transformer Engine FusedAdam"}[
        package
    ]
