"""Tiny random models of every supported family of transformers, small enough for each test."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "n_shared_experts": 1, "head_dim": 8,
}  # fmt: skip
LINEAR = {
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_conv_kernel_dim": 2,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
GROUPS = {"n_group": 4, "topk_group": 2}


class Tiny(NamedTuple):
    """How to make a tiny model of a family.

    Attributes:
        prefix: of the classes in transformers.
        settings: of the config, besides the common ones.
        k: the setting that holds the experts per token.
        example: a checkpoint of the family.
        toggled: whether experts can be computed one by one.
    """

    prefix: str
    settings: dict[str, Any]
    k: str = "num_experts_per_tok"
    example: str = ""
    toggled: bool = True


FAMILIES = {
    "olmoe": Tiny("Olmoe", {}, example="allenai/OLMoE-1B-7B-0924"),
    "flex_olmo": Tiny("FlexOlmo", {}, example="allenai/FlexOlmo-7x7B-1T"),
    "mixtral": Tiny("Mixtral", {}, example="mistralai/Mixtral-8x7B-v0.1"),
    "qwen2_moe": Tiny("Qwen2Moe", {}, example="Qwen/Qwen1.5-MoE-A2.7B"),
    "qwen3_moe": Tiny("Qwen3Moe", {"norm_topk_prob": True}, example="Qwen/Qwen3-30B-A3B"),
    "qwen3_next": Tiny("Qwen3Next", LINEAR, example="Qwen/Qwen3-Next-80B-A3B-Instruct"),
    "qwen3_5_moe_text": Tiny("Qwen3_5MoeText", LINEAR, example="Qwen/Qwen3.5-35B-A3B"),
    "granitemoe": Tiny(
        "GraniteMoe",
        {"logits_scaling": 8.0, "attention_multiplier": 0.3, "embedding_multiplier": 3.0},
        example="ibm-granite/granite-3.1-3b-a800m-base",
    ),
    "jamba": Tiny(
        "Jamba",
        {"num_hidden_layers": 4, "attn_layer_offset": 1, "attn_layer_period": 2,
         "mamba_d_state": 4, "use_mamba_kernels": False},
        example="ai21labs/Jamba-v0.1",
    ),
    "minimax": Tiny(
        "MiniMax",
        {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        example="MiniMaxAI/MiniMax-Text-01-hf",
    ),
    "deepseek_v2": Tiny(
        "DeepseekV2",
        {**LATENT, **GROUPS, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0,
         "first_k_dense_replace": 1},
        example="deepseek-ai/DeepSeek-V2-Lite",
    ),
    "deepseek_v3": Tiny(
        "DeepseekV3", {**LATENT, **GROUPS, "first_k_dense_replace": 1},
        example="deepseek-ai/DeepSeek-V3",
    ),
    "glm4_moe": Tiny(
        "Glm4Moe",
        {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5},
        example="zai-org/GLM-4.5-Air",
    ),
    "dots1": Tiny(
        "Dots1",
        {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
         "norm_topk_prob": True, "layer_types": ["full_attention"] * 3},
        example="rednote-hilab/dots.llm1.base",
    ),
    "gpt_oss": Tiny("GptOss", {"sliding_window": 16}, example="openai/gpt-oss-20b"),
    "lfm2_moe": Tiny(
        "Lfm2Moe",
        {"num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
        example="LiquidAI/LFM2-8B-A1B",
    ),
    "minimax_m2": Tiny("MiniMaxM2", {}, example="MiniMaxAI/MiniMax-M2"),
    "ernie4_5_moe": Tiny(
        "Ernie4_5_Moe",
        {"moe_num_experts": 8, "moe_layer_start_index": 1, "moe_layer_end_index": 2,
         "moe_num_shared_experts": 1},
        k="moe_k",
        example="baidu/ERNIE-4.5-21B-A3B-PT",
    ),
    "hunyuan_v1_moe": Tiny(
        "HunYuanMoEV1", {}, k="moe_topk", example="tencent/Hunyuan-A13B-Instruct"
    ),
    "afmoe": Tiny(
        "Afmoe", {"num_dense_layers": 1, "num_shared_experts": 1}, example="arcee-ai/Trinity-Mini"
    ),
    "nemotron_h": Tiny(
        "NemotronH",
        {"layers_block_type": ["moe", "attention", "moe"], "n_group": 1, "topk_group": 1,
         "n_shared_experts": 1, "moe_shared_expert_intermediate_size": 16},
        example="nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    ),
    "gemma4_text": Tiny(
        "Gemma4Text",
        {"enable_moe_block": True, "vocab_size_per_layer_input": 64,
         "hidden_size_per_layer_input": 8, "layer_types": ["full_attention"] * 3},
        k="top_k_experts",
        example="google/gemma-4-26B-A4B",
        toggled=False,
    ),
}  # fmt: skip
"""By model type of transformers."""
TOGGLED = [name for name, tiny in FAMILIES.items() if tiny.toggled]
"""Those whose experts can be toggled."""

REFUSED = {
    "deepseek_v4": ("DeepseekV4", LATENT, "it takes input_ids beside hidden states"),
    "dots1, weights not renormalised": (
        "Dots1",
        {**FAMILIES["dots1"].settings, "norm_topk_prob": False, "num_experts_per_tok": 2},
        "its weights are sigmoid scores that are not renormalised",
    ),
    "inkling_text": ("InklingText", {}, "it returns 4 values"),
    "jetmoe": ("JetMoe", {}, "no router stands beside its experts"),
    "llama4_text": ("Llama4Text", {}, "it returns 2 values"),
    "phimoe": ("Phimoe", {}, "its weights are not softmax or sigmoid scores of the logits"),
}
"""By what it is: prefix of the classes, settings, and a part of the reason."""

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "num_local_experts": 8,
    "n_routed_experts": 8, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def build(prefix, settings):
    """Return the model of a config with random weights."""
    import transformers

    config = getattr(transformers, f"{prefix}Config")(**SIZES | settings)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


def make(name, k=2, **settings):
    """Return a tiny random model, with biases of routers that make a difference."""
    tiny = FAMILIES[name]
    model = build(tiny.prefix, {tiny.k: k, **tiny.settings, **settings})
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "per_expert_scale" in path:
            tensor.data.uniform_(0.5, 2)
        elif path.endswith("router.scale"):
            tensor.data.fill_(6)
        elif "bias" in path and ("router" in path or "gate" in path or "expert" in path):
            tensor.data.normal_(0, 0.2)
        elif tensor.ndim == 2 and not tensor.any():  # a router that treats all experts alike
            tensor.data.normal_(0, 0.3)
    return model.eval().requires_grad_(False)
