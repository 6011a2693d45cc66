"""PEFT adapters made by PEFT on small models of four families, and the oracle: what they add up to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

SMALL = {"vocab_size": 30}
MODELS: dict[str, Any] = {
    "bert": lambda: BertForSequenceClassification(
        BertConfig(**SMALL, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**SMALL, n_embd=16, n_layer=2, n_head=2, n_positions=32, tie_word_embeddings=False)
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SMALL,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=24,
            tie_word_embeddings=False,
        )
    ),
}
MODELS["tied"] = lambda: LlamaForCausalLM(
    LlamaConfig(
        **SMALL,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        tie_word_embeddings=True,
    )
)
NAMES = {  # a square and a non-square linear module, the embedding, the head
    "bert": ("query", "intermediate.dense", "word_embeddings", "classifier"),
    "gpt2": ("c_attn", "c_fc", "wte", "lm_head"),
    "llama": ("q_proj", "down_proj", "embed_tokens", "lm_head"),
    "tied": ("q_proj", "down_proj", "embed_tokens", "lm_head"),
}
PLAIN = {"r": 3, "lora_alpha": 6}


def base(kind: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[kind]().eval().double()


def filled(kind: str, value: Any) -> Any:
    """`$0` ... `$3` replaced by the model's own names."""
    if isinstance(value, str):
        for index, name in enumerate(NAMES[kind]):
            value = value.replace(f"${index}", name)
        return value
    if isinstance(value, dict):
        return {filled(kind, key): item for key, item in value.items()}
    return [filled(kind, item) for item in value] if isinstance(value, list) else value


def save_adapter(kind: str, settings: dict[str, Any], seed: int, folder: Path) -> Any:
    """A PEFT adapter with random factors, saved by PEFT; returns the PEFT model."""
    settings = dict(settings)
    stored = settings.pop("stored", torch.float32)
    computed = settings.pop("computed", torch.float64)
    targets = settings.pop("targets", [0, 1])
    if isinstance(targets, list):
        targets = [NAMES[kind][i] for i in targets]
    config = LoraConfig(
        target_modules=targets,
        fan_in_fan_out=kind == "gpt2",
        **{key: filled(kind, value) for key, value in settings.items()},
    )
    model = get_peft_model(base(kind).to(computed), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                value = 0.3 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(value.to(stored))  # in place: tied factors stay tied
    model.save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    save_file({key: tensor.to(stored) for key, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(input_ids=torch.arange(1, 13).reshape(2, 6)).logits
    return output


def summed(kind: str, models: Sequence[Any], weights: Sequence[float]) -> Any:
    """The base model plus the weighted sum of what PEFT's own layers add to each module: the oracle."""
    result = base(kind)
    additions: dict[str, list[tuple[float, Tensor, Tensor | None]]] = {}
    for model, weight in zip(models, weights, strict=True):
        for name, module in model.named_modules():
            scaling = getattr(module, "scaling", None)
            if not isinstance(scaling, dict) or "default" not in scaling:
                continue
            table = module.lora_A if "default" in module.lora_A else None
            if table is not None:
                A, B = table["default"].weight, module.lora_B["default"].weight
                bias = module.lora_B["default"].bias
            else:
                A, B, bias = module.lora_embedding_A["default"], module.lora_embedding_B["default"], None
            delta = scaling["default"] * B.detach().double() @ A.detach().double()
            own_bias = None if bias is None else scaling["default"] * bias.detach().double()
            additions.setdefault(name.removeprefix("base_model.model."), []).append((weight, delta, own_bias))
    for name, terms in additions.items():
        whole = sum(weight * delta for weight, delta, _ in terms)
        bias = sum((weight * b for weight, _, b in terms if b is not None), torch.zeros(()).double())
        module = result.get_submodule(name)

        def hook(m: Any, args: Any, out: Tensor, whole: Any = whole, bias: Tensor = bias) -> Tensor:
            if isinstance(m, torch.nn.Embedding):
                added: Tensor = out + whole.T[args[0]]
                return added
            result: Tensor = out + args[0] @ whole.T + bias
            return result

        module.register_forward_hook(hook)
    head = NAMES[kind][3]
    saved = [m.base_model.model.get_submodule(head) for m in models]
    if hasattr(saved[0], "modules_to_save"):
        with torch.no_grad():
            for parameter_name, parameter in result.get_submodule(head).named_parameters():
                values = [dict(s.modules_to_save["default"].named_parameters())[parameter_name].double() for s in saved]
                parameter.copy_(sum(w * v for w, v in zip(weights, values, strict=True)))
    return result
