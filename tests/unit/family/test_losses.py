from __future__ import annotations

import pytest
import torch

from tests.tolerances import FAMILY, assert_close
from veneer.family.losses import cross_entropy, importance_sampling, label_logprobs, ppo, token_loss

LOGPROBS = torch.tensor([[-1.0, -2.0, -0.5]])
GIVEN = {"logprobs": torch.tensor([[-1.5, -2.0, -2.0]]), "advantages": torch.tensor([[1.0, -2.0, 0.5]])}


def test_the_formulae() -> None:
    ratio = (LOGPROBS - GIVEN["logprobs"]).exp()
    advantages = GIVEN["advantages"]
    assert_close(cross_entropy(LOGPROBS, {}), -LOGPROBS, FAMILY)
    assert_close(importance_sampling(LOGPROBS, GIVEN), -ratio * advantages, FAMILY)
    clipped = torch.tensor([[1.2 * 1.0, 1.0 * -2.0, 1.2 * 0.5]])
    assert_close(ppo(LOGPROBS, GIVEN), -clipped, FAMILY)
    assert_close(ppo(LOGPROBS, GIVEN, high=10.0), -ratio * advantages, FAMILY)


@pytest.mark.parametrize("loss", ["cross_entropy", "importance_sampling", "ppo"])
def test_only_labels_count_and_values_elsewhere_may_be_anything(loss: str) -> None:
    logits = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([[1, 2, -100, 3, -100], [1, -100, -100, 5, 6]])
    given = {key: torch.full((2, 5), torch.nan) for key in ("logprobs", "advantages")}
    for value in given.values():
        value[labels != -100] = -0.5
    # The family's texts are longer: the last position is beyond these.
    positions = torch.tensor([0, 2, 3, 7])
    filled = torch.nn.functional.pad(labels, (0, 4), value=-100)
    found = label_logprobs(logits, filled, positions)
    total, count, logprobs = token_loss(loss, {}, found, positions, {"labels": labels, **given})
    assert int(count) == 4 and bool(total.isfinite())
    (gradient,) = torch.autograd.grad(total, logits)
    assert bool(gradient.isfinite().all())
    expected = logits.detach().log_softmax(-1)
    assert_close(logprobs[0, 1], expected[0, 0, 2], FAMILY)
    assert_close(logprobs[1, 3:], torch.stack([expected[1, 1, 5], expected[1, 2, 6]]), FAMILY)
    assert (logprobs[labels == -100] == 0).all() and (logprobs[:, 0] == 0).all()
