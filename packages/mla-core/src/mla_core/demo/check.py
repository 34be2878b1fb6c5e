"""The demo's check: every logit of every step against transformers' eager attention."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class LogitCheck:
    """Worst differences so far, and what failed.

    A difference is measured against the spread (standard deviation) of the eager logits of the same
    token. A greedy token that differs is a failure, unless eager itself rates the two tokens equal
    within the tolerance; such ties are counted.

    Parameters
    ----------
    tolerance : float
        Largest accepted difference, relative to the spread.
    """

    tolerance: float
    worst_absolute: float = 0.0
    worst_relative: float = 0.0
    worst_where: str = "nowhere"
    tokens: int = 0
    ties: int = 0
    failures: list[str] = field(default_factory=list)

    def compare(self, where: str, ours: torch.Tensor, eager: torch.Tensor) -> None:
        """Compare logits [num_tokens, vocab_size] of the same tokens."""
        ours, eager = ours.float(), eager.float()
        spread = eager.std(dim=-1)
        # A NaN compares as neither small nor large; infinity fails every check.
        difference = (ours - eager).abs().nan_to_num(nan=float("inf")).amax(dim=-1)
        relative = difference / spread
        worst = float(relative.max())
        self.tokens += ours.shape[0]
        self.worst_absolute = max(self.worst_absolute, float(difference.max()))
        if worst > self.worst_relative:
            self.worst_relative, self.worst_where = worst, where
        if worst > self.tolerance:
            self.failures.append(
                f"{where}: logits differ by {worst:.1e} of their spread "
                f"(accepted: {self.tolerance:.0e})"
            )
        self._compare_greedy(where, ours.argmax(-1), eager, spread)

    def _compare_greedy(
        self, where: str, chosen: torch.Tensor, eager: torch.Tensor, spread: torch.Tensor
    ) -> None:
        behind = eager.amax(-1) - eager.gather(-1, chosen[:, None])[:, 0]
        wrong = int((behind > self.tolerance * spread).sum())
        self.ties += int((chosen != eager.argmax(-1)).sum()) - wrong
        if wrong:
            self.failures.append(f"{where}: {wrong} greedy token(s) differ from eager")

    def is_tie(self, token: int, eager: torch.Tensor) -> bool:
        """Say whether eager's logits [vocab_size] rate a token like their best one."""
        behind = eager.max() - eager[token]
        return bool(behind <= self.tolerance * eager.std())

    def require(self, where: str, is_true: bool, message: str) -> None:
        """Record a failure unless a condition holds."""
        if not is_true:
            self.failures.append(f"{where}: {message}")
