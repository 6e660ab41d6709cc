"""Mistakes that a trainer of Algorithm 1 might have, each put into the running code by a patch.

They attach to what the training loop calls, by the names below: where a name moves, it moves here.
"""

from __future__ import annotations

import inspect
import os
import shlex
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from dsm_train import losses, train, update
from dsm_train.__main__ import main
from dsm_train.megatron import step
from dsm_train.megatron.step import Model, TrainableModel
from dsm_train.packing.microbatch import MicroBatch
from dsm_train.rollout.embedded import EmbeddedEngine
from triton_kernels import Objective, PackedLayout

GROUP, CLIP = 4, 0.5
"""Size of groups and the clipped gradient's norm in the runs that are made wrong."""
Patch = pytest.MonkeyPatch
Arguments = dict[str, Any]
"""Arguments of a call by name."""


@dataclass(frozen=True)
class Mutation:
    """A mistake."""

    inject: Callable[[Patch], None]
    shows_in: str
    """A quantity of the run that is not Algorithm 1's then."""
    layout: str = ""
    """The layout of `LAYOUTS` that it takes; "": one rank alone."""
    differs: str = ""
    """A line of verify-step's table that it is found in, in that layout; "": both layouts are wrong in the same way."""


def wrap(patch: Patch, owner: object, name: str, around: Callable[..., Any]) -> None:
    """Call `around(original, ...)` in place of a function or method."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **named: around(original, *args, **named))


def arguments(owner: object, name: str, change: Callable[[Arguments], object]) -> Callable[[Patch], None]:
    """Change the arguments of every call of a function, in place."""

    def around(original: Callable[..., Any], *args: Any, **named: Any) -> Any:
        bound = inspect.signature(original).bind(*args, **named)
        bound.apply_defaults()
        change(bound.arguments)
        return original(*bound.args, **bound.kwargs)

    return lambda patch: wrap(patch, owner, name, around)


def result(owner: object, name: str, change: Callable[[Any], Any]) -> Callable[[Patch], None]:
    """Change what a function returns."""
    return lambda patch: wrap(patch, owner, name, lambda original, *args, **named: change(original(*args, **named)))


def loss(**changes: Callable[[Arguments], Any]) -> Callable[[Patch], None]:
    """Give the policy loss other arguments, each made of those it was given."""
    return arguments(losses, "linear_grpo_loss", lambda a: a.update({n: make(a) for n, make in changes.items()}))


def objective(change: Callable[[Objective], dict[str, Any]]) -> Callable[[Patch], None]:
    """Change fields of the objective, without its checks."""

    def inject(patch: Patch) -> None:
        loss(objective=lambda a: replace(a["objective"], **change(a["objective"])))(patch)
        patch.setattr(Objective, "__post_init__", lambda self: None)

    return inject


def scoring_at_1(trainable: bool, where: Callable[[Model], bool] = lambda model: True) -> Callable[[Patch], None]:
    """Score with the policy, or with the reference, at temperature 1."""

    def change(a: Arguments) -> None:
        if isinstance(a["self"], TrainableModel) == trainable and where(a["self"]):
            a["temperature"] = 1.0

    return arguments(Model, "logprobs", change)


def times_gradient(x: Tensor, factor: float) -> Tensor:
    """x, with a gradient so many times its own."""
    return x * factor - (x * (factor - 1)).detach()


def without_temperature_backward(a: Arguments) -> None:
    """Leave the temperature out of the gradient of the logits."""
    for name in ("hidden_TD", "weight_VD"):
        a[name] = times_gradient(a[name], a["temperature"])


def not_at(rows: Callable[[Tensor], Tensor]) -> Callable[[Patch], None]:
    """Leave out the rows whose numbers are made of the responses' offsets."""
    return loss(weight_T=lambda a: a["weight_T"].index_fill(0, rows(a["response_cu"]).long(), 0.0))


def another_engine(patch: Patch) -> None:
    """Report log-probabilities with the rollouts that are not the trainer's, as an engine of other precision does."""
    result(EmbeddedEngine, "generate", lambda r: replace(r, rollout_logprob_T=r.rollout_logprob_T + 0.3))(patch)


def rollout_as_old(patch: Patch) -> None:
    """Take the engine's log-probabilities for old ones."""
    another_engine(patch)
    result(train, "with_logprobs", lambda r: replace(r, old_logprob_T=r.rollout_logprob_T))(patch)


def decay_norms(patch: Patch) -> None:
    """Let weights decay that are not matrices."""

    def around(original: Callable[..., None], model: TrainableModel, *args: Any) -> None:
        original(model, *args)
        for group in model.optimizer.param_groups:
            group["wd_mult"] = 1.0
        model.schedule.step(increment=0)

    wrap(patch, TrainableModel, "restart", around)


def accumulate(patch: Patch) -> None:
    """Keep the gradient of the update before."""

    def around(original: Callable[..., None], module: Any) -> None:
        before = [buffer.grad_data.clone() for buffer in module.buffers]
        original(module)
        for buffer, gradient in zip(module.buffers, before, strict=True):
            buffer.grad_data.add_(gradient)

    wrap(patch, step.DistributedDataParallel, "zero_grad_buffer", around)


