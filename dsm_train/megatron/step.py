"""Megatron's forward-backward over packed micro-batches, its data-parallel buffers and its optimizer.

T loss rows, N packed tokens, D hidden, V vocabulary (this rank's shard).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, Self, TypeVar

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from dsm_train.config import ModelConfig, OptimConfig
from dsm_train.megatron import weights
from dsm_train.megatron.flash import FlashAttend
from dsm_train.megatron.heads import Head, HeadSpec, LanguageHead, ValueHead
from dsm_train.megatron.layers import Attend, PackedAttend
from dsm_train.megatron.model import HiddenGPTModel, build_model, forward_hidden, local_length, whole_sequence
from dsm_train.megatron.parallel import Parallel
from dsm_train.megatron.weights import ModelSpec
from dsm_train.packing.microbatch import MicroBatch
from triton_kernels import linear_logprob


class Differentiable(Protocol):
    """Anything with the scalar that is differentiated: a micro-batch's share of the step's loss."""

    @property
    def loss(self) -> Tensor: ...


OutputT = TypeVar("OutputT", bound=Differentiable)
ResultT = TypeVar("ResultT")
Loss = Callable[[Any, MicroBatch], OutputT]
"""A loss of a head and a micro-batch, already normalised over the whole optimizer step."""
MOST_SKIPPED = 10
"""Optimizer steps that may be skipped in a row. A batch that breaks the arithmetic is rare: after ten, in each of which
nothing was learnt, it is the weights that are broken, and no batch will ever be learnt again."""


class Model:
    """A model in this layout: chunks to run forward, nothing to train."""

    steps = 0
    """Optimizer steps that the weights have seen."""

    def __init__(
        self, config: ModelConfig, spec: HeadSpec, chunks: Sequence[HiddenGPTModel], parallel: Parallel
    ) -> None:
        """Wrap this rank's chunks; `spec` is the head that they were built with."""
        self.config, self.spec, self.parallel = config, spec, parallel
        self.chunks = list(chunks)
        self.attend = FlashAttend if config.attention == "flash" else PackedAttend
        bf16 = config.dtype == "bf16"
        self.modules: list[Any] = [Float16Module(c.config, c) if bf16 else c for c in chunks]

    @classmethod
    def build(cls, spec: ModelSpec, parallel: Parallel, *training: Any) -> Self:
        """Build the model that is specified; training: the optimizer and the number of steps of a trainable one."""
        return cls(spec.config, spec.head, spec.chunks(parallel), parallel, *training)

    def frozen_copy(self) -> Model:
        """Copy the weights into a model of the same layout that is not trained: a reference model."""
        copy = Model(self.config, self.spec, build_model(self.config, self.spec, self.parallel), self.parallel)
        copy.take_weights(self)
        return copy

    def take_weights(self, other: Model) -> None:
        """Take over the weights of a model of the same layout."""
        weights.copy_weights(other.chunks, self.chunks)
        self.steps = other.steps

    def _run(
        self, function: Callable[[Any, MicroBatch], ResultT], micro_batches: Sequence[MicroBatch], *, train: bool
    ) -> list[ResultT]:
        """Run Megatron's schedule; returns what `function` gave where the head is, in the order of micro-batches.

        Under the interleaved schedule their number must be a multiple of the pipeline's ranks.
        """

        def forward_step(batches: Any, module: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            self.parallel.watchdog.beat()
            batch: MicroBatch = next(batches)
            output = forward_hidden(module, self.config, batch.token_N, batch.position_N, self.attend(batch.layout))
            return output, partial(self._loss_function, function, batch)

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
        self, function: Callable[[Any, MicroBatch], Any], batch: MicroBatch, output: Tensor, non_loss_data: bool = False
    ) -> Any:
        """Serve as Megatron's loss function: (sum, 0 tokens, output), so that nothing is divided after us."""
        result = function(self.head(output, batch), batch)
        if non_loss_data:
            return result
        return result.loss, torch.zeros([], dtype=torch.int, device=output.device), result

    def head(self, output: Tensor, batch: MicroBatch) -> Head:
        """Give the head to a loss, with the states that predict the micro-batch's loss rows."""
        # The states' gradient of a language loss is a part on each tensor-parallel rank, of a value loss the whole.
        is_value = self.spec.kind == "value"
        hidden_ND = whole_sequence(output, self.chunks[-1].config, partial_gradient=not is_value)
        hidden_TD, tp = batch.states.gather(hidden_ND), self.parallel.groups.tp
        if is_value:
            return ValueHead(hidden_TD, self.chunks[-1].head_weight())
        return LanguageHead(
            hidden_TD,
            self.head_weight(),
            tp if tp.size() > 1 else None,
            reduce_dx=not self.parallel.config.sp,
            workspace_bytes=self.config.logits_mib and self.config.logits_mib * 2**20,
        )

    def head_weight(self) -> Tensor:
        """Slice this rank's rows of the language head [V, D] from those that pad the vocabulary; where the head is."""
        weight_VD = self.chunks[-1].head_weight()
        first = self.parallel.groups.tp.rank() * len(weight_VD)
        return weight_VD[: max(0, self.spec.vocab_size - first)]

    @torch.no_grad()
    def hidden(self, token_N: Tensor, position_N: Tensor, attend: Attend) -> Tensor | None:
        """Compute the states [N, D] of one packed batch without gradient, where the head is; None elsewhere."""
        parallel, config = self.parallel, self.chunks[0].config
        ring, place = dist.get_process_group_ranks(parallel.groups.pp), parallel.groups.pp.rank()
        output = torch.empty(0)
        for turn, chunk in enumerate(self.chunks):  # part `turn * pp + place`; the ring goes round once per turn
            if turn or not parallel.has_embedding:
                shape = (local_length(len(token_N), config), 1, self.config.hidden_size)
                output = torch.empty(shape, dtype=config.params_dtype, device=token_N.device)
                dist.recv(output, src=ring[place - 1], group=parallel.groups.pp)
                chunk.set_input_tensor(output)
            output = forward_hidden(chunk, self.config, token_N, position_N, attend)
            if not (parallel.has_head and chunk is self.chunks[-1]):
                dist.send(output.contiguous(), dst=ring[(place + 1) % len(ring)], group=parallel.groups.pp)
        return whole_sequence(output, config)[: len(token_N)] if parallel.has_head else None

    @torch.no_grad()
    def logits(self, hidden_BD: Tensor) -> Tensor:
        """Compute logits [B, V] over the whole vocabulary, fp32 out of the product as those of the log-probabilities.

        They are where the head is, the same on each tensor-parallel rank.
        """
        weight_VD = self.chunks[-1].head_weight()
        if hidden_BD.is_cuda and hidden_BD.dtype == torch.bfloat16:
            logits_BV = torch.mm(hidden_BD, weight_VD.T, out_dtype=torch.float32)
        else:
            logits_BV = torch.mm(hidden_BD.float(), weight_VD.float().T)
        return self.parallel.gather_vocabulary(logits_BV)[:, : self.spec.vocab_size]

    @torch.no_grad()
    def logprobs(self, micro_batches: Sequence[MicroBatch], num_rows: int, temperature: float) -> Tensor:
        """Compute the log-probability of every response token of the batch that the micro-batches were packed from.

        [T], fp32, on the CPU, on every rank of the replica.
        """

        def logprob(head: LanguageHead, batch: MicroBatch) -> Tensor:
            return linear_logprob(
                head.hidden_TD,
                head.weight_VD,
                batch.target_T,
                temperature=temperature,
                workspace_bytes=head.workspace_bytes,
                tp_group=head.tp_group,
            ).logprob_T

        logprob_T = torch.zeros(num_rows)
        results = self._run(logprob, micro_batches, train=False)
        if self.parallel.has_head:
            for batch, value in zip(micro_batches, results, strict=True):
                logprob_T[batch.row_T] = value.float().cpu()
        return self.parallel.from_head(logprob_T)


