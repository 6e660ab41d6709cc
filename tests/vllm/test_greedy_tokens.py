"""A model folder that a stage wrote gives the same greedy tokens in vLLM, on the CPU, and in the embedded generator."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from commands import run_apart
from server import PYTHON, Completion, serve
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from dsm_train.config import ModelConfig
from dsm_train.data.arithmetic import arithmetic_tasks
from dsm_train.data.config import DataConfig
from dsm_train.data.source import make_format
from dsm_train.data.tokenizer import load_tokenizer, train_tokenizer
from dsm_train.hf.folder import Pretrained
from dsm_train.megatron.heads import HeadSpec
from dsm_train.megatron.parallel import Parallel
from dsm_train.megatron.step import Model
from dsm_train.megatron.weights import ModelSpec
from dsm_train.rollout.config import SamplingConfig
from dsm_train.rollout.embedded import EmbeddedEngine
from dsm_train.types import Prompt

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON.is_file(), reason="vLLM is not installed: make vllm-test installs it"),
]

VOCAB = 331  # odd, so that both sides pad it, and more than the tokenizer has
EOS, PAD = 1, 0
STOP = 245  # ends responses too, as Llama 3's models have it
MARGIN = 1e-3
"""Least difference of the two best log-probabilities; rounding differs by far less, so that it decides nothing."""
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 144,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the smallest of vLLM's attention on the CPU; four heads are wider than the residual stream
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": [EOS, STOP],
    "pad_token_id": PAD,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
ARCHITECTURES = {
    "Llama 3": LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    # Qwen2's heads share the width of the residual stream.
    "Qwen2, tied": Qwen2Config(**SHAPE | {"hidden_size": 128, "tie_word_embeddings": True}),
    "Qwen3": Qwen3Config(**SHAPE),
}

GRPO = (
    "warmup.steps=80",
    "warmup.batch=32",
    "warmup.optim.lr=3e-3",
    "algorithm.prompts_per_step=4",
    "algorithm.group_size=4",
    "sampling.max_new_tokens=8",
    "optim.lr=1e-4",
    "steps=20",
    "data.heldout_tasks=8",
)


def write_source(folder: Path, config: PretrainedConfig, spread: float | None = None) -> Path:
    """Save a model and its tokenizer, as transformers does.

    spread: standard deviation of all weights, with biases around 0 and norms around 1; None: as transformers draws.
    """
    texts = [f"{task.question}{task.solution}" for task in arithmetic_tasks(["add"], "train", count=200)]
    tokenizer = train_tokenizer(texts, 300)
    assert tokenizer.vocab_size < VOCAB and (tokenizer.eos_id, tokenizer.pad_id) == (EOS, PAD)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if spread is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, spread)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def stage(name: str, *arguments: str) -> None:
    """Run a stage as a user does."""
    process = run_apart(name, "run.threads=1", *arguments)
    assert process.returncode == 0, process.stderr


def embedded(folder: Path, prompts: list[list[int]], max_tokens: int, layout: Parallel) -> list[Completion]:
    """Greedy answers of the embedded generator with the weights in `folder`."""
    config = Pretrained.of(folder).model(ModelConfig(), given={})
    model = Model.build(ModelSpec(config, HeadSpec.of(config), folder), layout)
    engine = EmbeddedEngine(model, load_tokenizer(folder).stop_ids, seed=0)
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=max_tokens)
    rollouts = engine.generate([Prompt(i, p) for i, p in enumerate(prompts)], 1, sampling, step=0)
    assert float(rollouts.margin_T.min()) > MARGIN
    logprobs = rollouts.rollout_logprob_T.split(rollouts.sequences.response_cu.diff().tolist())
    return [
        Completion(rollouts.sequences.response(s).tolist(), logprob.tolist(), finished)
        for s, (logprob, finished) in enumerate(zip(logprobs, rollouts.finished_S.tolist(), strict=True))
    ]


def compare(ours: list[Completion], theirs: list[Completion]) -> None:
    """Assert that tokens and ends are the same, and log-probabilities up to rounding."""
    assert [completion.token for completion in theirs] == [completion.token for completion in ours]
    assert [completion.finished for completion in theirs] == [completion.finished for completion in ours]
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(torch.tensor(a.logprob), torch.tensor(b.logprob), rtol=0, atol=5e-5)


@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_a_converted_folder_answers_alike(config: PretrainedConfig, tmp_path: Path, layout: Parallel) -> None:
    source, written = write_source(tmp_path / "source", config, spread=0.2), tmp_path / "written"
    stage("convert", f"run.init={source}", f"run.out={written}")
    draw = random.Random(0)
    # Ragged, one beyond the length from which Llama 3 scales; tokens that the tokenizer does not have among them.
    prompts = [[draw.randrange(VOCAB) for _ in range(length)] for length in (1, 5, 17, 100)]
    ours = embedded(written, prompts, 24, layout)
    assert any(completion.finished for completion in ours)
    with serve(written, tmp_path / "vllm.log") as server:
        compare(ours, server.greedy(prompts, 24))


def test_a_trained_folder_answers_alike_and_stops_where_it_learnt_to(tmp_path: Path, layout: Parallel) -> None:
    source = write_source(tmp_path / "source", LlamaConfig(**SHAPE))
    stage("grpo", f"run.init={source}", f"run.out={tmp_path / 'run'}", *GRPO)
    written = tmp_path / "run" / "weights"
    asked = make_format(DataConfig(), load_tokenizer(written))
    prompts = [asked.prompt(task) for task in arithmetic_tasks(["add"], "heldout", count=8)]
    ours = embedded(written, prompts, 24, layout)
    assert all(completion.finished for completion in ours)
    with serve(written, tmp_path / "vllm.log") as server:
        compare(ours, server.greedy(prompts, 24))