def forget(patch: Patch) -> None:
    """Begin every update with moments of 0."""

    def around(original: Callable[..., float], model: TrainableModel, *args: Any) -> float:
        for optimizer in getattr(model.optimizer, "chained_optimizers", [model.optimizer]):
            optimizer.optimizer.state.clear()
        return original(model, *args)

    wrap(patch, TrainableModel, "optimizer_step", around)


def clip_each_replica(patch: Patch) -> None:
    """Clip each replica's own gradient, before they are summed."""

    def around(original: Callable[..., None], modules: list[Any], *args: Any, **named: Any) -> None:
        gradients = [p.main_grad for module in modules for p in module.parameters()]
        norm = float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())
        for gradient in gradients:
            gradient.mul_(min(1.0, CLIP / (norm + 1e-6)))
        original(modules, *args, **named)

    wrap(patch, step, "finalize_model_grads", around)


def micro_batches(change: Callable[[MicroBatch], MicroBatch]) -> Callable[[Patch], None]:
    """Train on other micro-batches than those that were packed."""

    def around(original: Callable[..., Any], model: TrainableModel, batches: list[MicroBatch], loss: Any) -> Any:
        return original(model, [change(batch) for batch in batches], loss)

    return lambda patch: wrap(patch, TrainableModel, "forward_backward", around)


def mean_over_micro_batches(patch: Patch) -> None:
    """Divide the loss of each micro-batch by their number."""

    def around(original: Callable[..., Any], model: TrainableModel, batches: list[MicroBatch], loss: Any) -> Any:
        def divided(head: object, batch: MicroBatch) -> Any:
            out = loss(head, batch)
            return replace(out, loss=out.loss / len(batches))

        return original(model, batches, divided)

    wrap(patch, TrainableModel, "forward_backward", around)


def as_one_sequence(batch: MicroBatch) -> MicroBatch:
    """Let every token of the buffer see all before it, at the positions that it had."""
    length, no_response = torch.tensor([len(batch.token_N)]), torch.tensor([], dtype=torch.int64)
    group_cu = torch.zeros(2, dtype=torch.int32)
    return replace(batch, layout=PackedLayout.from_groups(length, no_response, group_cu, device=batch.token_N.device))


def replicas() -> int:
    """Number of data-parallel replicas."""
    return parallel_state.get_data_parallel_world_size()


def stages() -> int:
    """Number of pipeline stages."""
    return parallel_state.get_pipeline_model_parallel_world_size()


def loss_times_replicas(a: Arguments) -> None:
    """Multiply the loss of an update by the number of replicas."""
    rows = a["loss"].rows
    a["loss"] = replace(a["loss"], rows=replace(rows, weight_T=rows.weight_T * replicas()))


def keyword(owner: object, name: str, **changes: Callable[[Any], Any]) -> Callable[[Patch], None]:
    """Change keyword arguments of a constructor."""

    def around(original: Callable[..., Any], *args: Any, **named: Any) -> Any:
        return original(*args, **named | {key: make(named[key]) for key, make in changes.items()})

    return lambda patch: wrap(patch, owner, name, around)


