"""OPT: a block holds its two MLP projections directly, without a module around them."""

from everedit.models.families._base import Family

FAMILIES = (
    Family(
        name="opt",
        model_types=("opt",),
        blocks="model.decoder.layers",
        mlp_in=(("fc1",),),
        mlp_out="fc2",
        attention_out="self_attn.out_proj",
        final_norm="model.decoder.final_layer_norm",
    ),
)
