"""Stage `verify-step`: the same exploration stages in this layout and in another, compared."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace

import torch

from dsm_train.cli import parse_section, user_errors
from dsm_train.config import ModelConfig, OptimConfig, ParallelConfig, require
from dsm_train.configs import VerifyStepConfig
from dsm_train.grpo import Algorithm, algorithm
from dsm_train.megatron import parallel, platform
from dsm_train.megatron.heads import HeadSpec
from dsm_train.megatron.model import padded_vocab
from dsm_train.megatron.parallel import Parallel
from dsm_train.megatron.weights import ModelSpec
from dsm_train.packing.microbatch import sequence_lengths
from dsm_train.packing.packer import Packer
from dsm_train.prepare import check_batch, prepare
from dsm_train.rollout.record import SupervisedBatch, read_batch
from dsm_train.types import Rollouts, Sequences
from dsm_train.verify.comparison import TOLERANCES, Replayed, compare, table
from dsm_train.verify.finite import broken_values, not_finite
from dsm_train.verify.replay import Replay
from dsm_train.verify.synthetic import synthetic_rollouts
from triton_kernels import Objective

PROG = "dsm-train verify-step"
SYNTHETIC_ENTROPY, SYNTHETIC_DECAY = 0.01, 0.1
LEAST_RATE = 1e-3
"""Updates of a smaller learning rate would drown, and weight decay with them, in the last digit of a weight."""


def verify_step(config: VerifyStepConfig) -> None:
    """Replay in the layout asked for and in the reference layout; exit with status 1 where they differ."""
    with user_errors(PROG):
        plan = make_plan(config)
        parallel.set_threads(config.run.threads)
        ranks = parallel.start(config.parallel, config.run.seed)
    with ranks.watchdog.failures():
        here = plan.replay.run(ranks, plan.packer(ranks))
        titles = plan.titles(ranks)
    there = replay_reference(plan, ranks)
    if there is None:
        return
    if (found := not_finite(here, there, *titles, plan.replay.batches[0])) is not None:
        print(found, flush=True)
        raise SystemExit(1)
    lines = compare(here, there, TOLERANCES[plan.config.model.dtype])
    print(table(lines, here, there, *titles), flush=True)
    if not all(line.holds for line in lines):
        raise SystemExit(1)


@dataclass(frozen=True)
class Plan:
    """A verification, found to be in order."""

    config: VerifyStepConfig
    replay: Replay
    reference: ParallelConfig | None
    """The layout to compare with, of all ranks; None: one rank alone."""

    def packer(self, ranks: Parallel) -> Packer:
        """Pack as configured, in the layout that is verified."""
        return self._packer(ranks, self.config.run.max_tokens, self.config.run.share_prompts)

    def reference_packer(self, ranks: Parallel) -> Packer:
        """Pack with prompts repeated, into micro-batches half as large.

        A mistake that depends on their number shows, and one made where responses share a prompt.
        """
        budget = max(half_budget(batch.sequences, self.config.run.max_tokens) for batch in self.replay.batches)
        return self._packer(ranks, budget, share_prompts=False)

    def _packer(self, ranks: Parallel, max_tokens: int, share_prompts: bool) -> Packer:
        spec = self.replay.spec
        return Packer(spec.config, spec.head.vocab_size, ranks.config, platform.device(), max_tokens, share_prompts)

    def titles(self, ranks: Parallel) -> tuple[str, str]:
        """Name the two layouts."""
        reference = title(ParallelConfig(), 1) if self.reference is None else title(self.reference, ranks.world_size)
        return title(ranks.config, ranks.world_size), reference


def make_plan(config: VerifyStepConfig) -> Plan:
    """Read and check everything that was asked for; raises `ValueError` with the remedy."""
    if config.synthetic == (config.batch is not None):
        raise ValueError("give one of batch=FILE, which dsm-train grpo record=FILE writes, and --synthetic")
    recorded = None if config.batch is None else read_batch(config.batch)
    if config.synthetic and config.algorithm.entropy_coef is None:
        config = replace(config, algorithm=replace(config.algorithm, entropy_coef=SYNTHETIC_ENTROPY))
    if isinstance(recorded, SupervisedBatch):
        algo = Algorithm(Objective(kl_coef=0.0))  # one update without a reference; its loss is not asked for
    else:
        algo, temperature = algorithm(config.algorithm, config.rewards), config.sampling.temperature
        require(temperature > 0, "sampling.temperature", "above 0, as in training", temperature)
    if config.shuffle and algo.minibatches > 1:
        raise ValueError("shuffle would put other groups into each minibatch: set algorithm.minibatches=1 beside it")
    config, _ = prepare(config, None)
    config = replace(config, model=first_layers(config.model, config.layers))
    reference = None
    if config.reference_layout is not None:
        reference = parse_section(ParallelConfig, config.reference_layout, "reference_layout")
    head = HeadSpec.of(config.model)
    for name, layout in (("", config.parallel), ("reference_layout: ", reference or ParallelConfig())):
        padded = padded_vocab(head.vocab_size, config.model.vocab_multiple, layout.tp)
        try:
            parallel.check_layout(layout, config.model, padded)
        except ValueError as error:
            raise ValueError(f"{name}{error}") from error
    replay = Replay(
        ModelSpec(config.model, head, config.run.init, config.run.seed),
        algo,
        config.sampling,
        verified_optim(config.optim, config.synthetic),
        batches(config, algo, recorded, head.vocab_size),
        config.run.seed if config.shuffle else None,
    )
    if algo.minibatches > 1:
        groups = replay.batches[0].sequences.num_prompts
        for layout in (config.parallel, *([reference] if reference else [])):
            check_batch(layout, "the number of the batch's groups", groups, algo.minibatches)
    return Plan(config, replay, reference)


def batches(
    config: VerifyStepConfig, algo: Algorithm, recorded: Rollouts | SupervisedBatch | None, vocab_size: int
) -> list[Rollouts | SupervisedBatch]:
    """Check the recorded batch, which every exploration stage replays, or make one for each."""
    if recorded is not None:
        if isinstance(recorded, Rollouts):
            check_rollouts(recorded, f"batch {config.batch}", algo)
        check_fits(recorded.sequences, f"batch {config.batch}", config, vocab_size)
        return [recorded] * config.verify.steps
    longest = min(config.model.max_length, config.run.max_tokens)
    return [synthetic_rollouts(vocab_size, longest, config.run.seed + number) for number in range(config.verify.steps)]


def verified_optim(optim: OptimConfig, synthetic: bool) -> OptimConfig:
    """Scale a small learning rate up to `LEAST_RATE`, its schedule in proportion, so that the update can be compared.

    A made-up batch comes with weight decay, so that every term of the update is reached. A step that is not finite ends
    no replay: both layouts have as many.
    """
    scale = max(1.0, LEAST_RATE / optim.lr)
    optim = replace(optim, lr=optim.lr * scale, min_lr=optim.min_lr * scale, not_finite="skip")
    return replace(optim, weight_decay=optim.weight_decay or SYNTHETIC_DECAY) if synthetic else optim


def check_rollouts(rollouts: Rollouts, name: str, algo: Algorithm) -> None:
    """Raise `ValueError` when recorded rollouts lack what the loss needs, or teach nothing."""
    if rollouts.reward_S is None:
        raise ValueError(f"{name} holds no rewards: record it with dsm-train grpo ... record=FILE")
    rewards = rollouts.reward_S.split(rollouts.sequences.group_cu.diff().tolist())
    flat = all(len(reward_G[~reward_G.isnan()].unique()) < 2 for reward_G in rewards)
    if flat and not broken_values(rollouts):
        raise ValueError(
            f"{name} teaches nothing, as the rewards of each group are all equal, and there is nothing but rounding to "
            "compare: record another step, with record_step=N"
        )
    if algo.has_reference and rollouts.ref_logprob_T is None:
        raise ValueError(f"{name} was recorded without a reference model: set algorithm.kl_coef=0")


def check_fits(sequences: Sequences, name: str, config: VerifyStepConfig, vocab_size: int) -> None:
    """Raise `ValueError` when a recorded batch is not for this model."""
    tokens = torch.cat([sequences.prompt_token, sequences.response_token_T])
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise ValueError(
            f"{name} has tokens from {int(tokens.min())} to {int(tokens.max())}, and the model rows for {vocab_size}: "
            "give the configuration and run.init that it was recorded with"
        )
    prompt_S = sequences.prompt_cu.diff()[sequences.prompt_of_response_S]
    longest = int((prompt_S + sequences.response_cu.diff()).max())
    for limit, most in (("model.max_length", config.model.max_length), ("run.max_tokens", config.run.max_tokens)):
        if longest > most:
            raise ValueError(f"{name} has a sequence of {longest} tokens: raise {limit} = {most}")


def replay_reference(plan: Plan, here: Parallel) -> Replayed | None:
    """Replay in the reference layout, which takes the place of `here`; None on all ranks but the main one."""
    parallel.stop(here, keep_ranks=plan.reference is not None)
    if plan.reference is None and not here.is_main:
        return None
    gc.collect()  # the first model, which its configuration and its optimizer hold in a cycle
    ranks = parallel.start(plan.reference or ParallelConfig(), plan.config.run.seed, alone=plan.reference is None)
    with ranks.watchdog.failures():
        there = replace(plan.replay, shuffle_seed=None).run(ranks, plan.reference_packer(ranks))
    parallel.stop(ranks)
    return there if here.is_main else None


def half_budget(sequences: Sequences, max_tokens: int) -> int:
    """Halve the tokens of a micro-batch, down to the longest sequence: never all of the batch, repeated, in one."""
    length_S = sequence_lengths(sequences)
    return max(min(max_tokens, int(length_S.sum())) // 2, int(length_S.max()))


def first_layers(model: ModelConfig, layers: int | None) -> ModelConfig:
    """Keep the first layers of the model."""
    if layers is not None and layers > model.num_layers:
        raise ValueError(f"layers = {layers} is more than the model's {model.num_layers}: give at most those")
    return replace(model, num_layers=layers or model.num_layers)


def title(layout: ParallelConfig, world_size: int) -> str:
    """Name a layout in a few characters, such as tp2-dp2-sp."""
    sizes = {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "dp": layout.replicas(world_size)}
    parts = [f"{name}{size}" for name, size in sizes.items() if size > 1] or ["one rank"]
    flags = {"sp": layout.sp, "distributed_optimizer": layout.distributed_optimizer, "overlap": layout.overlap}
    return "-".join([*parts, *(name for name, on in flags.items() if on)])
