"""The network that turns a fine-tuning gradient into an edit (MEND), one for each shape of weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["GradientTransform"]

_SMALL = 1e-7


class GradientTransform(nn.Module):
    """Low-rank residual blocks on the normalised pair of an input u (d_in) and an output gradient delta (d_out).

    g = h + clamp(s * (A B h + b) + o, min=0), with A and B shared by all tensors of a shape and s, o of each tensor's
    own; at the start it is the identity (mend.md, "Editor network"). The running mean and deviation of all rows it was
    trained on are part of it.
    """

    mean: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self, d_in: int, d_out: int, tensors: int, *, rank: int, blocks: int, seed: int) -> None:
        super().__init__()
        width = d_in + d_out
        rank = min(rank, width)
        random = torch.Generator().manual_seed(seed)
        self.split = d_in
        self.left = nn.ParameterList(torch.zeros(width, rank) for _ in range(blocks))
        self.right = nn.ParameterList(torch.randn(rank, width, generator=random) for _ in range(blocks))
        self.bias = nn.ParameterList(torch.zeros(width) for _ in range(blocks))
        self.scale = nn.ParameterList(torch.ones(tensors, width) for _ in range(blocks))
        self.offset = nn.ParameterList(torch.zeros(tensors, width) for _ in range(blocks))
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def observe(self, rows: Tensor) -> None:
        """Take rows (n, d_in + d_out) into the running statistics."""
        wide = rows.double()
        fresh, count = wide.mean(0), int(self.count) + len(wide)
        step = fresh - self.mean
        self.squares += (wide - fresh).pow(2).sum(0) + step.pow(2) * (int(self.count) * len(wide) / count)
        self.mean += step * (len(wide) / count)
        self.count.fill_(count)

    def normalised(self, rows: Tensor) -> Tensor:
        """Return rows less the running mean, over the running deviation (n - 1 in the denominator)."""
        if int(self.count) < 2:
            return rows
        deviation = (self.squares / (int(self.count) - 1)).sqrt()
        return ((rows.double() - self.mean) / (deviation + _SMALL)).float()

    def forward(self, u: Tensor, delta: Tensor, tensors: Tensor, *, normalise: bool = True) -> tuple[Tensor, Tensor]:
        """Return pseudo inputs (n, d_in) and gradients (n, d_out) for rows that belong to ``tensors`` (n,)."""
        rows = torch.cat([u, delta], dim=1)
        if self.training:
            self.observe(rows)
        h = self.normalised(rows) if normalise else rows
        for left, right, bias, scale, offset in zip(
            self.left, self.right, self.bias, self.scale, self.offset, strict=True
        ):
            inner = (h @ right.T) @ left.T + bias
            # Unlike ReLU's, the gradient of clamp at 0 is 1: with A = 0 nothing would learn otherwise.
            h = h + (scale[tensors] * inner + offset[tensors]).clamp(min=0)
        return h[:, : self.split], h[:, self.split :]
