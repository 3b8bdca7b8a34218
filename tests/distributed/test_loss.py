"""The output layer's loss and its gradients are those of torch's cross entropy on the labelled positions, whole or cut, with a frozen or a trained layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from finetune_trainer import loss
from finetune_trainer.loss import Labelled, Shard, cross_entropy_
from gang import Gang

TOKENS, HIDDEN, WIDTH, VOCABULARY = 23, 16, 96, 90


@dataclass(frozen=True)
class Found:
    losses: Tensor
    of_hidden: Tensor
    of_weight: Tensor | None


def make(seed: int = 3) -> tuple[Tensor, Tensor, Labelled]:
    """Hidden [tokens, hidden], weight [padded vocabulary, hidden], and some labelled positions."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(TOKENS, HIDDEN, generator=generator), torch.randn(WIDTH, HIDDEN, generator=generator)
    positions = torch.tensor([0, 3, 4, 9, 10, 11, 21])
    return hidden, weight, Labelled(positions, torch.randint(0, VOCABULARY, positions.shape, generator=generator))


def expect(hidden: Tensor, weight: Tensor, given: Labelled, factors: Tensor) -> Found:
    """By torch, in float64."""
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy((hidden @ weight.t())[given.positions, :VOCABULARY], given.labels, reduction="none")
    (losses * factors).sum().backward()
    assert hidden.grad is not None
    return Found(losses.detach(), hidden.grad, weight.grad)


def compute(piece_bytes: int, trained: bool, scale: float | None, factors: Tensor) -> Found:
    loss.PIECE_BYTES = piece_bytes
    hidden, weight, given = make()
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    scaled = None if scale is None else torch.full((1,), scale)
    losses = loss._LabelledLoss.apply(hidden, weight, given, Shard(0, VOCABULARY, None), scaled)
    (losses * factors).sum().backward()
    assert hidden.grad is not None
    return Found(losses.detach(), hidden.grad, weight.grad)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize(("piece_bytes", "scale"), [(2**29, None), (3 * WIDTH * 4, None), (2**29, 256.0), (1, 256.0)])
def test_losses_and_gradients_are_those_of_torch(trained: bool, piece_bytes: int, scale: float | None, gang1: Gang) -> None:
    factors = torch.tensor([1.0, 2.0, 0.0, 1.0, -1.0, 0.5, 3.0])
    (found,) = gang1.run(compute, piece_bytes, trained, scale, factors)
    expected = expect(*make(), factors)
    torch.testing.assert_close(found.losses.double(), expected.losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.of_hidden.double(), expected.of_hidden, rtol=1e-4, atol=1e-5)
    if not trained:
        assert found.of_weight is None
        return
    assert found.of_weight is not None
    assert expected.of_weight is not None
    torch.testing.assert_close(found.of_weight.double(), expected.of_weight, rtol=1e-4, atol=1e-5)


def cut_in_two(columns: int) -> tuple[Tensor, Tensor]:
    """Losses, and this rank's part of the gradient of the logits; ``columns`` on each rank."""
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    hidden, weight, given = make()
    padded = torch.nn.functional.pad(weight, (0, 0, 0, 2 * columns - WIDTH))
    logits = hidden[given.positions] @ padded[rank * columns : (rank + 1) * columns].t()
    shard = Shard(rank * columns, max(0, min(columns, VOCABULARY - rank * columns)), distributed.group.WORLD)
    return cross_entropy_(logits, given.labels, shard), logits


@pytest.mark.parametrize("columns", [48, 64, 96], ids=["both-have-labels", "padded", "all-padding-on-the-second"])
def test_a_vocabulary_cut_in_two_gives_the_same(columns: int, gang2: Gang) -> None:
    hidden, weight, given = make()
    logits = (hidden @ weight.t()).double()[given.positions, :VOCABULARY].requires_grad_()
    expected = torch.nn.functional.cross_entropy(logits, given.labels, reduction="none")
    expected.sum().backward()
    results: Any = gang2.run(cut_in_two, columns)
    for losses, _ in results:
        torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    found = torch.cat([gradient for _, gradient in results], dim=1).double()
    assert logits.grad is not None
    torch.testing.assert_close(found[:, :VOCABULARY], logits.grad, rtol=1e-4, atol=1e-6)
    assert (found[:, VOCABULARY:] == 0).all()


def no_labels(trained: bool) -> Found:
    hidden, weight, _ = make()
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    nothing = torch.zeros(0, dtype=torch.int64)
    losses = loss._LabelledLoss.apply(hidden, weight, Labelled(nothing, nothing), Shard(0, VOCABULARY, None), None)
    losses.sum().backward()
    assert hidden.grad is not None
    return Found(losses.detach(), hidden.grad, weight.grad)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_micro_batch_without_labels_has_gradients_of_zero(trained: bool, gang1: Gang) -> None:
    (found,) = gang1.run(no_labels, trained)
    assert found.losses.shape == (0,)
    assert (found.of_hidden == 0).all()
    assert found.of_weight is None or (found.of_weight == 0).all()
