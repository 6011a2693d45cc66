"""The model, its data and its training: a Llama of two layers made from a configuration, rows that count upwards."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

RANK, ALPHA, VOCABULARY = 4, 8, 64


def make_model() -> PeftModel:
    """The same weights at every site: the seed stands in for a base model that all have downloaded."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    )
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(base, lora)


def load_data(partition: int) -> torch.Tensor:
    """A site's own sequences (rows, 12): counting in steps that differ from site to site."""
    generator = torch.Generator().manual_seed(partition)
    starts = torch.randint(0, VOCABULARY, (16 + 8 * partition, 1), generator=generator)
    return (starts + (1 + partition) * torch.arange(12)) % VOCABULARY


def train(model: PeftModel, rows: torch.Tensor, steps: int, learning_rate: float) -> float:
    """Steps of AdamW on all rows; the last loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    model.train()
    for _ in range(steps):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())
