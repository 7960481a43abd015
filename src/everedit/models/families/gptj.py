"""GPT-J: attention and MLP read the same normed input and add to the residual stream side by side."""

from everedit.models.families._base import Family

FAMILIES = (
    Family(
        name="gptj",
        model_types=("gptj",),
        blocks="transformer.h",
        mlp_in=(("mlp.fc_in",),),
        mlp_out="mlp.fc_out",
        attention_out="attn.out_proj",
        final_norm="transformer.ln_f",
    ),
)
