"""The products of an adapter have the gradients that autograd finds for the formula, and leave nothing large behind."""

from __future__ import annotations

import pytest
import torch

from finetune_trainer.low_rank import Lower, Raise, share_kept, threshold

SCALE = 3.0


def made(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def adapted(hidden: torch.Tensor, base: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, dropout: float, *, after: bool) -> torch.Tensor:
    """As LoraLinear puts them together; ``after`` says that A stands beside what the base has made of hidden, as where a layer begins with its norm."""
    through, low = Lower.apply(hidden, lora_a, dropout, None)
    return Raise.apply(torch.nn.functional.linear(hidden if after else through, base), low, lora_b, SCALE / share_kept(dropout), None)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_values_and_gradients_are_those_of_the_formula(dropout: float, after: bool) -> None:
    hidden, base, lora_a, lora_b, above = made(5, 2, 7), made(6, 7), made(3, 7), made(6, 3), made(5, 2, 6)
    ours = [tensor.clone().requires_grad_() for tensor in (hidden, lora_a, lora_b)]
    torch.manual_seed(1)
    output = adapted(ours[0], base, ours[1], ours[2], dropout, after=after)
    output.backward(above)
    theirs = [tensor.clone().requires_grad_() for tensor in (hidden, lora_a, lora_b)]
    torch.manual_seed(1)
    kept = torch.empty(10, 7, dtype=torch.bool).bernoulli_(share_kept(dropout)) if dropout else torch.ones(10, 7)
    dropped = theirs[0] * kept.view(5, 2, 7) / share_kept(dropout)
    expected = theirs[0] @ base.t() + SCALE * (dropped @ theirs[1].t()) @ theirs[2].t()
    expected.backward(above)
    assert torch.allclose(output, expected, rtol=1e-12, atol=1e-12)
    assert not dropout or 0 < kept.sum() < kept.numel()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine.grad, other.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_added_where_the_caller_says_and_autograd_gets_none(dropout: float, dtype: torch.dtype) -> None:
    hidden, base, above = (tensor.to(dtype) for tensor in (made(5, 7), made(6, 7), made(5, 6)))
    factors = [made(3, 7).to(dtype).requires_grad_(), made(6, 3).to(dtype).requires_grad_()]
    sums = [torch.full(factor.shape, 0.5) for factor in factors]
    for into in ([None, None], sums, sums):
        torch.manual_seed(1)
        through, low = Lower.apply(hidden.requires_grad_(), factors[0], dropout, into[0])
        Raise.apply(torch.nn.functional.linear(through, base), low, factors[1], SCALE / share_kept(dropout), into[1]).backward(above)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for factor, total in zip(factors, sums, strict=True):
        assert factor.grad.norm() > 0, "of the first pass alone"
        assert torch.allclose(total, 0.5 + 2 * factor.grad.float(), rtol=tolerance, atol=tolerance * float(factor.grad.abs().max()))


def test_sums_are_finer_than_the_type_of_the_factors() -> None:
    hidden, base = made(50, 7).to(torch.bfloat16), made(6, 7).to(torch.bfloat16)
    factors = [made(3, 7).to(torch.bfloat16).requires_grad_(), made(6, 3).to(torch.bfloat16).requires_grad_()]
    sums = [torch.zeros(factor.shape) for factor in factors]
    through, low = Lower.apply(hidden, factors[0], 0.0, sums[0])
    Raise.apply(torch.nn.functional.linear(through, base), low, factors[1], SCALE, sums[1]).backward(made(50, 6).to(torch.bfloat16))
    assert [torch.equal(total, total.to(torch.bfloat16).float()) for total in sums] == [False, False]
    exact = SCALE * made(50, 6).to(torch.bfloat16).double().t() @ low.detach().double()
    assert torch.allclose(sums[1].double(), exact, rtol=1e-5, atol=1e-5)


def test_a_low_that_lies_otherwise_in_memory_gets_its_gradient() -> None:
    low = made(3, 2, 4).transpose(0, 1).requires_grad_()
    factor, above = made(6, 4).requires_grad_(), made(2, 3, 6)
    Raise.apply(torch.zeros(2, 3, 6, dtype=torch.float64), low, factor, SCALE, None).backward(above)
    assert low.grad is not None
    assert torch.allclose(low.grad, SCALE * above @ factor.detach())


def test_dropout_keeps_something_and_is_a_multiple_of_what_16_bits_can_say() -> None:
    assert [threshold(dropout) for dropout in (0.0, 0.5, 0.05, 1.0)] == [0, 2**15, 3277, 2**16 - 1]
    assert share_kept(0.0) == 1.0
    assert share_kept(0.05) == pytest.approx(0.95, abs=1e-5)


def test_behind_a_frozen_input_the_factors_alone_get_gradients_and_the_base_makes_none() -> None:
    lora_a, lora_b = made(3, 7).requires_grad_(), made(6, 3).requires_grad_()
    hidden, low = Lower.apply(made(4, 7), lora_a, 0.0, None)
    assert not hidden.requires_grad
    Raise.apply(torch.nn.functional.linear(hidden, made(6, 7)), low, lora_b, SCALE, None).sum().backward()
    assert lora_a.grad.norm() > 0
    assert lora_b.grad.norm() > 0


def test_a_layer_that_keeps_its_own_output_is_found_out() -> None:
    hidden = made(4, 6).requires_grad_()
    raised = Raise.apply(hidden.exp(), made(4, 3), made(6, 3), SCALE, None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        raised.sum().backward()


def test_the_base_s_output_is_overwritten_and_hidden_is_not_copied() -> None:
    hidden, output = made(4, 7), made(4, 6)
    before = output.clone()
    through, low = Lower.apply(hidden, made(3, 7), 0.0, None)
    raised = Raise.apply(output, low, made(6, 3), SCALE, None)
    assert through.data_ptr() == hidden.data_ptr()
    assert raised.data_ptr() == output.data_ptr()
    assert not torch.equal(raised, before)


def test_what_is_kept_for_the_gradient_is_the_input_itself_and_a_byte_for_each_number() -> None:
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    hidden = made(4, 7)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        Lower.apply(hidden.requires_grad_(), made(3, 7).requires_grad_(), 0.5, None)
    assert sorted((tensor.numel() * tensor.itemsize, tensor.data_ptr() == hidden.data_ptr()) for tensor in kept) == [
        (28, False),
        (168, False),
        (224, True),
    ]
