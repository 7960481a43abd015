"""T5 (encoder-decoder): the decoder's blocks are the ones named; the encoder's stand beside them."""

from everedit.models.families._base import Family

FAMILIES = (
    Family(
        name="t5",
        model_types=("t5",),
        blocks="decoder.block",
        mlp_in=(
            ("layer.2.DenseReluDense.wi_0", "layer.2.DenseReluDense.wi_1"),
            ("layer.2.DenseReluDense.wi",),
        ),
        mlp_out="layer.2.DenseReluDense.wo",
        attention_out="layer.0.SelfAttention.o",
        final_norm="decoder.final_layer_norm",
        encoder_blocks="encoder.block",
        encoder_mlp_in=(
            ("layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wi_1"),
            ("layer.1.DenseReluDense.wi",),
        ),
        encoder_mlp_out="layer.1.DenseReluDense.wo",
    ),
)
