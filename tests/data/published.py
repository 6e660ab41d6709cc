"""Chat templates of published models, and small tokenizers of every kind in Hugging Face folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
    "'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
DEEPSEEK_MATH = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
QWEN_3 = """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not (message.content.startswith('<tool_response>') and \
message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
            {%- set reasoning_content = message.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1]\
.lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + \
'\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

TEXTS = [
    "What is 7 + 5? What is this? User: What is the answer, Assistant: the answer is 12.\n\n",
    " user assistant system\n It is seven and five makes twelve. [INST] Be brief. [/INST] ### Question:",
    "<|im_end|></s> <s> spelled out </s></s> <|im_end|> <|im_end|> [SEP] [SEP]",
] * 8
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
PLAIN = ("<think>", "</think>")
"""Added tokens that are ordinary text."""


def byte_level(special: Sequence[str], **flags: bool) -> tokenizers.Tokenizer:
    """BPE as of Llama 3 and Qwen: bytes, words with the blank before them."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return _with_added(backend, special, **flags)


def bytes_alone(special: Sequence[str]) -> tokenizers.Tokenizer:
    """Tokenizer without merges: a byte is a token, so that people can count them."""
    vocabulary = {character: id_ for id_, character in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _with_added(backend, special)


def metaspace(special: Sequence[str], scheme: str = "first", **flags: bool) -> tokenizers.Tokenizer:
    """BPE as of Llama 2 and Mistral: characters, with a blank in front of the text or of each piece, and bytes."""
    backend = tokenizers.Tokenizer(models.BPE())
    if scheme == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    words = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace("▁")
    reserved = ["<unk>", *special, *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=reserved, show_progress=False)
    words.train_from_iterator([text.replace("\n", " ") for text in TEXTS], trainer)
    learnt = json.loads(words.to_str())["model"]
    merges = [(a, b) for a, b in learnt["merges"]]
    backend.model = models.BPE(learnt["vocab"], merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    return _with_added(backend, ["<unk>", *special], **flags)


def wordpiece(special: Sequence[str], **flags: bool) -> tokenizers.Tokenizer:
    """WordPiece as of BERT: lower case without accents, words and their parts; special tokens in the vocabulary."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", *special], show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return _with_added(backend, ["[UNK]", *special], **flags)


def unigram(special: Sequence[str], **flags: bool) -> tokenizers.Tokenizer:
    """Unigram as of T5: pieces with scores; the special tokens are the likeliest of them."""
    words = sorted({word for text in TEXTS for word in text.replace("\n", " ").split()})
    pieces = [("<unk>", 0.0), *((token, 0.0) for token in special)]
    pieces += [(f"▁{word}", -8.0) for word in words if "<" not in word and "[" not in word]
    pieces += [(chr(c), -12.0) for c in (*range(33, 127), ord("▁"))]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, 0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁")
    backend.decoder = decoders.Metaspace("▁")
    return _with_added(backend, ["<unk>", *special], **flags)


KINDS: dict[str, Callable[..., tokenizers.Tokenizer]] = {
    "byte-level": byte_level,
    "metaspace first": metaspace,
    "metaspace always": lambda special, **flags: metaspace(special, "always", **flags),
    "prepend": lambda special, **flags: metaspace(special, "normalizer", **flags),
    "wordpiece": wordpiece,
    "unigram": unigram,
}


def _with_added(backend: tokenizers.Tokenizer, special: Sequence[str], **flags: bool) -> tokenizers.Tokenizer:
    flags = {"normalized": False} | flags
    backend.add_special_tokens([AddedToken(token, special=True, **flags) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False) for token in PLAIN])
    return backend


def folder(
    path: Path,
    backend: tokenizers.Tokenizer,
    template: str | None,
    eos: str = "</s>",
    bos: str | None = "<s>",
    puts_bos: bool = True,
) -> Path:
    """Write a folder as `transformers` does; the tokenizer puts `bos` in front of texts and `eos` behind them."""
    from transformers import PreTrainedTokenizerFast

    if puts_bos and bos is not None:
        ids = [(token, backend.token_to_id(token)) for token in (bos, eos)]
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A {eos}", special_tokens=ids)
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos)
    theirs.chat_template = template
    theirs.save_pretrained(path)
    return path
