"""Configuration: frozen dataclasses, one per component; configs.py composes them into one per stage.

Every field has a sentence below it; `python -m dsm_train <stage> --help` shows them. Each component checks its own
values in `__post_init__`; what spans components (heads against tensor parallelism, ...) is checked by the stage.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Preset = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"]
KL = Literal["k1", "k2", "k3", "k1+", "k3+"]
Average = Literal["response", "token", "fixed"]
Scale = Literal["std", "none", "loo", "batch"]


def require(condition: bool, name: str, rule: str, value: object) -> None:
    """Raise `ValueError` with the field's name, the rule and the value unless the condition holds.

    Components name the bare field; the loader puts the section in front that the user wrote it under.
    """
    if not condition:
        raise ValueError(f"{name} must be {rule}; got {value}")


def at_least(least: int, config: object, *names: str) -> None:
    """Raise `ValueError` unless each of these fields is at least so much, or None."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value >= least, name, f"at least {least}", value)


def above(least: float, config: object, *names: str) -> None:
    """Raise `ValueError` unless each of these fields is above so much, or None."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value > least, name, f"above {least}", value)


class Given(dict[str, str]):
    """Keys that a recipe or the command line set, each with its place ("x.yaml:7: "; empty: the command line)."""


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary embedding's frequencies, for sequences beyond the length of the first training.

    Names and defaults are those of transformers' `rope_parameters`, where the meaning is the same.
    """

    kind: Literal["none", "linear", "dynamic", "llama3", "yarn"] = "none"
    """none; linear (position interpolation); dynamic (off up to original_length, and longer sequences are refused);
    llama3 (by wavelength); yarn (arXiv 2309.00071)."""
    factor: float = 1.0
    """Ratio of the new length to the original one."""
    original_length: int | None = None
    """Longest sequence of the first training; llama3, yarn and dynamic need it."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_length / low_freq_factor are scaled by factor."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_length / high_freq_factor are kept."""
    beta_fast: float = 32.0
    """yarn: dimensions that turn more often than this over original_length are kept."""
    beta_slow: float = 1.0
    """yarn: dimensions that turn less often than this are interpolated."""
    truncate: bool = True
    """yarn: round the two bounds to whole dimensions."""
    attention_factor: float | None = None
    """yarn: factor of cos and sin; none: 0.1 ln(factor) + 1."""

    def __post_init__(self) -> None:
        above(0, self, "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
        at_least(1, self, "factor", "original_length")
        if self.kind in ("llama3", "yarn", "dynamic"):
            rule = f"given with kind = {self.kind}"
            require(self.original_length is not None, "original_length", rule, self.original_length)
        if self.kind == "llama3":
            rule = f"above low_freq_factor = {self.low_freq_factor}"
            require(self.high_freq_factor > self.low_freq_factor, "high_freq_factor", rule, self.high_freq_factor)


@dataclass(frozen=True)
class ModelConfig:
    """Decoder of the Llama family: RMSNorm, SwiGLU, RoPE, grouped-query attention; Qwen's biases and query-key norms.

    `run.init` brings a model's own values; what a recipe or the command line says otherwise is refused.
    """

    num_layers: int = 4
    """Transformer layers."""
    hidden_size: int = 128
    """Width of the residual stream."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int = 4
    """Key and value heads; num_heads must be a multiple."""
    head_size: int | None = None
    """Size of a head; hidden_size / num_heads unless given."""
    ffn_size: int = 352
    """Width of the feed-forward layer (SwiGLU)."""
    rope_base: float = 10000.0
    """Base of the rotary position embedding."""
    norm_eps: float = 1e-6
    """Epsilon of RMSNorm."""
    rope: RopeScaling = field(default_factory=RopeScaling)
    """Rotary scaling."""
    qkv_bias: bool = False
    """Biases of the query, key and value projections."""
    output_bias: bool = False
    """Bias of attention's output projection."""
    mlp_bias: bool = False
    """Biases of the feed-forward layer."""
    qk_norm: bool = False
    """RMSNorm of each head's queries and keys, before the rotary embedding."""
    vocab_size: int | None = None
    """Tokens that embedding and head have rows for; none: those of the tokenizer."""
    tied_head: bool = False
    """Share the embedding with the output head."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; output projections get init_std / sqrt(2 num_layers)."""
    max_length: int = 1024
    """Longest prompt plus response, in tokens."""
    vocab_multiple: int = 64
    """Pad the vocabulary to a multiple of this times the tensor-parallel size."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of weights and activations; statistics and accumulation are fp32 in any case."""
    layers: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer implementation; auto takes Transformer Engine where it is installed and the device is CUDA."""
    attention: Literal["dsm", "flash"] = "dsm"
    """Core attention of training and scoring: this project's, or flash-attn's where it is installed (bf16 on CUDA)."""
    logits_mib: int | None = None
    """Memory that the logits of a chunk of tokens may take on a rank, in MiB; none: 64 on the CPU, 2048 on a GPU."""
    recompute: bool = False
    """Recompute activations of every layer in the backward pass: less memory, a third more compute."""

    def __post_init__(self) -> None:
        at_least(1, self, "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_size")
        at_least(1, self, "ffn_size", "max_length", "vocab_multiple", "logits_mib", "vocab_size")
        require(
            self.num_heads % self.num_kv_heads == 0,
            "num_heads",
            f"a multiple of num_kv_heads = {self.num_kv_heads}",
            self.num_heads,
        )
        require(
            self.head_size is not None or self.hidden_size % self.num_heads == 0,
            "hidden_size",
            f"a multiple of num_heads = {self.num_heads}, or head_size given",
            self.hidden_size,
        )
        at_least(0, self, "init_std")
        above(0, self, "rope_base", "norm_eps")
        require(self.kv_channels % 2 == 0, "head_size", "even, for rotary embeddings", self.kv_channels)
        require(
            self.rope.kind != "dynamic" or self.max_length <= (self.rope.original_length or 0),
            "max_length",
            f"at most rope.original_length = {self.rope.original_length} with rope.kind = dynamic, as the scaling of "
            "longer sequences is not there",
            self.max_length,
        )

    @property
    def kv_channels(self) -> int:
        """Size of a head."""
        return self.head_size or self.hidden_size // self.num_heads


@dataclass(frozen=True)
class ParallelConfig:
    """Split of the model and the batch over ranks; data parallelism takes what the others leave."""

    tp: int = 1
    """Tensor-parallel ranks."""
    pp: int = 1
    """Pipeline-parallel ranks."""
    vpp: int = 1
    """Parts of the model per pipeline rank (interleaved schedule)."""
    sp: bool = False
    """Sequence parallelism: norms and residuals split over the tensor-parallel ranks."""
    distributed_optimizer: bool = False
    """Shard the optimizer's state over data-parallel ranks."""
    overlap: bool = False
    """Overlap gradient reduction with the backward pass."""
    balance: bool = True
    """Share the responses of an update out over data-parallel replicas by estimated cost."""
    timeout_minutes: float = 10.0
    """End the run when a rank keeps the others waiting longer; a line names it and what it was doing."""

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.tp * self.pp

    def replicas(self, ranks: int) -> int:
        """Data-parallel replicas on so many ranks."""
        return ranks // self.model_ranks

    def __post_init__(self) -> None:
        at_least(1, self, "tp", "pp", "vpp")
        above(0, self, "timeout_minutes")
        require(self.vpp == 1 or self.pp > 1, "vpp", "1 when pp is 1", self.vpp)
        require(not self.sp or self.tp > 1, "sp", "false when tp is 1", self.sp)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with gradient clipping and a learning-rate schedule."""

    lr: float = 1e-6
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate that the schedule decays to."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine", "multistep"] = "constant"
    """Learning rate after warm-up: constant; linear or cosine decay to min_lr at the last step; multistep (DeepSeek
    LLM's): 31.6 % of lr from 80 % of all steps on, 10 % from 90 % on."""
    weight_decay: float = 0.0
    """Decoupled weight decay; none on norms and biases."""
    beta1: float = 0.9
    """Adam's decay of the first moment."""
    beta2: float = 0.95
    """Adam's decay of the second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Clip the global gradient norm to this; 0 turns clipping off."""
    not_finite: Literal["stop", "skip"] = "stop"
    """On a loss or gradient norm of NaN or infinity, before weights change and with the batch recorded in run.out:
    stop, or skip the optimizer step and go on, up to 10 times in a row."""

    def __post_init__(self) -> None:
        above(0, self, "lr", "eps")
        require(0 <= self.min_lr <= self.lr, "min_lr", f"between 0 and lr = {self.lr}", self.min_lr)
        has_end = self.schedule in ("linear", "cosine")
        require(self.min_lr == 0 or has_end, "min_lr", f"0 with schedule = {self.schedule}", self.min_lr)
        at_least(0, self, "warmup_steps", "weight_decay", "clip_grad")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, name, "at least 0 and below 1", getattr(self, name))


def check_warmup(optim: OptimConfig, updates: int, updates_are: str, section: str = "") -> None:
    """Raise `ValueError` when the learning rate would never reach its peak: called by the one who has `optim`.

    section: where `optim` stands, for a caller whose errors the loader does not see.
    """
    require(
        optim.warmup_steps < updates,
        f"{section}.optim.warmup_steps".removeprefix("."),
        f"below {updates_are} = {updates}, the number of updates, or lr is never reached: lower it or raise that",
        optim.warmup_steps,
    )


@dataclass(frozen=True)
class AlgorithmConfig:
    """GRPO and its family; the defaults are DeepSeekMath's. Values left at none are the preset's."""

    preset: Preset = "grpo"
    """Named member of the family."""
    clip_low: float | None = None
    """Importance ratios are clipped below at 1 - clip_low; grpo, dr_grpo, dapo: 0.2; gspo: 3e-4; cispo: 1."""
    clip_high: float | None = None
    """Importance ratios are clipped above at 1 + clip_high; grpo, dr_grpo: 0.2; dapo, cispo: 0.28; gspo: 4e-4."""
    kl_coef: float | None = None
    """beta, the weight of the KL to the reference model; grpo: 0.04; the others: 0, which keeps no reference model."""
    kl: KL | None = None
    """KL estimator; all: k3, the paper's."""
    entropy_coef: float | None = None
    """Weight of the entropy bonus in the loss; all: 0."""
    average: Average | None = None
    """Mean per response, then over responses (grpo, gspo); over tokens (dapo, cispo); by a fixed length (dr_grpo)."""
    scale: Scale | None = None
    """Scale of the group-relative advantage: the group's deviation; none (dr_grpo); leave-one-out; the batch's."""
    prompts_per_step: int = 16
    """Questions per exploration stage, over all data-parallel ranks."""
    group_size: int = 64
    """G, the responses per question; at least 2."""
    minibatches: int = 1
    """Optimizer steps that share one exploration stage's rollouts, by splitting its groups."""
    epochs: int = 1
    """mu, the passes over each exploration stage's rollouts."""
    reference_every: int = 0
    """Replace the reference model by the policy every so many steps (iterative GRPO); 0: never."""
    shuffle_rewards: bool = False
    """Control experiment: permute rewards within each step, so that they carry no information."""

    def __post_init__(self) -> None:
        require(
            self.group_size >= 2,
            "group_size",
            "at least 2: GRPO's baseline is the group's mean",
            self.group_size,
        )
        at_least(1, self, "prompts_per_step", "minibatches", "epochs")
        at_least(0, self, "reference_every", "clip_low", "clip_high", "kl_coef")
        require(self.clip_low is None or self.clip_low <= 1, "clip_low", "at most 1", self.clip_low)
        require(
            self.prompts_per_step % self.minibatches == 0,
            "prompts_per_step",
            f"a multiple of minibatches = {self.minibatches}",
            self.prompts_per_step,
        )


@dataclass(frozen=True)
class RunConfig:
    """Values that every stage has."""

    out: Path | None = None
    """Folder for metrics, samples, report and weights; none: a new one, runs/STAGE-DATE-TIME."""
    overwrite: bool = False
    """Replace the finished run that `out` holds, its weights as well; without it such a folder is refused."""
    resume: str = "auto"
    """auto: continue the unfinished run that `out` holds, from its newest checkpoint; never: begin anew, and move that
    run aside; or the folder of a checkpoint, or of a run, to continue from."""
    init: Path | None = None
    """Folder of weights to start from: a Hugging Face model, or weights/ of another run; none: random weights. A
    checkpoint becomes such a folder through dsm-train convert."""
    weights_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Type that the weights are written in; none: model.dtype."""
    seed: int = 0
    """Seed of weights, data order and sampling."""
    max_tokens: int = 16384
    """Token budget of a micro-batch on one rank."""
    share_prompts: bool = True
    """Store and compute the prompt of a group once in a micro-batch, not once per response."""
    threads: int = 0
    """CPU threads per rank; 0: the machine's cores divided by the ranks on it."""

    def __post_init__(self) -> None:
        at_least(1, self, "max_tokens")
        at_least(0, self, "threads")
        require(0 <= self.seed < 2**32, "seed", "at least 0 and below 2^32", self.seed)
        require(bool(self.resume), "resume", "auto, never or a folder", repr(self.resume))


@dataclass(frozen=True)
class SftTraining:
    """Supervised fine-tuning on worked solutions and conversations: the mean over the learnt tokens of each step."""

    steps: int | None = None
    """Optimizer steps; none: those of epochs, else 500 in stage sft and no warm-up in stage grpo (as 0)."""
    epochs: float | None = None
    """Passes over the examples, in place of steps; the last step takes what is left."""
    examples: int | None = None
    """Train on this many examples, the first of the seeded order; none: all."""
    batch: int | None = None
    """Examples per optimizer step, over all data-parallel ranks; none: 256, unless batch_tokens is given."""
    batch_tokens: int | None = None
    """Tokens per optimizer step, over all data-parallel ranks, in place of batch: whole examples, up to so many."""
    prompt_loss: bool = False
    """Learn to predict the prompt as well, and all other tokens that are given."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-5))
    """Optimizer of supervised training."""

    def __post_init__(self) -> None:
        at_least(0, self, "steps")
        above(0, self, "epochs")
        at_least(1, self, "batch", "batch_tokens", "examples")
        for name, other in (("epochs", "steps"), ("batch_tokens", "batch")):
            rule = f"left out beside {other} = {getattr(self, other)}, or {other} set to null"
            require(None in (getattr(self, name), getattr(self, other)), name, rule, getattr(self, name))
