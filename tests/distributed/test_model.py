"""The built model gives transformers' logits, on every layout, packed or row by row, with and without recompute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from factories import VOCAB_SIZE, make_tiny_model, tiny_hf_config
from finetune_trainer import model, parallel
from finetune_trainer.contract import ConfigurationError
from finetune_trainer.families import FAMILIES
from finetune_trainer.shards import padded_vocab_size
from gang import Gang
from small_models import Layout, build, collect_gradients, counted_square, pack, token_rows, transformers_logits

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-plain": {"rope_scaling": None},
    "llama-linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama-tied": {"tie_word_embeddings": True, "rope_scaling": None},
    "qwen2": {},
    "qwen3": {},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"tensorModelParallelSize": 2},
    "tp2-sp": {"tensorModelParallelSize": 2, "sequenceParallel": True},
    "pp2": {"pipelineModelParallelSize": 2},
    "pp2-uneven": {"pipelineModelParallelSize": 2, "decoderFirstPipelineNumLayers": 1},
    "tp2-pp2": {"tensorModelParallelSize": 2, "pipelineModelParallelSize": 2, "sequenceParallel": True},
}
ROWS = token_rows((5, 64, 131, 17), VOCAB_SIZE)


@pytest.fixture(scope="package")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_tiny_model(name.split("-")[0], tmp_path_factory.mktemp(name) / name, **overrides) for name, overrides in MODELS.items()}


def compute_logits(layout: Layout, rows: list[list[int]]) -> list[torch.Tensor]:
    built = build(layout)
    found = model.logits(built.chunks, rows, built.ranks)
    assert found is not None
    return found


def assert_same_logits(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 2e-6) -> None:
    largest = max(logits.abs().max().item() for logits in expected)
    assert [logits.shape for logits in found] == [logits.shape for logits in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype is torch.float32
        assert (ours - theirs).abs().max().item() <= tolerance * largest
        assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(name: str, folders: dict[str, Path], gang1: Gang) -> None:
    (found,) = gang1.run(compute_logits, Layout(folders[name]), ROWS)
    assert_same_logits(found, transformers_logits(folders[name], ROWS))


@pytest.mark.parametrize("layout", ["tp2", "tp2-sp", "pp2", "pp2-uneven"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_two_ranks_give_the_logits_of_transformers(name: str, layout: str, folders: dict[str, Path], gang2: Gang) -> None:
    expected = transformers_logits(folders[name], ROWS)
    for found in gang2.run(compute_logits, Layout(folders[name], LAYOUTS[layout]), ROWS):
        assert_same_logits(found, expected)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_tensor_and_pipeline_parallel_together_give_the_logits_of_transformers(name: str, folders: dict[str, Path], gang4: Gang) -> None:
    expected = transformers_logits(folders[name], ROWS)
    for found in gang4.run(compute_logits, Layout(folders[name], LAYOUTS["tp2-pp2"]), ROWS):
        assert_same_logits(found, expected)


def compute_packed_logits(layout: Layout, rows: list[list[int]]) -> torch.Tensor:
    built = build(layout)
    tokens = torch.tensor([[token for row in rows for token in row]])
    with torch.no_grad():
        packed: torch.Tensor = built.chunks[0].eval()(tokens, torch.zeros_like(tokens), None, packed_seq_params=pack(rows))
    return packed[0, :, :VOCAB_SIZE]


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_packed_rows_do_not_see_one_another(name: str, folders: dict[str, Path], gang1: Gang) -> None:
    (packed,) = gang1.run(compute_packed_logits, Layout(folders[name]), ROWS)
    expected = transformers_logits(folders[name], ROWS)
    assert_same_logits(list(packed.split([len(row) for row in ROWS])), expected)


RECOMPUTE = {
    "selective": {"recomputeGranularity": "selective"},
    "selective-all": {"recomputeGranularity": "selective", "recomputeModules": ["core_attn", "layernorm", "mlp"]},
    "full-uniform": {"recomputeGranularity": "full", "recomputeMethod": "uniform", "recomputeNumLayers": 2},
    "full-block": {"recomputeGranularity": "full", "recomputeMethod": "block", "recomputeNumLayers": 1},
}


def step(layout: Layout, micro_batches: list[list[list[int]]]) -> tuple[float, dict[str, torch.Tensor]]:
    return collect_gradients(build(layout), micro_batches)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_recompute_changes_neither_loss_nor_gradients(recompute: str, folders: dict[str, Path], gang1: Gang) -> None:
    ((loss, expected),) = gang1.run(step, Layout(folders["qwen3"]), [ROWS[:2], ROWS[2:]])
    ((found_loss, found),) = gang1.run(step, Layout(folders["qwen3"], training=RECOMPUTE[recompute]), [ROWS[:2], ROWS[2:]])
    assert found_loss == pytest.approx(loss, abs=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.norm() > 0, name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("layout", ["tp2", "tp2-sp", "pp2"])
def test_two_ranks_find_the_gradients_of_one(layout: str, folders: dict[str, Path], gang1: Gang, gang2: Gang) -> None:
    ((loss, expected),) = gang1.run(step, Layout(folders["qwen3"]), [ROWS[:2], ROWS[2:]])
    results = gang2.run(step, Layout(folders["qwen3"], LAYOUTS[layout]), [ROWS[:2], ROWS[2:]])
    assert results[-1][0] == pytest.approx(loss, abs=1e-6)
    for rank, (_, gradients) in enumerate(results):
        for name, gradient in gradients.items():
            whole = expected["embedding.word_embeddings.weight" if name == "output_layer.weight" else name]
            torch.testing.assert_close(gradient, share(whole, gradient.shape, name, rank), rtol=1e-4, atol=1e-6, msg=f"{name} on rank {rank}")


def share(whole: torch.Tensor, shape: torch.Size, name: str, rank: int) -> torch.Tensor:
    """The part of a parameter's gradient that belongs to rank ``rank`` of two, or all of it where it is not cut (the padding of the vocabulary grows with the tensor size)."""
    if whole.shape == shape:
        return whole
    if name.endswith("word_embeddings.weight"):
        whole = torch.nn.functional.pad(whole, (0, 0, 0, padded_vocab_size(VOCAB_SIZE, 2) - whole.shape[0]))
    if name.endswith(("linear_fc1.weight", "linear_fc1.lora_B.weight")):
        return whole.unflatten(0, (2, -1)).chunk(2, dim=1)[rank].flatten(0, 1)
    return whole.chunk(2, dim=0 if whole.shape[0] != shape[0] else 1)[rank]


