"""MEND: W <- W - alpha_l sum_t delta~_t u~_t^T, where a network maps each token's (u_t, delta_t) to (u~_t, delta~_t).

Mitchell et al., "Fast Model Editing at Scale", ICLR 2022, arXiv 2110.11309. u is a layer's input, delta the gradient of
the edit's loss by its output: the fine-tuning gradient is sum_t delta_t u_t^T. The networks are trained on
c_edit NLL(y | x') + c_loc KL(p_base || p_edited on other texts), with x' the edit in other words; gradients through the
inner backward pass are not taken. The minus sign is the paper's: the first release adds, and has to learn the sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from everedit.edit import Edit
from everedit.engine.bench import Workbench
from everedit.engine.learner import Learner
from everedit.engine.state import State
from everedit.engine.tail import Tail
from everedit.engine.target import Target
from everedit.methods._base import Traits
from everedit.methods._trained import TrainedMethod, edit_gradients
from everedit.methods._transform import TransformConfig, TransformLearner
from everedit.patch import Delta, Dense, LowRank, Patch

_ROWS_A_PASS = 64


class MendConfig(TransformConfig):
    """Settings of MEND, those of the paper."""


class Mend(TrainedMethod):
    """Learned transforms of the fine-tuning gradient."""

    name = "mend"
    traits = Traits(
        title="MEND, learned transforms of gradients",
        paper="arXiv 2110.11309",
        needs_subject=False,
        needs_moments=False,
        needs_training=True,
        solves_batches=True,
        encoder_decoder=True,
        writes_mlp_values=False,
    )
    Config = MendConfig
    config: MendConfig
    training: ClassVar[dict[str, Any]] = {
        "steps": 500_000, "batch": 1, "accumulation": 10, "clip": 100.0, "check_every": 5_000, "patience": 20_000,
    }  # fmt: skip

    def learner(self, bench: Workbench) -> Learner:
        """Return untrained networks."""
        return TransformLearner(bench.lm, self.weights(bench.lm.layout), self.config, bench.seed)

    def fit(
        self, bench: Workbench, edits: Sequence[Edit], state: State, targets: Sequence[Target] | None = None
    ) -> tuple[Patch, State]:
        """Return the transformed gradients of all edits in one change."""
        learner = self.trained(bench)
        assert isinstance(learner, TransformLearner)
        texts = [bench.lm.encode(edit.prompt, edit.target_new) for edit in edits]
        tokens = sum(len(text.target_ids) for text in texts)
        deltas: dict[str, Delta] = {}
        for start in range(0, len(texts), _ROWS_A_PASS):
            part = texts[start : start + _ROWS_A_PASS]
            with bench.clock.phase("gradients"):
                gradients = edit_gradients(Tail.of(bench.lm, part, self.layers()[0]), learner.names, tokens=tokens)
            with bench.clock.phase("transform"), torch.no_grad():
                changes = learner.changes(gradients)
            for name, change in changes.items():
                fresh = LowRank(change.left.contiguous(), change.right.contiguous())
                # The factors of many edits would take more room than the weight.
                deltas[name] = Dense(deltas[name].dense() + fresh.dense()) if start else fresh
        return Patch(deltas), state


METHOD = Mend
