"""Reinforcement learning: a recurrent policy over rollouts in which episodes end and begin.

The rollout is one batch [T,B] of B environments; `dones[t]` says that the episode ended with step
t, so step t + 1 starts a new one. The state must not cross that border, forward or backward, and
the new episode starts from a state that is learned.
"""

import rnnkern
import torch
from torch import nn

T, B, OBSERVATIONS, ACTIONS, HIDDEN = 64, 16, 8, 4, 64


class Policy(nn.Module):
    """A GRU policy with a learned first state."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = rnnkern.GRU(OBSERVATIONS, HIDDEN)
        self.head = nn.Linear(HIDDEN, ACTIONS)
        self.first = nn.Parameter(torch.zeros(1, 1, HIDDEN))

    def forward(
        self, observations: torch.Tensor, dones: torch.Tensor, h: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the action logits [T,B,A] and the state after the rollout."""
        resets = torch.zeros_like(dones)
        resets[1:] = dones[:-1]
        first = self.first.expand(1, observations.shape[1], HIDDEN)
        y, h = self.rnn(observations, h, resets=resets, reset_state=first)
        return self.head(y), h


def main() -> None:
    """Fit the policy to actions that depend on the episode's first observation alone."""
    torch.manual_seed(0)
    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for update in range(101):
        observations = torch.randn(T, B, OBSERVATIONS)
        dones = torch.rand(T, B) < 0.1
        actions = torch.empty(T, B, dtype=torch.long)
        for t in range(T):  # the action of a whole episode: the largest of its first observations
            new = dones[t - 1] if t else torch.ones(B, dtype=torch.bool)
            first = observations[t, :, :ACTIONS].argmax(-1)
            actions[t] = torch.where(new, first, actions[t - 1] if t else first)
        state = policy.first.expand(1, B, HIDDEN).contiguous()
        logits, _ = policy(observations, dones, state)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), actions.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if update % 25 == 0:
            accuracy = (logits.argmax(-1) == actions).float().mean()
            print(f"update {update:3d}   loss {loss.item():.3f}   accuracy {accuracy.item():.2f}")


if __name__ == "__main__":
    main()
