"""A loss of your own, from its formula to a training step: nothing of the library has to be touched.

Robust DPO (Chowdhury et al. 2024, Eq. 12) for preference labels of which a part ε is wrong.
"""

from typing import Annotated

import torch
import torch.nn.functional as F

from rgpb import OBJECTIVES, fused_loss, linear_logprob, objective, pairs
from rgpb.objectives import Between, Positive


@objective(couples="pair", ref="sums")
def robust_dpo(
    responses, *, beta: Annotated[float, Positive()] = 0.1, epsilon: Annotated[float, Between(0, 0.5, "[)")] = 0.1
):
    """(−(1 − ε) log σ(m) + ε log σ(−m)) / (1 − 2ε), m = β (Δ_w − Δ_l). [B/2]"""
    chosen, rejected = pairs(responses.log_ratios())
    margin = beta * (chosen - rejected)
    return (-(1 - epsilon) * F.logsigmoid(margin) + epsilon * F.logsigmoid(-margin)) / (1 - 2 * epsilon)


torch.manual_seed(0)
hidden = torch.randn(8, 12, 32)  # four pairs, [chosen; rejected], from a backbone
weight = torch.randn(500, 32, requires_grad=True)  # the LM head
target = torch.randint(500, (8, 12))
target[:, :4] = -100  # the prompt
reference = linear_logprob(hidden, weight.detach(), target)  # before training: of the model as it is now

optimizer = torch.optim.SGD([weight], lr=20.0)
losses = []
for _ in range(10):
    loss = fused_loss(hidden, weight, target, objective="robust_dpo", ref=reference, beta=0.1, epsilon=0.1)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"robust DPO: {losses[0]:.4f} → {losses[-1]:.4f}; {len(OBJECTIVES)} objectives are known")
