"""Examples of supervised training: what is learnt, kept and left out, and the order that steps take them in.

Tokens are bytes here.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest
import torch

from dsm_train.course import Course, cut_steps
from dsm_train.data.format import Example
from dsm_train.data.order import draw, order_of
from dsm_train.data.tasks import Task
from dsm_train.examples import Examples, Limit, learnable, tokenise

LIMIT = Limit("model.max_length", 12)


@dataclass(frozen=True)
class Bytes:
    """A format whose tokens are bytes; of the solution, capital letters are not learnt."""

    def prompt(self, task: Task) -> list[int]:
        return list(task.question.encode())

    def text(self, task: Task) -> str:
        return task.question

    def example(self, task: Task) -> Example:
        solution = task.solution or ""
        return Example(self.prompt(task), list(solution.encode()), [not c.isupper() for c in solution])


def task(number: int, question: str, solution: str) -> Task:
    return Task(number, question, solution=solution, place=f"x.jsonl:{number}")


def examples(*texts: tuple[str, str], prompt_loss: bool = False, skip: bool = True, **options: int) -> Examples:
    tasks = [task(number, *pair) for number, pair in enumerate(texts, start=1)]
    return tokenise(tasks, Bytes(), LIMIT, prompt_loss=prompt_loss, skip=skip, **options)


@pytest.mark.parametrize(
    ("prompt", "solution", "prompt_loss", "given", "learnt"),
    [
        ("ask", "abc", False, "ask", "abc"),
        ("ask", "abUVcd", False, "ask", "ab--cd"),  # two turns of the assistant, one of the user between them
        ("ask", "UVab", False, "askUV", "ab"),  # what is given before the first learnt token is prompt
        ("ask", "abUV", False, "ask", "ab"),  # what follows the last predicts nothing that is learnt
        ("ask", "abUV", True, "a", "skabUV"),
        ("", "abc", False, "a", "bc"),  # nothing predicts the first token
    ],
)
def test_what_is_learnt(prompt: str, solution: str, prompt_loss: bool, given: str, learnt: str) -> None:
    example = learnable(Bytes().example(task(1, prompt, solution)), prompt_loss)
    assert example is not None
    assert bytes(example.prompt).decode() == given
    marked = "".join(chr(t) if yes else "-" for t, yes in zip(example.response, example.learnt, strict=True))
    assert marked == learnt


@pytest.mark.parametrize("pair", [("ask", ""), ("ask", "UV"), ("", "a"), ("", "")])
def test_an_example_without_a_token_to_learn_is_left_out_and_counted(pair: tuple[str, str]) -> None:
    kept = examples(pair, ("q", "abc"))
    assert [t.id for t in kept.tasks] == [2] and kept.left_out.unlearnt == 1


def test_tokens_and_masks_come_back_as_they_were() -> None:
    kept = examples(("one", "abXc"), ("seven", "defg"), ("q", "h"))
    batch, learnt_T = kept.take(torch.tensor([2, 0]))
    assert [bytes(batch.prompt(p).tolist()) for p in range(2)] == [b"q", b"one"]
    assert [bytes(batch.response(s).tolist()) for s in range(2)] == [b"h", b"abXc"]
    assert learnt_T.tolist() == [True, True, True, False, True]
    assert batch.response_token_T.dtype == torch.int64 and kept.token_N.dtype == torch.int32
    assert kept.first == Example(list(b"one"), list(b"abXc"), [True, True, False, True])
    empty, none = kept.take(torch.tensor([], dtype=torch.int64))
    assert empty.num_responses == 0 and none.numel() == 0


def test_the_limit_counts_packed_tokens() -> None:
    kept = examples(("123456", "1234567"), ("123456", "12345678"), ("123456", "1234567890"))
    assert kept.packed_E.tolist() == [12]
    left_out = kept.left_out
    assert (left_out.too_long, left_out.longest, left_out.where) == (2, 15, "x.jsonl:3")


def test_the_first_that_is_too_long_is_named() -> None:
    message = "model.max_length = 12 is less than prompt and solution of x.jsonl:2, 16 tokens: .*too_long=skip"
    with pytest.raises(ValueError, match=message):
        examples(("q", "abc"), ("a longer one", "than!"), ("longest of all here", "abc"), skip=False)


def test_the_first_examples_are_those_that_can_be_learnt() -> None:
    kept = examples(("q", "X"), ("q", "0123456789abcdef"), ("q", "a"), ("q", "b"), ("q", "c"), count=2)
    assert [t.solution for t in kept.tasks] == ["a", "b"]


def course(sizes: list[int], budget: int, **length: float | None) -> Course:
    """Examples that carry their number in their tokens, and take so much of the budget."""
    pairs = [(f"{number:03}", "a" * size) for number, size in enumerate(sizes)]
    tasks = [task(number, *pair) for number, pair in enumerate(pairs)]
    kept = tokenise(tasks, Bytes(), Limit("", 999), prompt_loss=False, skip=False)
    order = order_of([0] * len(sizes), seed=3)
    given = {"steps": None, "epochs": None} | length
    return Course(kept, kept, order, cut_steps(torch.tensor(sizes), budget, order, **given))  # type: ignore[arg-type]


def numbers(of: Course, step: int) -> list[int]:
    batch, _ = of.batch(step)
    return [int(bytes(batch.prompt(p).tolist())) for p in range(batch.num_prompts)]


@pytest.mark.parametrize("batch", [1, 4, 10, 23])
def test_a_step_takes_the_tasks_that_draw_gives(batch: int) -> None:
    """Passes follow each other without a gap, and a step may span several."""
    planned = course([1] * 10, batch, steps=7)
    tasks = [task(number, "", "") for number in range(10)]
    assert planned.steps == 7
    for step in random.Random(0).sample(range(7), 7):
        assert numbers(planned, step) == [t.id for t in draw(tasks, planned.order, batch, step)]


@pytest.mark.parametrize(
    ("epochs", "steps", "last"), [(1.0, 3, 2), (2.0, 5, 4), (0.5, 2, 1), (2.5, 7, 1), (0.01, 1, 1)]
)
def test_epochs_are_exact(epochs: float, steps: int, last: int) -> None:
    planned = course([1] * 10, 4, epochs=epochs)
    assert planned.steps == steps and len(numbers(planned, steps - 1)) == last
    seen = Counter(number for step in range(steps) for number in numbers(planned, step))
    assert sum(seen.values()) == max(1, round(10 * epochs))
    assert set(seen.values()) <= {int(epochs), int(epochs) + 1}


@pytest.mark.parametrize("length", [{"epochs": 1.0}, {"epochs": 3.0}, {"steps": 9}, {"epochs": 1.7}])
def test_a_step_takes_whole_examples_up_to_the_budget(length: dict[str, float]) -> None:
    sizes = [3, 9, 1, 4, 12, 7, 2, 2, 5, 11, 8]
    planned = course(sizes, 20, **length)
    line = [numbers(planned, step) for step in range(planned.steps)]
    taken = [sum(sizes[number] for number in step) for step in line]
    assert all(1 <= size <= 20 for size in taken)
    for size, following in zip(taken, line[1:], strict=False):
        assert size + sizes[following[0]] > 20  # not one more would have fitted
    if "epochs" in length:
        assert sum(map(len, line)) == round(len(sizes) * length["epochs"])
    else:
        assert planned.steps == length["steps"]
    flat = [number for step in line for number in step]
    assert flat == [planned.order(i // len(sizes))[i % len(sizes)] for i in range(len(flat))]
