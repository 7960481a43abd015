"""GPT-Neo: GPT-2's names with plain linear layers, and local attention in every other block."""

from everedit.models.families._base import Family

FAMILIES = (
    Family(
        name="gpt_neo",
        model_types=("gpt_neo",),
        blocks="transformer.h",
        mlp_in=(("mlp.c_fc",),),
        mlp_out="mlp.c_proj",
        attention_out="attn.attention.out_proj",
        final_norm="transformer.ln_f",
    ),
)
