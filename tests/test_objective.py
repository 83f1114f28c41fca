"""Metrics against what they are said to be, worked out by hand."""

import torch

from sparsetrain.pruning.objective import METRICS, Extremes
from sparsetrain.tasks import TaskData

P = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.6, 0.1, 0.2]], dtype=torch.float64)
OUTPUTS = P.log() + torch.tensor([[3.0], [-1.0]])  # logits are probabilities up to a shift
EXTREMES = Extremes(OUTPUTS, OUTPUTS)


def asked(**sets) -> TaskData:
    tokens, last = torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    answers = torch.tensor([0, 1]), torch.tensor([1, 3])
    return TaskData("made", tokens, last, *answers, torch.tensor([0, 0]), ("a", "b"), **sets)


def sets() -> dict:
    right, wrong = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]]), torch.tensor([[0, 1, 0, 1], [1, 0, 1, 1]])
    return {"correct_set": right.bool(), "wrong_set": wrong.bool()}


def test_one_answer_each():
    data = asked()
    found = {name: METRICS[name](OUTPUTS, data, EXTREMES) for name in ("logit_difference", "probability_difference")}
    torch.testing.assert_close(found["probability_difference"], torch.tensor([0.3, 0.4], dtype=P.dtype))
    torch.testing.assert_close(found["logit_difference"], torch.tensor([2.5, 3.0], dtype=P.dtype).log())


def test_sets_of_answers():
    """Right 0.7 against wrong 0.3, and 0.6 against 0.4, whatever the one token is that stands for them."""
    data = asked(**sets())
    odds = torch.tensor([7 / 3, 1.5], dtype=P.dtype)
    torch.testing.assert_close(METRICS["logit_difference"](OUTPUTS, data, EXTREMES), odds.log())
    torch.testing.assert_close(METRICS["task_loss"](OUTPUTS, data, EXTREMES), -(1 + 1 / odds).log())
    difference = METRICS["probability_difference"](OUTPUTS, data, EXTREMES)
    torch.testing.assert_close(difference, torch.tensor([0.4, 0.2], dtype=P.dtype))


def test_logits_past_the_last_token_of_a_tokenizer_count_in_the_vocabulary_and_are_no_answers():
    data = asked(**sets())
    wider = torch.cat([OUTPUTS, torch.full((2, 2), -torch.inf, dtype=P.dtype)], dim=1)
    wider[0, 4] = OUTPUTS[0, 0]
    found, odds = (METRICS[name](wider, data, EXTREMES) for name in ("probability_difference", "logit_difference"))
    torch.testing.assert_close(found, torch.tensor([0.4 / 1.5, 0.2], dtype=P.dtype))
    torch.testing.assert_close(odds, METRICS["logit_difference"](OUTPUTS, data, EXTREMES))


def test_gradients_of_sets_are_finite_and_reach_answers_alone():
    leaf = OUTPUTS.clone().requires_grad_()
    METRICS["logit_difference"](leaf, asked(**sets()), EXTREMES).sum().backward()
    assert leaf.grad.isfinite().all() and (leaf.grad != 0).all()
    fewer = sets()
    fewer["wrong_set"][:, 3] = False
    (gradient,) = torch.autograd.grad(METRICS["logit_difference"](leaf, asked(**fewer), EXTREMES).sum(), leaf)
    assert (gradient[:, 3] == 0).all()
