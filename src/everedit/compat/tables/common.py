"""Keys that mean the same in the files of many algorithms."""

from __future__ import annotations

from everedit.compat.readers import choice, count, half, number, pairs, source, text
from everedit.compat.rules import Ignored, Mapped, Table

__all__ = ["COMMON", "CONTEXTS", "LOGGING", "MODULES", "MOMENTS", "VALUES"]

_GENERATED = "free-generation/exact-match@1"
_IMAGES = Ignored("language models are edited, and no images")

COMMON: Table = {
    "alg_name": Mapped("algorithm", text),
    "alg": Mapped("algorithm", text),
    "model_name": Mapped("model", source),
    "everedit": Mapped((), lambda value: None),
    "batch_size": Mapped("batch", count),
    "seed": Mapped(("seed", "train.seed"), count),
    "fp16": Mapped("dtype", half("float16")),
    "half": Mapped("dtype", half("bfloat16")),
    "dtype": Mapped("dtype", lambda value: text(value).removeprefix("torch.")),
    "results_dir": Mapped("results", text),
    "evaluation_type": Mapped(
        "protocol", choice({None: None, "traditional": None, "LLM-judge": _GENERATED, "generate-text": _GENERATED})
    ),
    "api_key": Ignored("no judge is asked: generated texts are compared with the target by exact match"),
    "device": Ignored("the best device at hand is used"),
    "model_parallel": Ignored("give a model that is spread already: model_name=(model, tokenizer)"),
    "max_length": Ignored("no text is cut: one that does not fit the model's context is an error"),
    "max_output_length": Ignored("no text is cut: one that does not fit the model's context is an error"),
    "model_class": Ignored("the model's own config says what it is"),
    "class_name": Ignored("the model's own config says what it is"),
    "tokenizer_class": Ignored("the tokenizer stands beside the model"),
    "tokenizer_name": Ignored("the tokenizer stands beside the model"),
    "use_chat_template": Ignored("prompts are taken as they are: put the template into them"),
    "sequential_edit": Ignored("the argument sequential_edit of edit() decides"),
    "no_grad_layers": Ignored("gradients are taken where the method needs them", only=(None,)),
    "dropout": Ignored("the model runs without dropout", only=(0,)),
    "silent": Ignored("nothing is printed"),
    "name": _IMAGES,
    "qformer_checkpoint": _IMAGES,
    "qformer_name_or_path": _IMAGES,
    "freeze_qformer": _IMAGES,
    "state_dict_file": _IMAGES,
    "pretrained_ckpt": _IMAGES,
    "coco_image": _IMAGES,
    "rephrase_image": _IMAGES,
    "exact_match": _IMAGES,
    "task_name": _IMAGES,
    "file_type": _IMAGES,
}
"""Keys of any file; ``everedit`` holds settings of our own, which win over what the rest of the file says."""

_FOUND = Ignored("the model's parts are found by its family or its structure")
MODULES: Table = {
    "rewrite_module_tmp": _FOUND,
    "rewrite_module_tmps": _FOUND,
    "layer_module_tmp": _FOUND,
    "mlp_module_tmp": _FOUND,
    "attn_module_tmp": _FOUND,
    "ln_f_module": _FOUND,
    "lm_head_module": _FOUND,
}
"""Templates of modules' names."""

_GATHERED = Ignored("statistics are gathered over stats.corpus or sampled text, or imported: everedit stats import")
MOMENTS: Table = {
    "stats_dir": _GATHERED,
    "mom2_dataset": _GATHERED,
    "mom2_n_samples": _GATHERED,
    "mom2_dtype": Ignored("second moments are summed and solved with in float64"),
}
"""Where second moments come from."""

VALUES: Table = {
    "v_num_grad_steps": Mapped("method.target.steps", count),
    "v_lr": Mapped("method.target.lr", number),
    "v_weight_decay": Mapped("method.target.weight_decay", number),
    "clamp_norm_factor": Mapped("method.target.clamp", number),
    "kl_factor": Mapped("method.target.kl", number),
    "v_loss_layer": Ignored("the loss is read from the model's own logits"),
    "fact_token": Ignored("values are written at the subject's last token", only=("subject_last",)),
}
"""The value optimisation of ROME and its successors."""

CONTEXTS: Table = {"context_template_length_params": Mapped("method.contexts", pairs)}

LOGGING: Table = dict.fromkeys(
    ("log_interval", "eval_log_interval", "verbose", "debug", "save", "log_errors", "model_save_pt", "final_eval"),
    Ignored("figures of every pass are kept, and all is saved at each validation"),
)
"""What a training says and saves."""