def square_of_norm(layout: Layout) -> float:
    built = build(layout)
    return counted_square(built, collect_gradients(built, [ROWS])[1])


def test_every_gradient_counts_once_in_the_norm(folders: dict[str, Path], gang1: Gang, gang2: Gang) -> None:
    for name in ("qwen2", "qwen3"):
        expected = sum(gang1.run(square_of_norm, Layout(folders[name])))
        for layout in ("tp2", "tp2-sp", "pp2"):
            assert sum(gang2.run(square_of_norm, Layout(folders[name], LAYOUTS[layout]))) == pytest.approx(expected, rel=1e-5), (name, layout)


def transformers_gradients(folder: Path, rows: list[list[int]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss over all next tokens of the rows, and its gradients."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses = [torch.nn.functional.cross_entropy(reference(torch.tensor([row])).logits[0, :-1], torch.tensor(row[1:]), reduction="sum") for row in rows]
    mean = torch.stack(losses).sum() / sum(len(row) - 1 for row in rows)
    mean.backward()
    return mean.item(), {name: tensor.grad for name, tensor in reference.named_parameters()}


@pytest.mark.parametrize("layout", ["one", "tp2", "pp2"])
def test_padding_of_the_vocabulary_is_not_in_the_loss(layout: str, folders: dict[str, Path], gang1: Gang, gang2: Gang) -> None:
    expected_loss, expected = transformers_gradients(folders["llama"], ROWS)
    gang = gang1 if layout == "one" else gang2
    results = gang.run(step, Layout(folders["llama"], LAYOUTS[layout]), [ROWS[:2], ROWS[2:]])
    assert results[-1][0] == pytest.approx(expected_loss, abs=2e-6)
    for _, gradients in results:
        for name, hf_name in (
            ("decoder.final_layernorm.weight", "model.norm.weight"),
            ("decoder.layers.2.self_attention.linear_qkv.layer_norm_weight", "model.layers.2.input_layernorm.weight"),
        ):
            if name in gradients:
                assert (gradients[name] - expected[hf_name]).norm() <= 1e-5 * expected[hf_name].norm(), name


@pytest.mark.parametrize("layout", ["one", "tp2-sp"])
def test_bfloat16_with_the_fused_loss_stays_near_float32(layout: str, folders: dict[str, Path], gang1: Gang, gang2: Gang) -> None:
    expected_loss, expected = transformers_gradients(folders["llama"], ROWS)
    gang = gang1 if layout == "one" else gang2
    for loss, gradients in gang.run(step, Layout(folders["llama"], LAYOUTS[layout], torch_dtype="bfloat16"), [ROWS[:2], ROWS[2:]]):
        assert loss == pytest.approx(expected_loss, rel=2e-3)
        gradient = gradients["decoder.final_layernorm.weight"]
        assert gradient.dtype is torch.float32
        assert (gradient - expected["model.norm.weight"]).norm() <= 0.05 * expected["model.norm.weight"].norm()


def capture(layout: Layout, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    built = build(layout)
    return model.hidden_states(built.chunks, rows, built.ranks)


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2"])
def test_hidden_states_of_every_layer_in_order(layout: str, folders: dict[str, Path], gang1: Gang, gang2: Gang) -> None:
    (expected,) = gang1.run(capture, Layout(folders["llama"]), ROWS)
    found, _ = gang2.run(capture, Layout(folders["llama"], LAYOUTS[layout]), ROWS)
    assert list(expected) == ["embedding", *(f"decoder.layers.{index}" for index in range(4)), "decoder.final_layernorm"]
    assert list(found) == list(expected)
    for name, hidden in found.items():
        assert hidden.shape == (sum(len(row) for row in ROWS), 64)
        torch.testing.assert_close(hidden, expected[name], rtol=1e-5, atol=1e-5)


def list_weights(layout: Layout) -> list[str]:
    return [name for name, _ in model.named_weights(build(layout).chunks)]


def test_weights_have_the_same_names_on_every_layout(folders: dict[str, Path], gang1: Gang, gang2: Gang) -> None:
    (whole,) = gang1.run(list_weights, Layout(folders["qwen3"]))
    first, last = gang2.run(list_weights, Layout(folders["qwen3"], LAYOUTS["pp2"]))
    assert "embedding.word_embeddings.weight" in first
    assert "embedding.word_embeddings.weight" in last, "the tied copy"
    assert sorted({*first, *last}) == sorted(whole)
    assert len(whole) == len(set(whole)) == 2 + 4 * 8


def test_frequencies_equal_those_of_transformers_to_the_bit() -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for name in ["llama", "llama-plain", "llama-linear"]:
        fields = tiny_hf_config("llama", **MODELS[name])
        theirs = LlamaRotaryEmbedding(AutoConfig.for_model(**fields)).inv_freq
        assert torch.equal(model.rotary_frequencies(FAMILIES["llama"].architecture(fields)), theirs), name


def build_without_weights(layout: Layout) -> list[bool]:
    parallel.open_process_group(layout.config)
    ranks = parallel.initialize(layout.config.parallelism, 1)
    hf_config = json.loads((layout.folder / "config.json").read_text())
    (chunk,) = model.build(FAMILIES[hf_config["model_type"]], hf_config, layout.config, ranks)
    return [bool(parameter.isnan().all()) for parameter in chunk.parameters()]


def test_a_weight_that_is_never_loaded_cannot_go_unseen(folders: dict[str, Path], gang1: Gang) -> None:
    (is_nan,) = gang1.run(build_without_weights, Layout(folders["qwen2"]))
    assert all(is_nan)


def test_layers_that_do_not_divide_into_recomputed_groups_are_refused(folders: dict[str, Path], gang1: Gang) -> None:
    layout = Layout(folders["llama"], training={"recomputeGranularity": "full", "recomputeMethod": "uniform", "recomputeNumLayers": 3})
    with pytest.raises(ConfigurationError, match=r"training.recomputeNumLayers is 3; .* must divide the 4 layers"):
        gang1.run(build_without_weights, layout)
