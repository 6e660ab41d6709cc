"""Hugging Face folders of every architecture, in one rank and in layouts of two and four: the same model, in and out.

Tiny models that keep the shape rules of real ones: odd vocabularies, grouped queries, tied heads, biases, norms of
queries and keys, scaled rotary embeddings.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import hf_worker
import pytest
import torch
import transformers
from hf_worker import GREEDY, LAYOUTS, LENGTHS, PROMPTS, tokens
from ranks import run_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
SHAPE = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
MODELS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "llama": ({"model_type": "llama", "vocab_size": 61, "num_key_value_heads": 4}, torch.float32),
    "llama3": (
        {
            "model_type": "llama",
            "vocab_size": 63,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
                "rope_theta": 500.0,
            },
        },
        torch.bfloat16,
    ),
    "deepseek": (
        {"model_type": "llama", "vocab_size": 64, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        torch.float16,
    ),
    "mistral": ({"model_type": "mistral", "vocab_size": 65, "head_dim": 16, "sliding_window": None}, torch.float32),
    "qwen2": (
        {"model_type": "qwen2", "vocab_size": 71, "tie_word_embeddings": True, "rope_parameters": YARN},
        torch.bfloat16,
    ),
    "qwen3": (
        {
            "model_type": "qwen3",
            "vocab_size": 67,
            "head_dim": 12,
            "attention_bias": True,
            "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False},
        },
        torch.float32,
    ),
    "wide": (
        {"model_type": "qwen3", "vocab_size": 997, "hidden_size": 64, "head_dim": 16, "intermediate_size": 512},
        torch.float16,
    ),
    "value": ({"model_type": "qwen2", "vocab_size": 61, "num_labels": 1, "tie_word_embeddings": True}, torch.float32),
}
LANGUAGE = [name for name in MODELS if name != "value"]


def make_folder(name: str, folder: Path) -> Any:
    """Save a random model as transformers does; returns it as transformers loads it, in fp64."""
    values, dtype = MODELS[name]
    config = transformers.CONFIG_MAPPING[values["model_type"]].from_dict(SHAPE | values)
    auto = AutoModelForSequenceClassification if name == "value" else AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # an initial scale of 0.3 keeps the tokens' logits well apart
            parameter.normal_(1.0 if "norm" in key else 0.0, 0.1 if "norm" in key else 0.3)
            parameter.view(-1)[0] = -0.0  # a zero that has a sign to keep
        model.model.norm.weight.mul_(0.3)  # logits of order 1, to which 1e-5 is an absolute bound
    model.to(dtype).save_pretrained(folder, max_shard_size="40KB")
    return auto.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The models, the outputs that transformers computes, and the results of the ranks of every layout."""
    out = tmp_path_factory.mktemp("hf")
    models = {name: make_folder(name, out / "in" / name) for name in MODELS}
    for world in (1, 2, 4):
        run_ranks(hf_worker.main, world, out, *(str(out / "in" / name) for name in MODELS))
    results = {
        name: [torch.load(out / f"{name}-{rank}.pt") for rank in range(world)] for name, (world, _) in LAYOUTS.items()
    }
    return {"out": out, "models": models, "results": results}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_transformers(name: str, layout: str, written: dict[str, Any]) -> None:
    """Logits over all rows of the vocabulary, of order 1 (1 to 4 at most), to 1e-5 absolute; so values."""
    model = written["models"][name]
    with torch.no_grad():
        hidden = torch.cat([model.model(token[None]).last_hidden_state[0] for token in tokens()])
        expected = (model.score if name == "value" else model.lm_head)(hidden)
    outputs = [rank[name]["outputs"] for rank in written["results"][layout] if "outputs" in rank[name]]
    assert len(outputs) == LAYOUTS[layout][1].tp and outputs[0].shape == expected.shape
    for output in outputs:
        assert 1 < float(expected.abs().max()) < 4
        assert float((output.detach() - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_import_then_export_gives_every_tensor_back_to_the_bit(name: str, layout: str, written: dict[str, Any]) -> None:
    before, after = (tensors(written["out"] / place / name) for place in ("in", layout))
    assert before.keys() == after.keys() and len(before) > 10
    for key, value in before.items():
        same = value.dtype == after[key].dtype and value.shape == after[key].shape
        assert same and torch.equal(value.view(torch.uint8), after[key].view(torch.uint8)), key
    assert len(list((written["out"] / layout / name).glob("*.safetensors"))) > 1
    assert all(rank[name]["intact"] for rank in written["results"][layout])  # writing changes nothing


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_exported_folder_generates_the_same_tokens(
    name: str, written: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It loads without a warning, with the configuration and the ids that it came with."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    folder = written["out"] / "tp2_pp2" / name
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)  # type: ignore[misc]
    assert not any(info.values()) and not caplog.records, (info, caplog.text)
    here = {"dtype": None, "_name_or_path": None}  # as it was loaded
    assert model.config.to_dict() | here == written["models"][name].config.to_dict() | here
    for number, prompt in enumerate(PROMPTS):
        given = torch.tensor([prompt.token])
        output = model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=GREEDY.max_new_tokens
        )
        expected = output[0, given.shape[1] :].tolist()
        for ranks in written["results"].values():
            assert all(rank[name]["greedy"][number] == expected for rank in ranks)


def test_a_value_head_gives_the_same_values_in_transformers(
    written: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The class pools the last token's value; it loads without a warning."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    folder = written["out"] / "tp2_pp2" / "value"
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)  # type: ignore[misc]
    assert not any(info.values()) and not caplog.records, (info, caplog.text)
    assert model.config.num_labels == 1
    outputs = next(rank["value"]["outputs"] for rank in written["results"]["tp2"])
    last = torch.tensor(LENGTHS).cumsum(0) - 1
    with torch.no_grad():
        pooled = torch.cat([model(token[None]).logits[0] for token in tokens()])
    torch.testing.assert_close(outputs[last, 0], pooled, rtol=1e-5, atol=1e-5)


def test_no_rank_holds_much_more_than_its_shard_and_a_tensor(written: dict[str, Any]) -> None:
    """Loading: the shard and one tensor. Saving: beside the weights, the parts of a tensor and the whole of it."""
    stored = [value.numel() for value in tensors(written["out"] / "in" / "wide").values()]
    largest, model = 4 * max(stored), 4 * sum(stored)
    assert 3 * 2 * largest / 4 < model / 2 and len(stored) > 10  # else the bounds would say little
    for layout in ("tp2", "pp2", "tp2_pp2"):
        for rank in written["results"][layout]:
            wide = rank["wide"]
            assert wide["held"] <= wide["loading"] <= wide["held"] + largest
            assert wide["saving"] <= 3 * largest / 2  # the files are fp16
    main, other = (rank["wide"] for rank in written["results"]["tp2"])
    assert main["saving"] >= largest / 2 > other["saving"]  # one rank writes
