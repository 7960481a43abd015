"""Gemma 2 and 3 (text): as LLaMA, with a norm after the MLP before its output joins the residual stream."""

from everedit.models.families._base import Family

FAMILIES = (
    Family(
        name="gemma",
        model_types=("gemma2", "gemma3_text"),
        blocks="model.layers",
        mlp_in=(("mlp.gate_proj", "mlp.up_proj"),),
        mlp_out="mlp.down_proj",
        attention_out="self_attn.o_proj",
        final_norm="model.norm",
        mlp_norm="post_feedforward_layernorm",
    ),
)
