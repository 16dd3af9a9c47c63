"""Tiny random versions of transformers' causal language models: their configurations, shrunk field by field."""

import inspect

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 97
FIELDS = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size",
    128: "max_position_embeddings n_positions max_seq_len",
    48: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dff d_inner ffn_hidden_size "
    "intermediate_size_mlp",
    32: "hidden_size n_embd d_model dim emb_dim word_embed_proj_dim embedding_size embed_dim mamba_d_ssm conv_dim "
    "lru_width",
    24: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
    "shared_intermediate_size",
    16: "sliding_window qk_head_dim index_n_heads",  # an index of few heads has ties between tokens
    8: "head_dim global_head_dim swa_head_dim v_head_dim swa_v_head_dim qk_nope_head_dim qk_rope_head_dim kv_lora_rank "
    "q_lora_rank d_kv window_size attention_chunk_size local_attention mamba_d_state state_size "
    "mamba_d_head mamba_head_dim mamba_chunk_size chunk_size linear_key_head_dim linear_value_head_dim index_head_dim "
    "hidden_size_per_layer_input",
    6: "index_topk",
    4: "num_attention_heads n_head num_heads n_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts mamba_n_heads "
    "mamba_num_heads time_step_rank mamba_dt_rank linear_num_value_heads laurel_rank",
    2: "num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers num_decoder_layers "
    "num_key_value_heads num_kv_heads num_experts_per_tok moe_k moe_topk n_mamba_heads linear_num_key_heads "
    "altup_num_inputs bos_token_id",
    1: "n_group topk_group first_k_dense_replace mamba_n_groups n_groups mamba_expand eos_token_id",
    0: "pad_token_id num_kv_shared_layers",
}
SMALL = {name: value for value, names in FIELDS.items() for name in names.split()}
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
OWN = {  # what the names do not tell
    "BambaConfig": {"attn_layer_indices": [1]},
    "CodeGenConfig": {"rotary_dim": 4},
    "DeepseekV2Config": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "Dots1Config": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "GPTJConfig": {"rotary_dim": 4},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "GraniteMoeHybridConfig": {"layer_types": ["mamba", "attention"]},
    "HunYuanDenseV1Config": {"head_dim": 8},
    "HunYuanMoEV1Config": {"head_dim": 8},
    "JambaConfig": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "Mamba2Config": {"expand": 1, "num_heads": 4, "head_dim": 8, "n_groups": 1},
    "Lfm2Config": {"layer_types": ["conv", "full_attention"]},
    "MinistralConfig": {"head_dim": 8},
    "NemotronConfig": {"num_key_value_heads": 2},
    "RecurrentGemmaConfig": {"num_hidden_layers": 3},
    "ZayaConfig": {"num_experts_per_tok": 1},
}


def architectures() -> list[tuple[str, str]]:
    """(configuration, model class), by name, of every causal language model of the installed transformers, once."""
    pairs = {}
    for kind, models in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        for model in models if isinstance(models, tuple | list) else (models,):
            pairs[CONFIG_MAPPING_NAMES[kind], model] = None
    return list(pairs)


def small_config(cls: type, **own):
    """A configuration of a model with some ten thousand weights, with a layer of each kind that the default has."""
    return cls(**_fields(cls) | own)


def small_model(config_class: type, model_class: type, **own):
    """A random model in evaluation mode, its weights large enough for log-probs that are far from uniform."""
    config = small_config(config_class, **own)
    if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        config.is_decoder = own.get("is_decoder", True)
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def _fields(cls: type) -> dict:
    default = cls()
    small = {name: value for name, value in SMALL.items() if _is_number(default, name) and _can_be_set(cls, name)}
    if "kv_lora_rank" in small:  # latent attention has as many keys as queries
        small |= {"num_key_value_heads": 4} if "num_key_value_heads" in small else {}
    kinds = getattr(default, "layer_types", None) if _can_be_set(cls, "layer_types") else None
    if kinds:
        kinds = list(dict.fromkeys(kinds))
        count = max(2, len(kinds))
        small |= {"layer_types": (kinds * 2)[:count]} | {name: count for name in LAYERS if name in small}
        if mixers := getattr(default, "mlp_layer_types", None):
            small["mlp_layer_types"] = (list(dict.fromkeys(mixers)) * count)[:count]
    for name in getattr(default, "sub_configs", {}):
        if hasattr(inner := getattr(default, name, None), "to_dict"):
            small[name] = _fields(type(inner))
    return small | OWN.get(cls.__name__, {})


def _is_number(default, name: str) -> bool:
    try:
        value = getattr(default, name)
    except Exception:  # missing, or one for each layer
        return False
    return isinstance(value, int | float) or name == "pad_token_id"


def _can_be_set(cls: type, name: str) -> bool:
    name = getattr(cls, "attribute_map", {}).get(name, name)
    field = inspect.getattr_static(cls, name, None)
    return not isinstance(field, property) or field.fset is not None
