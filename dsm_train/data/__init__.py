"""Tasks (generated or read from files) and tokenizers."""

from dsm_train.data.arithmetic import arithmetic_tasks
from dsm_train.data.jsonl import read_jsonl
from dsm_train.data.tasks import Task
from dsm_train.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

__all__ = ["Task", "Tokenizer", "arithmetic_tasks", "load_tokenizer", "read_jsonl", "train_tokenizer"]
