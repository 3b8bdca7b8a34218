"""Layouts: fuse and split are inverse to each other, commute with adapters and with the cut over ranks."""

from __future__ import annotations

import pytest
import torch

from finetune_trainer.contract import ModelError
from finetune_trainer.rules import QKV, Copy, Cut, Dims, GateUp, Rule, Vocab, match_names, part_shapes
from finetune_trainer.shards import Share, local_dims, share_slices

DIMS = Dims(num_query_groups=4, num_attention_heads=12, head_dim=3, vocab_size=10, padded_vocab_size=16)
RULES: dict[str, tuple[Rule, tuple[tuple[int, ...], ...]]] = {
    "copy rows": (Copy("m", ("w",), Cut.ROWS), ((8, 6),)),
    "copy columns": (Copy("m", ("w",), Cut.COLUMNS), ((6, 8),)),
    "copy whole": (Copy("m", ("w",), Cut.WHOLE), ((5,),)),
    "qkv weight": (QKV("m", ("q", "k", "v"), Cut.ROWS), ((36, 6), (12, 6), (12, 6))),
    "qkv bias": (QKV("m", ("q", "k", "v"), Cut.ROWS), ((36,), (12,), (12,))),
    "gate and up": (GateUp("m", ("g", "u"), Cut.ROWS), ((8, 6), (8, 6))),
    "vocabulary": (Vocab("m", ("e",), Cut.ROWS), ((10, 6),)),
}


def random_parts(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def equal(left: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> bool:
    return len(left) == len(right) and all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", RULES)
def test_split_undoes_fuse(case: str, dtype: torch.dtype) -> None:
    rule, shapes = RULES[case]
    parts = random_parts(shapes, dtype)
    fused = rule.fuse(parts, DIMS)
    assert equal(rule.split(fused, DIMS), parts)
    assert part_shapes(rule, fused.shape, DIMS) == shapes


@pytest.mark.parametrize("case", RULES)
def test_fuse_fills_every_row(case: str) -> None:
    rule, shapes = RULES[case]
    fused = rule.fuse([torch.ones(shape) for shape in shapes], DIMS)
    assert fused.sum() == sum(torch.ones(shape).numel() for shape in shapes)
    assert torch.equal(rule.padding(fused, DIMS), torch.zeros_like(rule.padding(fused, DIMS)))


@pytest.mark.parametrize("case", RULES)
@pytest.mark.parametrize("size", [2, 4])
def test_rule_of_the_shares_is_the_share_of_the_rule(case: str, size: int) -> None:
    """A rank that fuses its own slices gets what Megatron-core would cut out for it; together the ranks give the parts back."""
    rule, shapes = RULES[case]
    parts = random_parts(shapes)
    returned = []
    for rank in range(size):
        share = Share(rank, size)
        cut = [part[share_slices(part.shape, rule.cut, share, rule.padded_rows(DIMS))] for part in parts]
        local = local_dims(DIMS, share)
        returned.append(rule.split(rule.fuse(cut, local), local))
    for number, part in enumerate(parts):
        pieces = [split[number] for split in returned]
        assert torch.equal(pieces[0] if rule.cut is Cut.WHOLE else torch.cat(pieces, 0 if rule.cut is Cut.ROWS else 1), part)


def test_query_groups_hold_their_heads_then_key_then_value() -> None:
    """As Megatron-core's attention takes linear_qkv apart: [groups, queries + 2, head_dim]."""
    rule, shapes = RULES["qkv weight"]
    query, key, value = random_parts(shapes)
    expected = torch.cat([part.reshape(4, -1, 6) for part in (query, key, value)], dim=1).reshape(-1, 6)
    assert torch.equal(rule.fuse((query, key, value), DIMS), expected)


def test_gate_and_up_are_halves_on_every_rank() -> None:
    rule, shapes = RULES["gate and up"]
    gate, up = random_parts(shapes)
    assert torch.equal(rule.fuse((gate[4:], up[4:]), DIMS), torch.cat((gate[4:], up[4:])))


@pytest.mark.parametrize("case", [case for case, (_, shapes) in RULES.items() if len(shapes[0]) == 2 and case != "vocabulary"])
def test_splitting_commutes_with_an_adapter(case: str) -> None:
    rule, shapes = RULES[case]
    rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
    generator = torch.Generator().manual_seed(1)
    lora_a = torch.randint(-3, 4, (2, columns), generator=generator).float()
    lora_b = torch.randint(-3, 4, (rows, 2), generator=generator).float()
    assert equal(rule.split(lora_b @ lora_a, DIMS), tuple(part @ lora_a for part in rule.split(lora_b, DIMS)))


def test_vocabulary_is_padded_with_zeros_and_cut_off_again() -> None:
    rule = Vocab("m", ("e",), Cut.ROWS)
    fused = rule.fuse((torch.ones(10, 2),), DIMS)
    assert fused.shape == (16, 2)
    assert torch.equal(fused[10:], torch.zeros(6, 2))
    fused[10:] = 7
    assert equal(rule.split(fused, DIMS), (torch.ones(10, 2),))


def test_layer_number_replaces_the_star() -> None:
    rule = QKV("decoder.layers.*.qkv", ("layers.*.q", "layers.*.k", "layers.*.v"), Cut.ROWS).at_layer(11)
    assert (rule.mcore, rule.hf) == ("decoder.layers.11.qkv", ("layers.11.q", "layers.11.k", "layers.11.v"))


def test_names_that_match_are_accepted() -> None:
    match_names("the files", ["a", "b"], ["b", "a"])
    match_names("a mapping's keys count, not its values", {"a": 7}, {"a": 9})


def test_names_that_do_not_match_are_refused_with_every_sorted_list() -> None:
    with pytest.raises(ModelError) as caught:
        match_names("the files of /m", ["z", "c", "a", "d", "d"], ["d", "y", "x", "x"])
    assert str(caught.value) == (
        "the files of /m: the tensors do not match the model. 3 missing: a, c, z; 2 unexpected: x, y; 1 mapped more than once: d; 1 present more than once: x"
    )
