"""LLaMA and the many families that keep its shape: pre-norm blocks with a gated MLP and no biases of note."""

from everedit.models.families._base import Family

FAMILIES = (
    Family(
        name="llama",
        model_types=("llama", "mistral", "qwen2", "qwen3", "gemma", "olmo", "smollm3", "granite", "stablelm"),
        blocks="model.layers",
        mlp_in=(("mlp.gate_proj", "mlp.up_proj"),),
        mlp_out="mlp.down_proj",
        attention_out="self_attn.o_proj",
        final_norm="model.norm",
    ),
)