MUTATIONS: dict[str, Mutation] = {
    # Log-probabilities, and what is compared with what.
    "old log-probabilities at temperature 1": Mutation(scoring_at_1(True), "old_logprob"),
    "reference log-probabilities at temperature 1": Mutation(scoring_at_1(False), "ref_logprob"),
    "temperature 1 in the loss": Mutation(loss(temperature=lambda a: 1.0), "ratio_max"),
    "no temperature in the backward pass": Mutation(
        arguments(losses, "linear_grpo_loss", without_temperature_backward), "grad_norm"
    ),
    "rollouts sampled at temperature 1": Mutation(
        arguments(EmbeddedEngine, "generate", lambda a: a.update(sampling=replace(a["sampling"], temperature=1.0))),
        "rollout_logprob",
    ),
    "rollout in place of old log-probabilities": Mutation(rollout_as_old, "old_logprob"),
    "reference in place of old log-probabilities": Mutation(
        loss(old_logprob_T=lambda a: a["ref_logprob_T"]), "ratio_max"
    ),
    "old log-probabilities anew in every update": Mutation(loss(old_logprob_T=lambda a: None), "ratio_max"),
    "old in place of reference log-probabilities": Mutation(loss(ref_logprob_T=lambda a: a["old_logprob_T"]), "kl"),
    "the vocabulary's padding in the distribution": Mutation(
        lambda patch: patch.setattr(Model, "head_weight", lambda self: self.chunks[-1].head_weight()), "old_logprob"
    ),
    # The objective.
    "the KL's sign": Mutation(objective(lambda o: {"kl_coef": -o.kl_coef}), "loss"),
    "the entropy bonus' sign": Mutation(objective(lambda o: {"entropy_coef": -o.entropy_coef}), "loss"),
    "the clip range turned round": Mutation(
        objective(lambda o: {"clip_low": o.clip_high, "clip_high": o.clip_low}), "clipped_low"
    ),
    "the other ratio": Mutation(objective(lambda o: {"ratio": "sequence"}), "ratio_max"),
    "the reference never renewed": Mutation(lambda patch: patch.setattr(train, "copy_weights", lambda *_: None), "kl"),
    # Advantages and weights.
    "the population's deviation": Mutation(
        result(update, "group_advantage", lambda a_S: a_S * (GROUP / (GROUP - 1)) ** 0.5), "grad_norm"
    ),
    "all groups as one": Mutation(
        arguments(update, "group_advantage", lambda a: a.update(group_cu=a["group_cu"][[0, -1]])), "loss"
    ),
    "advantages one token off": Mutation(
        loss(advantage_T=lambda a: a["advantage_T"].roll(1)), "loss", differs="gradient norm"
    ),
    "advantages of the first group": Mutation(
        result(update, "group_advantage", lambda a_S: a_S[:GROUP].repeat(len(a_S) // GROUP)), "loss"
    ),
    "no loss on first tokens": Mutation(not_at(lambda cu: cu[:-1][cu.diff() > 0]), "entropy"),
    "no loss on last tokens": Mutation(not_at(lambda cu: cu[1:][cu.diff() > 0] - 1), "entropy"),
    "an average over tokens": Mutation(
        arguments(update, "token_weights", lambda a: a.update(average="token")), "grad_norm"
    ),
    "an average over the stage": Mutation(result(update, "token_weights", lambda w_T: w_T / 2), "grad_norm"),
    # The update.
    "gradients accumulate": Mutation(accumulate, "grad_norm"),
    "moments forgotten": Mutation(forget, "weights"),
    "no clipping": Mutation(keyword(step, "OptimizerConfig", clip_grad=lambda _: 0.0), "weights"),
    "norms decay": Mutation(decay_norms, "weights"),
    "a warm-up from 0": Mutation(keyword(step, "Schedule", init_lr=lambda _: 0.0), "weights"),
    "a decay beyond the last step": Mutation(keyword(step, "Schedule", lr_decay_steps=lambda n: 2 * n), "lr"),
    # Packing.
    "a mean over micro-batches": Mutation(mean_over_micro_batches, "grad_norm", differs="gradient norm"),
    "positions in the buffer": Mutation(
        micro_batches(lambda b: replace(b, position_N=torch.arange(len(b.token_N)))),
        "grad_norm",
        differs="gradient norm",
    ),
    "tokens that see all before them": Mutation(micro_batches(as_one_sequence), "grad_norm", differs="gradient norm"),
    # Layouts.
    "the loss times the replicas": Mutation(
        arguments(update, "optimizer_step", loss_times_replicas), "grad_norm", "dp", "gradient norm"
    ),
    "each replica's own average": Mutation(
        result(update, "token_weights", lambda w_T: w_T * replicas()), "grad_norm", "dp", "gradient norm"
    ),
    "advantages of the first replica": Mutation(
        result(update, "group_advantage", lambda a_S: a_S[: len(a_S) // replicas()].repeat(replicas())),
        "loss",
        "dp",
        "loss",
    ),
    "clipped before they are summed": Mutation(clip_each_replica, "grad_norm", "dp", "gradient norm"),
    "weight decay times the replicas": Mutation(
        keyword(step, "Schedule", start_wd=lambda w: w * replicas(), end_wd=lambda w: w * replicas()),
        "weights",
        "dp",
        "updated weights",
    ),
    "the second moment's decay by stages": Mutation(
        keyword(step, "OptimizerConfig", adam_beta2=lambda b: b if stages() == 1 else b**2),
        "weights",
        "pp",
        "updated weights",
    ),
    "old log-probabilities at temperature 1 under tensor parallelism": Mutation(
        scoring_at_1(True, lambda model: model.parallel.config.tp > 1), "old_logprob", "tp", "old log-probability"
    ),
    "gradients of hidden states not summed": Mutation(
        loss(reduce_dx=lambda a: False), "grad_norm", "tp", "gradient norm"
    ),
}
LAYOUTS = {"dp": "parallel.distributed_optimizer=true", "pp": "parallel.pp=2", "tp": "parallel.tp=2"}


def two_ranks(rank: int, world: int, store: dist.Store, out: Path, *commands: str) -> None:
    """One rank of every mutation that takes two: each command with the layout, in a folder per mutation."""
    os.environ["WORLD_SIZE"] = str(world)
    names = [name for name, mutation in MUTATIONS.items() if mutation.layout]
    for number, (name, command) in enumerate(product(names, commands)):
        place = dist.PrefixStore(str(number), store)
        dist.init_process_group("gloo", store=place, rank=rank, world_size=world)
        folder = out / name
        folder.mkdir(exist_ok=True)
        os.chdir(folder)
        printed = StringIO()
        with Patch.context() as patch, redirect_stdout(printed), suppress(SystemExit):
            MUTATIONS[name].inject(patch)
            main([*shlex.split(command), LAYOUTS[MUTATIONS[name].layout]])
        if rank == 0:
            (folder / f"{command.split()[0]}.txt").write_text(printed.getvalue())