class Schedule(OptimizerParamScheduler):
    """Megatron's schedules of the learning rate, and DeepSeek LLM's multistep (arXiv 2401.02954, section 2.3)."""

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """Compute the learning rate of the next step."""
        if self.lr_decay_style != "multistep" or self.num_steps < self.lr_warmup_steps:
            return super().get_lr(param_group)
        drops = sum(10 * self.num_steps >= tenths * self.lr_decay_steps for tenths in (8, 9))
        return param_group.get("max_lr", self.max_lr) * (1.0, 0.316, 0.1)[drops]


class TrainableModel(Model):
    """A model with gradient buffers, optimizer and learning-rate schedule."""

    def __init__(
        self,
        config: ModelConfig,
        spec: HeadSpec,
        chunks: Sequence[HiddenGPTModel],
        parallel: Parallel,
        optim: OptimConfig,
        total_steps: int,
    ) -> None:
        """Wrap this rank's chunks for `total_steps` optimizer steps."""
        super().__init__(config, spec, chunks, parallel)
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
        """Make a fresh optimizer and schedule for `total_steps` more steps; the weights stay."""
        layout, megatron = self.parallel.config, self.chunks[0].config
        self.optim, self.skipped = optim, 0
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
        self.schedule = Schedule(
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

    def forward_backward(self, micro_batches: Sequence[MicroBatch], loss: Loss[OutputT]) -> list[OutputT]:
        """Accumulate the gradient of the sum of the micro-batches' losses; returns their outputs where the head is."""
        for module in self.modules:
            module.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(loss, micro_batches, train=True)

    def gradients(self) -> dict[str, Tensor]:
        """Gather the full gradients of the last `forward_backward` by canonical name, on the main rank (CPU, fp32).

        {} on other ranks. Collective; call it before `optimizer_step`, which clips.
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

    def optimizer_step(self, loss: float = 0.0) -> float:
        """Clip, update, advance the schedule; returns the global gradient norm before clipping.

        loss: the whole step's, the same on every rank. Unless it and the norm are finite, nothing is done but counted
        in `skipped`: without loss scaling, upstream's step would write NaN into weights and moments.
        """
        norm = self._grad_norm()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.skipped += 1
            return norm
        self.optimizer.step()
        self.schedule.step(increment=1)
        self.steps += 1
        self.skipped = 0
        return norm

    def _grad_norm(self) -> float:
        """Compute the global gradient norm; every rank gets one that is not finite if any rank has. Collective."""
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        # Upstream reduces over the ranks that share the weights, or over all with the distributed optimizer: replicas
        # have the same gradient, so the same norm, unless one of them is broken. The others must not go on alone.
        total = float(self.parallel.all_reduce(torch.tensor(norm, dtype=torch.float64)))
        return norm if math.isfinite(total) else total

    @property
    def gives_up(self) -> bool:
        """True when training is to stop, as the last optimizer step was not made."""
        return self.skipped >= (MOST_SKIPPED if self.optim.not_finite == "skip" else 1)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next optimizer step."""
        return float(self.optimizer.param_groups[0]["lr"])


def adam_implementation() -> str:
    """Name the package whose Adam Megatron found."""
    from megatron.core import optimizer

    package = optimizer.Adam.__module__.split(".")[0]
    return {"torch": "PyTorch AdamW", "apex": "apex FusedAdam", "transformer_engine": "Transformer Engine FusedAdam"}[
        package
    ]
