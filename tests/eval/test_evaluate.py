"""Greedy accuracy and pass@k."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch

from dsm_train.data.format import PlainFormat
from dsm_train.data.tasks import Task
from dsm_train.data.tokenizer import Tokenizer, train_tokenizer
from dsm_train.eval import evaluate
from dsm_train.eval.evaluate import Evaluator, Greedy, pass_at_k
from dsm_train.megatron.parallel import Parallel
from dsm_train.megatron.step import Model
from dsm_train.rewards import RewardConfig, RewardFunction
from dsm_train.rewards.grader import Grader
from dsm_train.rollout.config import SamplingConfig
from dsm_train.types import Prompt, Rollouts, Sequences

TASKS = [Task(id=i, question=f"{i}+1=", answer=str(i + 1), solution=None) for i in range(7)]
GRADER = Grader(RewardConfig())
SAMPLING = SamplingConfig(temperature=0.7, top_p=0.9, top_k=5, max_new_tokens=4)


class Scripted:
    """An engine whose sample i of task n is right when i < right[n]; it notes what it was asked."""

    def __init__(self, tokenizer: Tokenizer, right: Sequence[int], finished: bool = True) -> None:
        self.tokenizer, self.right, self.finished = tokenizer, right, finished
        self.calls: list[tuple[list[int], int, SamplingConfig, int]] = []

    def sync(self, model: Model) -> None:
        """Nothing to take over: the answers are given."""

    def close(self) -> None:
        """Nothing to release."""

    def generate(self, prompts: Sequence[Prompt], num_samples: int, sampling: SamplingConfig, *, step: int) -> Rollouts:
        self.calls.append(([p.id for p in prompts], num_samples, sampling, step))
        texts = [str(p.id + 1 if i < self.right[p.id] else p.id + 2) for p in prompts for i in range(num_samples)]
        responses = [[*self.tokenizer.encode(text), self.tokenizer.eos_id] for text in texts]
        sequences = Sequences.from_lists([p.token for p in prompts], responses, num_samples)
        T, S = sequences.response_token_T.numel(), sequences.num_responses
        return Rollouts(
            sequences,
            torch.tensor([p.id for p in prompts]),
            torch.zeros(T),
            torch.ones(T),
            torch.full((S,), self.finished),
            0,
        )


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([task.question for task in TASKS], 258)


def test_greedy_accuracy_counts_right_answers(tokenizer: Tokenizer, layout: Parallel) -> None:
    engine = Scripted(tokenizer, [1, 0, 1, 1, 0, 1, 0])
    evaluator = Evaluator(engine, tokenizer, PlainFormat(tokenizer, "{question}"), layout, SAMPLING, GRADER)
    assert evaluator.greedy_accuracy(TASKS, print) == pytest.approx(4 / 7)
    # every task once; greedy, untruncated; at a step that no training step has
    assert [ids for ids, *_ in engine.calls] == [[0, 1, 2, 3, 4, 5, 6]]
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=4)
    assert all(call[1:] == (1, greedy, -1) for call in engine.calls)


@pytest.mark.parametrize(("unfinished", "share"), [("zero", 0.0), ("keep", 4 / 7)])
def test_the_grader_says_what_is_correct(
    unfinished: Literal["zero", "keep"], share: float, tokenizer: Tokenizer, layout: Parallel
) -> None:
    engine = Scripted(tokenizer, [1, 0, 1, 1, 0, 1, 0], finished=False)
    # a weight of the answer that is not 1 makes no answer wrong
    grader = Grader(RewardConfig((RewardFunction("numeric", weight=0.5),), unfinished=unfinished))
    assert Evaluator(engine, tokenizer, PlainFormat(tokenizer, "{question}"), layout, SAMPLING, grader).greedy_accuracy(
        TASKS, print
    ) == pytest.approx(share)


def test_a_function_that_only_measures_takes_no_verdict_away(tokenizer: Tokenizer, layout: Parallel) -> None:
    functions = (RewardFunction("numeric"), RewardFunction(call="no_such_module:f", weight=0.0))
    grader = Grader(RewardConfig(functions))
    evaluator = Evaluator(
        Scripted(tokenizer, [1] * 7), tokenizer, PlainFormat(tokenizer, "{question}"), layout, SAMPLING, grader
    )
    assert evaluator.greedy(TASKS, print) == Greedy(1.0, 1.0, 0.0)
    assert grader.trouble is not None and "no module no_such_module" in grader.trouble
    grader.close()


@pytest.mark.parametrize(("samples", "batches"), [(1, [3, 3, 1]), (2, [2] * 7), (4, [4] * 7)])
def test_functions_are_asked_in_batches_and_what_fails_is_said(
    samples: int,
    batches: list[int],
    tokenizer: Tokenizer,
    layout: Parallel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A batch of 3 responses at most, unless one task has more."""
    monkeypatch.setattr(evaluate, "BATCH", 3)
    (tmp_path / "mine.py").write_text(
        "def f(completions, tasks):\n    open(__file__ + '.log', 'a').write(f'{len(completions)}\\n')\n"
        "    return [1 / (len(completions) != 1) for task in tasks]\n"
    )
    grader = Grader(RewardConfig((RewardFunction(call="mine:f"),)), [str(tmp_path)])
    engine, said = Scripted(tokenizer, [1] * 7), list[str]()
    evaluator = Evaluator(engine, tokenizer, PlainFormat(tokenizer, "{question}"), layout, SAMPLING, grader)
    if samples == 1:
        assert evaluator.greedy(TASKS, said.append) == Greedy(6 / 7, 1.0, 1 / 7)
        (line,) = said
        assert line.startswith("evaluation: 14.3% of the responses got no verdict, and count as wrong")
        assert line.endswith("ZeroDivisionError: division by zero")
    else:
        assert evaluator.pass_at_k(TASKS, samples)[samples] == 1.0
    assert [int(size) for size in (tmp_path / "mine.py.log").read_text().split()] == batches
    grader.close()


def test_pass_at_k_averages_over_tasks(tokenizer: Tokenizer, layout: Parallel) -> None:
    right = [4, 0, 1, 2, 3, 0, 4]
    engine = Scripted(tokenizer, right)
    evaluator = Evaluator(engine, tokenizer, PlainFormat(tokenizer, "{question}"), layout, SAMPLING, GRADER)
    result = evaluator.pass_at_k(TASKS, 4)
    assert list(result) == [1, 2, 4]
    assert result[1] == pytest.approx(sum(right) / 28)
    assert result[2] == pytest.approx(sum(pass_at_k(4, c, 2) for c in right) / 7)
    assert result[4] == pytest.approx(5 / 7)  # any right one of all four
    assert all(call[1:3] == (4, SAMPLING) for call in engine.calls)


@pytest.mark.parametrize("num_samples", [1, 4, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(num_samples: int) -> None:
    for num_correct, k in itertools.product(range(num_samples + 1), range(1, num_samples + 1)):
        subsets = list(itertools.combinations([i < num_correct for i in range(num_samples)], k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(num_samples, num_correct, k) == pytest.approx(expected, abs=1e-12)
