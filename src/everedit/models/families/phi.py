"""Phi-3 (gate and up projection in one matrix) and Phi-1/2 (parallel attention and plain MLP)."""

from everedit.models.families._base import Family

FAMILIES = (
    Family(
        name="phi3",
        model_types=("phi3",),
        blocks="model.layers",
        mlp_in=(("mlp.gate_up_proj",),),
        mlp_out="mlp.down_proj",
        attention_out="self_attn.o_proj",
        final_norm="model.norm",
    ),
    Family(
        name="phi",
        model_types=("phi",),
        blocks="model.layers",
        mlp_in=(("mlp.fc1",),),
        mlp_out="mlp.fc2",
        attention_out="self_attn.dense",
        final_norm="model.final_layernorm",
    ),
)
