"""Tiny random models of every family that spp is tested with, and how to make them.

A name is transformers' model type, with a variant of it after a hyphen.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from spp.models.architecture import auto_class

_TOKENS = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **_TOKENS,
}
_GQA = _DECODER | {"num_key_value_heads": 2}
_GQA8 = _GQA | {"head_dim": 8}
_SANDWICH = _GQA8 | {"sliding_window": 16, "query_pre_attn_scalar": 8}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **_TOKENS}
_BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4, **_TOKENS}
_FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False, **_TOKENS}
_MOE = _GQA | {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN_MOE = _GQA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
_DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
_DEEPSEEK = _DECODER | {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_IMAGE_TOKENS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
_CLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
_QWEN3_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GQA,
    "mistral": _GQA,
    "qwen2": _GQA,
    "qwen3": _GQA8,
    "gemma": _GQA8,
    "phi": _DECODER,
    "gpt_neox": _DECODER,
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
        **_TOKENS,
    },
    "gpt2": _GPT2,
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH | {"sliding_window_pattern": 2},
    "phi3": _GQA,
    "falcon": _FALCON | {"multi_query": True, "new_decoder_architecture": False},
    "falcon-new": _FALCON | {"num_kv_heads": 2, "new_decoder_architecture": True},
    "falcon-alibi": _FALCON | {"alibi": True, "multi_query": False, "new_decoder_architecture": False},
    "bloom": _BLOOM,
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2, **_TOKENS},
    "gptj": _GPT2 | {"rotary_dim": 4},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 16,
        **_TOKENS,
    },
    "gpt_bigcode": _GPT2,
    "codegen": _GPT2 | {"rotary_dim": 4, "n_ctx": 64},
    "starcoder2": _GQA,
    "stablelm": _GQA,
    "cohere": _GQA,
    "cohere2": _GQA | {"sliding_window": 16},
    "arcee": _GQA,
    "apertus": _GQA,
    "persimmon": _DECODER,
    "xglm": {
        "d_model": 32,
        "ffn_dim": 48,
        "num_layers": 2,
        "attention_heads": 4,
        "max_position_embeddings": 64,
        **_TOKENS,
    },
    "olmo": _GQA,
    "olmo2": _GQA,
    "olmo3": _GQA | {"sliding_window": 16},
    "granite": _GQA,
    "smollm3": _GQA,
    "glm": _GQA8,
    "glm4": _GQA8,
    "nemotron": _GQA,
    "exaone4": _GQA | {"sliding_window": 16},
    "ernie4_5": _GQA8,
    "seed_oss": _GQA8,
    "helium": _GQA8,
    "hunyuan_v1_dense": _GQA8,
    "gemma4_text": _GQA8
    | {
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "global_head_dim": 8,
        "num_global_key_value_heads": 2,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 96,
    },
    "gemma4_text-shared": _GQA8
    | {
        "num_hidden_layers": 4,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "global_head_dim": 8,
        "num_global_key_value_heads": 2,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 96,
        "use_double_wide_mlp": True,
    },
    "qwen3_5_text": _GQA8 | _DELTA_NET,
    "lfm2": _GQA | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "mamba2": {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "state_size": 8, **_TOKENS}
    | {"n_groups": 2},
    "bamba": _GQA | _MAMBA2 | {"attn_layer_indices": [1]},
    "falcon_h1": _GQA8 | _MAMBA2 | {"mamba_d_ssm": 64},
    "mixtral": _MOE,
    "minimax": _MOE | {"head_dim": 8, "block_size": 8},
    "qwen2_moe": _QWEN_MOE | {"shared_expert_intermediate_size": 40},
    "qwen3_moe": _QWEN_MOE | {"head_dim": 8},
    "qwen3_next": _QWEN_MOE | _DELTA_NET | {"head_dim": 8, "shared_expert_intermediate_size": 40},
    "olmoe": _GQA | {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": _DEEPSEEK | {"q_lora_rank": None, "topk_method": "group_limited_greedy"},
    "deepseek_v3": _DEEPSEEK | {"q_lora_rank": 16},
    "glm4_moe": _GQA8
    | {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "dots1": _GQA8
    | {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
    },
    "ernie4_5_moe": _GQA
    | {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
    },
    "hunyuan_v1_moe": _GQA8 | {"num_experts": 4, "moe_topk": 2},
    "phimoe": _MOE,
    "granitemoe": _MOE,
    "granitemoeshared": _MOE | {"shared_intermediate_size": 40},
    "gpt_oss": _MOE | {"head_dim": 8, "sliding_window": 16},
    "llama4_text": _GQA8
    | {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 40, "attention_chunk_size": 32},
    "nemotron_h": _GQA8
    | {
        "layers_block_type": ["mamba", "attention", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "mamba_n_groups": 1,
        "n_groups": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 40,
        "n_group": 1,
        "topk_group": 1,
    },
    "kimi_linear": _DECODER
    | {
        "num_key_value_heads": 4,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "linear_attn_config": {
            "kda_layers": [1],
            "full_attn_layers": [2],
            "num_heads": 4,
            "head_dim": 8,
            "short_conv_kernel_size": 4,
        },
    },
    "hy_v3": _GQA8
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "expert_hidden_dim": 24,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "laguna": _GQA8
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "sliding_window": 16,
    },
    "llava_next": {
        "text_config": {"model_type": "llama", **_GQA},
        "vision_config": {"model_type": "clip_vision_model", **_CLIP},
        "image_token_index": 90,
        "image_grid_pinpoints": [[8, 8]],
    },
    "smolvlm": {
        "text_config": {"model_type": "llama", **_GQA},
        "vision_config": _CLIP,
        "image_token_id": 90,
        "scale_factor": 2,
    },
    "internvl": {
        "text_config": {"model_type": "qwen2", **_GQA},
        "vision_config": {"model_type": "internvl_vision", **_CLIP, "image_size": [8, 8], "patch_size": [4, 4]},
        "image_token_id": 90,
    },
    "llava": {
        "text_config": {"model_type": "llama", **_GQA},
        "vision_config": {"model_type": "clip_vision_model", **_CLIP},
        "image_token_id": 90,
    },
    "llava_onevision": {
        "text_config": {"model_type": "qwen2", **_GQA},
        "vision_config": {"model_type": "clip_vision_model", **_CLIP},
        "image_token_index": 90,
        "video_token_index": 91,
    },
    "gemma3": {
        "text_config": _SANDWICH | {"sliding_window_pattern": 2},
        "vision_config": {"model_type": "siglip_vision_model", **_CLIP},
        "image_token_index": 90,
        "boi_token_index": 91,
        "eoi_token_index": 92,
        "mm_tokens_per_image": 4,
    },
    "qwen2_vl": {
        "text_config": _GQA | _MROPE,
        "vision_config": _QWEN_VISION | {"embed_dim": 16, "hidden_size": 32},
        **_IMAGE_TOKENS,
    },
    "qwen2_5_vl": {
        "text_config": _GQA | _MROPE,
        "vision_config": _QWEN_VISION
        | {
            "hidden_size": 16,
            "out_hidden_size": 32,
            "intermediate_size": 24,
            "fullatt_block_indexes": [1],
            "window_size": 16,
        },
        **_IMAGE_TOKENS,
    },
    "qwen3_vl": {"text_config": _GQA8 | _MROPE, "vision_config": _QWEN3_VISION, **_IMAGE_TOKENS},
    "qwen3_vl_moe": {
        "text_config": _QWEN_MOE | {"head_dim": 8} | _MROPE,
        "vision_config": _QWEN3_VISION,
        **_IMAGE_TOKENS,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **_GQA8},
        "vision_config": {"model_type": "pixtral", **_CLIP},
        "image_token_index": 90,
    },
    "paligemma": {
        "text_config": {"model_type": "gemma", **_GQA8},
        "vision_config": {"model_type": "siglip_vision_model", **_CLIP},
        "image_token_index": 90,
        "projection_dim": 32,
        "hidden_size": 32,
    },
}


OUTSIDE: dict[str, dict[str, Any]] = {
    "mamba": {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4, **_TOKENS},
    "jamba": _GQA
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "gemma3n_text": _GQA8
    | {
        "num_hidden_layers": 4,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 96,
        "num_kv_shared_layers": 2,
        "laurel_rank": 4,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 16,
    },
    "deepseek_v4": _DECODER
    | {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "qk_rope_head_dim": 4,
        "q_lora_rank": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_topk": 8,
    },
    "openai-gpt": _GPT2,
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, **_TOKENS},
    "zamba2": _GQA
    | {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
        "num_mem_blocks": 1,
        "adapter_rank": 4,
    },
    "idefics3": {
        "text_config": {"model_type": "llama", **_GQA},
        "vision_config": _CLIP,
        "image_token_id": 90,
        "scale_factor": 2,
    },
}
"""Models with a layer, a block or a container that is not what it seems."""

WHOLE_MODELS: dict[str, dict[str, Any]] = {
    "qwen3_5": {"text_config": _GQA8 | _DELTA_NET | _MROPE, "vision_config": _QWEN3_VISION, **_IMAGE_TOKENS},
    "llama4": {
        "text_config": FAMILIES["llama4_text"],
        "vision_config": {
            **_CLIP,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
        "image_token_index": 90,
        "boi_token_index": 91,
        "eoi_token_index": 92,
    },
    "mllama": {
        "text_config": _GQA | {"num_hidden_layers": 3, "cross_attention_layers": [1]},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "vision_output_dim": 32,
            "intermediate_layers_indices": [0],
        },
    },
    "emu3": {
        "text_config": _GQA,
        "vq_config": {
            "codebook_size": 16,
            "embed_dim": 4,
            "latent_channels": 4,
            "base_channels": 32,
            "channel_multiplier": [1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "hidden_size": 16,
            "num_attention_heads": 1,
        },
        "vocabulary_map": {"<image>": 90},
    },
    "minimax_m3_vl": {
        "text_config": _MOE
        | {"head_dim": 8, "dense_intermediate_size": 40, "moe_intermediate_size": 24}
        | {"rotary_dim": 8},
        "vision_config": _CLIP,
        "image_token_id": 90,
    },
}
"""Models that take images, as published: with all their weights, of which spp loads the language model alone from some.

The files of the last one hold the gates and ups of an MLP apart, which the model has in one matrix.
"""


def tiny_model_of(name: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A tiny random model of a family in `FAMILIES` or `OUTSIDE`, in eval mode; the same weights for the same call."""
    torch.manual_seed(0)
    family, settings = (name, OUTSIDE[name]) if name in OUTSIDE else (name.partition("-")[0], FAMILIES[name])
    config = AutoConfig.for_model(family, **(settings | changes))
    kind = auto_class(config)
    assert kind is not None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script`", DeprecationWarning)  # while GPT-BigCode is imported
        return kind.from_config(config, dtype=dtype).eval()


def whole_model_of(name: str, **changes: Any) -> PreTrainedModel:
    """A tiny random model in `WHOLE_MODELS`, of the class that takes images; changes are of its language model."""
    torch.manual_seed(0)
    settings = WHOLE_MODELS[name]
    config = AutoConfig.for_model(name, **settings | {"text_config": settings["text_config"] | changes})
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
