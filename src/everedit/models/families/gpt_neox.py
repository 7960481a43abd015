"""GPT-NeoX and Pythia: parallel residual, fused attention input."""

from everedit.models.families._base import Family

FAMILIES = (
    Family(
        name="gpt_neox",
        model_types=("gpt_neox",),
        blocks="gpt_neox.layers",
        mlp_in=(("mlp.dense_h_to_4h",),),
        mlp_out="mlp.dense_4h_to_h",
        attention_out="attention.dense",
        final_norm="gpt_neox.final_layer_norm",
    ),
)
