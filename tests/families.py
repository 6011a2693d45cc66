"""The model families that florana is held to, each as a tiny checkpoint without a head: the table of docs/models.md.

A checkpoint is what the family's real ones are: the language model, the masked one or the encoder alone, saved by
Transformers from a configuration class. Weights are drawn wide, so that a tensor left behind shows in every figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.conftest import WORDS

Task = Literal["sequence-classification", "causal-lm"]
CLASSES: Task = "sequence-classification"
LANGUAGE: Task = "causal-lm"

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
ENDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
PLAIN: Mapping[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    **ENDS,
}
GROUPED = {**PLAIN, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
SEQ2SEQ = {
    "vocab_size": 32,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 2,
    **ENDS,
}
T5 = {
    "vocab_size": 32,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 1,
    **ENDS,
}
GPT2 = {
    "vocab_size": 32,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
MLA = {
    **PLAIN,
    "num_key_value_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True)
class Family:
    """One family.

    Args:
        config: the name of its configuration class. settings: of that class, to make it tiny.
        kind: as the table has it. tasks: what it is trained for here.
        saved: the class whose checkpoint is taken. targets: `all-linear`, or what a recipe must name.
        tokenizer: `pairs` gives token type ids, `ends` puts a text between <s> and </s>, `letters` has no padding
            token and no special ones, `last` ends in its class token and pads on the left.
    """

    config: str
    settings: Mapping[str, Any]
    kind: str
    tasks: Sequence[Task]
    saved: str = "AutoModel"
    targets: str | list[str] = "all-linear"
    tokenizer: Literal["pairs", "ends", "letters", "last"] = "ends"
    nested: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """The checkpoint and its tokenizer; the same bytes every time."""
        config = getattr(transformers, self.config)(**self.settings, **{n: dict(s) for n, s in self.nested.items()})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(transformers, self.saved).from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.normal_(0.0, 0.3)
        model.save_pretrained(folder)
        _tokenizer(self.tokenizer).save_pretrained(folder)
        return folder


def _tokenizer(kind: str) -> Any:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<s>", 0), ("</s>", 2)]
    if kind in ("ends", "pairs"):
        pair = "<s> $A </s> $B:1 </s>:1" if kind == "pairs" else "<s> $A </s> </s> $B </s>"
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", pair=pair, special_tokens=ends)
    elif kind == "last":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s> <s>:2", pair="$A </s> $B:1 </s>:1 <s>:2", special_tokens=ends
        )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if kind != "letters":
        names |= {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    inputs = ["input_ids", "attention_mask"] + ["token_type_ids"] * (kind in ("pairs", "last"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=inputs,
        padding_side="left" if kind == "last" else "right",
        **names,
    )


def _encoder(config: str, saved: str = "AutoModelForMaskedLM", tokenizer: Any = "pairs", **settings: Any) -> Family:
    return Family(f"{config}Config", {**PLAIN, **settings}, "encoder", [CLASSES], saved, tokenizer=tokenizer)


def _decoder(
    config: str, settings: Mapping[str, Any] = GROUPED, tasks: Any = (CLASSES, LANGUAGE), **more: Any
) -> Family:
    own = {key: more.pop(key) for key in ("targets", "tokenizer", "nested", "kind") if key in more}
    return Family(
        f"{config}Config",
        {**settings, **more},
        **{"kind": "decoder", "tasks": tasks, "saved": "AutoModelForCausalLM", **own},
    )


FAMILIES: Mapping[str, Family] = {
    # encoders: the pooler, the head or both are in no checkpoint of these
    "BERT": _encoder("Bert"),
    "RoBERTa": _encoder("Roberta", tokenizer="ends", type_vocab_size=1),
    "XLM-RoBERTa": _encoder("XLMRoberta", tokenizer="ends", type_vocab_size=1),
    "DistilBERT": Family(
        "DistilBertConfig",
        {
            "vocab_size": 32,
            "dim": 16,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 24,
            "max_position_embeddings": 32,
            **ENDS,
        },
        "encoder",
        [CLASSES],
        "AutoModelForMaskedLM",
    ),
    "ALBERT": _encoder("Albert", embedding_size=8),
    "ELECTRA": _encoder("Electra", "AutoModel", embedding_size=8),
    "DeBERTa": _encoder("Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"], pooler_hidden_size=16),
    "DeBERTa-v2": _encoder("DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"], pooler_hidden_size=16),
    "MPNet": _encoder("MPNet", tokenizer="ends"),
    "XLNet": Family(
        "XLNetConfig",
        {"vocab_size": 32, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, **ENDS},
        "encoder",
        [CLASSES],
        "AutoModel",
        tokenizer="last",
    ),
    "Funnel": Family(
        "FunnelConfig",
        {
            "vocab_size": 32,
            "d_model": 16,
            "n_head": 2,
            "d_head": 8,
            "d_inner": 24,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
            **ENDS,
        },
        "encoder",
        [CLASSES],
        "AutoModelForMaskedLM",
        tokenizer="pairs",
    ),
    "ModernBERT": _encoder("ModernBert", "AutoModel", "ends", cls_token_id=0, sep_token_id=2),
    "NomicBERT": _encoder("NomicBert", tokenizer="ends"),
    "EuroBERT": _encoder("EuroBert", tokenizer="ends", num_key_value_heads=2),
    "BigBird": _encoder("BigBird", block_size=4, num_random_blocks=1),
    "Longformer": _encoder("Longformer", tokenizer="ends", attention_window=[4, 4]),
    "ConvBERT": _encoder("ConvBert", embedding_size=16, head_ratio=1, conv_kernel_size=3),
    "MobileBERT": _encoder(
        "MobileBert", embedding_size=8, true_hidden_size=16, intra_bottleneck_size=16, num_feedforward_networks=1
    ),
    "SqueezeBERT": _encoder(
        "SqueezeBert",
        embedding_size=16,
        **{f"{part}_groups": 1 for part in ("q", "k", "v", "post_attention", "intermediate", "output")},
    ),
    "FNet": _encoder("FNet"),
    # decoders
    "GPT-2": _decoder("GPT2", GPT2, tokenizer="letters"),
    "GPT-Neo": _decoder(
        "GPTNeo", PLAIN, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=8
    ),
    "GPT-NeoX": _decoder("GPTNeoX", PLAIN, tokenizer="letters"),
    "GPT-J": _decoder("GPTJ", GPT2, rotary_dim=4, tokenizer="letters"),
    "OPT": _decoder("OPT", {**PLAIN, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "BLOOM": _decoder("Bloom", {"vocab_size": 32, "hidden_size": 16, "n_layer": 2, "n_head": 2, **ENDS}),
    "Falcon": _decoder("Falcon", {**PLAIN, "ffn_hidden_size": 24}, tokenizer="letters"),
    "Llama": _decoder("Llama", tokenizer="letters"),
    "Mistral": _decoder("Mistral", sliding_window=8),
    "Qwen2": _decoder("Qwen2", tokenizer="letters"),
    "Qwen3": _decoder("Qwen3"),
    "Gemma": _decoder("Gemma"),
    "Gemma 2": _decoder("Gemma2", sliding_window=8, query_pre_attn_scalar=4),
    "Gemma 3 (text)": _decoder("Gemma3Text", sliding_window=8, query_pre_attn_scalar=4),
    "Phi": _decoder("Phi", PLAIN),
    "Phi-3": _decoder("Phi3", {**PLAIN, "num_key_value_heads": 2}),
    "StableLM": _decoder("StableLm", {**PLAIN, "num_key_value_heads": 2}),
    "Cohere": _decoder("Cohere", tasks=[LANGUAGE]),
    "OLMo 2": _decoder("Olmo2"),
    "StarCoder2": _decoder("Starcoder2", {**PLAIN, "num_key_value_heads": 2}),
    "Mamba": _decoder(
        "Mamba",
        {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 2, **ENDS},
        [LANGUAGE],
        targets=["in_proj", "x_proj", "dt_proj"],
    ),
    "RWKV": _decoder(
        "Rwkv", {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "context_length": 32, **ENDS}, [LANGUAGE]
    ),
    # encoder-decoders: classified at the end token
    "BART": Family("BartConfig", SEQ2SEQ, "encoder-decoder", [CLASSES], "AutoModelForSeq2SeqLM"),
    "mBART": Family("MBartConfig", SEQ2SEQ, "encoder-decoder", [CLASSES], "AutoModelForSeq2SeqLM"),
    "T5": Family("T5Config", T5, "encoder-decoder", [CLASSES], "AutoModelForSeq2SeqLM"),
    "mT5": Family("MT5Config", T5, "encoder-decoder", [CLASSES], "AutoModelForSeq2SeqLM"),
    # mixtures of experts: `all-linear` is refused, the attention is named
    "Mixtral": _decoder("Mixtral", EXPERTS, num_local_experts=4, kind="mixture", targets=ATTENTION),
    "Qwen2-MoE": _decoder(
        "Qwen2Moe", EXPERTS, num_experts=4, shared_expert_intermediate_size=8, kind="mixture", targets=ATTENTION
    ),
    "Qwen3-MoE": _decoder("Qwen3Moe", EXPERTS, num_experts=4, kind="mixture", targets=ATTENTION),
    "OLMoE": _decoder("Olmoe", EXPERTS, [LANGUAGE], num_experts=4, kind="mixture", targets=ATTENTION),
    "DeepSeek-V3": _decoder(
        "DeepseekV3", MLA, kind="mixture", targets=["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    ),
    "GPT-OSS": _decoder("GptOss", EXPERTS, num_local_experts=4, sliding_window=8, kind="mixture", targets=ATTENTION),
    "Granite-MoE": _decoder("GraniteMoe", EXPERTS, [LANGUAGE], num_local_experts=4, kind="mixture", targets=ATTENTION),
    "Llama 4 (text)": _decoder(
        "Llama4Text",
        EXPERTS,
        [LANGUAGE],
        num_local_experts=4,
        intermediate_size_mlp=24,
        interleave_moe_layer_step=1,
        kind="mixture",
        targets=ATTENTION,
    ),
    # models of text and images, by their text
    "Gemma 3": Family(
        "Gemma3Config",
        {"mm_tokens_per_image": 4, "image_token_index": 31, "boi_token_index": 30, "eoi_token_index": 29, **ENDS},
        "multimodal",
        [CLASSES, LANGUAGE],
        "AutoModelForCausalLM",
        r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        nested={
            "text_config": {**GROUPED, "sliding_window": 8, "query_pre_attn_scalar": 4},
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
            },
        },
    ),
}
"""By the name of the table. Every task of every family is run, exported and loaded by PEFT alone in test_models.py."""
