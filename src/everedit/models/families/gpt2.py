"""GPT-2: its projections are Conv1D modules, which store the transpose of a linear layer's weight."""

from everedit.models.families._base import Family

FAMILIES = (
    Family(
        name="gpt2",
        model_types=("gpt2",),
        blocks="transformer.h",
        mlp_in=(("mlp.c_fc",),),
        mlp_out="mlp.c_proj",
        attention_out="attn.c_proj",
        final_norm="transformer.ln_f",
    ),
)
