"""Hugging Face weights into the model and out of it: every direction walks the rows of the family, piece by piece.

Weights are written in the data type that the run trained in, so nothing is rounded on the way out; config.json says which.
All functions are collective: every rank of the run calls them together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune_trainer import agreement, hf_export, hf_files, lora, transfer
from finetune_trainer.contract import EngineError, ModelError, TuningConfig
from finetune_trainer.families import Family
from finetune_trainer.hf_export import FolderWriter, TensorSpec
from finetune_trainer.hf_files import HFModel
from finetune_trainer.model import named_weights
from finetune_trainer.model_folder import read_json
from finetune_trainer.parallel import Ranks
from finetune_trainer.pieces import EMBEDDING, Layout, Piece, adapter_name
from finetune_trainer.rules import Cut, match_names

from megatron.core import parallel_state  # isort: skip  (after finetune_trainer.model, which prepares Megatron-core for this machine)

Chunks = Sequence[torch.nn.Module]
Pieces = Iterable[tuple[str, Piece]]
"""Canonical name of the parameter, and a piece of it."""


def import_base(chunks: Chunks, family: Family, hf: HFModel, ranks: Ranks) -> None:
    """Fill the model from ``hf``; each rank reads the bytes of its own share and no others.

    Raises ModelError for names that do not match (the sorted list, of the files or of the model), a wrong shape, a weight
    that is not finite, and a tied model whose files have another output layer than its embedding.
    """
    layout = _layout(family, hf, ranks)
    weights = [(name, parameter.detach()) for name, parameter in named_weights(chunks)]
    _check_names(layout, hf, [name for name, _ in weights], ranks)
    # In the order of the files: a disk, and what the kernel reads ahead, is slower in any other.
    pieces = sorted((piece for name, tensor in weights for piece in layout.weight(name, tensor)), key=lambda piece: hf.place_of(piece.name))
    sums = []
    for piece in pieces:
        _load(piece, hf)
        _check_twin(piece, layout, hf)
        sums.append(piece.place.sum())
    for name, tensor in weights:
        layout.rows[name].padding(tensor, layout.local).zero_()
    # A sum is finite only where all its terms are, and is far cheaper than a look at every element.
    finite = torch.stack(sums).float().isfinite().tolist()
    for piece in (piece for piece, good in zip(pieces, finite, strict=True) if not good):
        _check_finite(piece, hf)


def export_huggingface(chunks: Chunks, family: Family, hf: HFModel, ranks: Ranks, folder: Path, max_shard_size: int) -> None:
    """Write the whole model, LoRA merged, as a Hugging Face folder of files of at most ``max_shard_size`` bytes, with tokenizer and manifest.

    The tensors are those of the source, in the data type of the run. Raises ConfigurationError naming the path where the
    folder cannot be written.
    """
    layout = _layout(family, hf, ranks)
    dtype = next(iter(named_weights(chunks)))[1].dtype
    specs = [TensorSpec(name, hf.entries[name].shape, dtype) for name in _written_names(layout, hf)]
    plans = hf_export.plan_files(specs, "model", max_shard_size)
    texts = {"config.json": _json(hf_export.model_config(hf.config, dtype))}
    index = hf_export.index_json(plans, specs)
    if index is not None:
        texts["model.safetensors.index.json"] = index
    own = _own_rows(layout, ranks)
    weights = {layout.rows[name].hf[0]: (name, parameter) for name, parameter in named_weights(chunks) if own(name)}
    in_turn = [weights[name] for name in hf_export.files_in_turn(plans, weights)]
    _write_folder(FolderWriter(folder, specs, plans), _weight_pieces(chunks, in_turn, layout, hf), layout, ranks, texts, hf_export.side_files(hf))


def export_adapter(chunks: Chunks, family: Family, hf: HFModel, ranks: Ranks, folder: Path, tuning: TuningConfig, base: str) -> None:
    """Write the LoRA layers as a PEFT adapter of the model ``base``; q, k, v (and gate, up) get the same lora_A each.

    Raises ConfigurationError naming the path where the folder cannot be written, ModelError where a layer lacks an adapter
    that others have.
    """
    layout = _layout(family, hf, ranks)
    linears = _adapted_linears(chunks, layout, ranks)
    specs = _adapter_specs(chunks, linears, layout, hf)
    targets = sorted({_leaf(name) for linear in linears for name in layout.rows[f"{linear}.weight"].hf})
    texts = {"adapter_config.json": _json(adapter_config(tuning, targets, base))}
    writer = FolderWriter(folder, specs, hf_export.plan_files(specs, "adapter_model"))
    _write_folder(writer, _adapter_pieces(chunks, layout, _own_rows(layout, ranks)), layout, ranks, texts, {})


def differing_weights(chunks: Chunks, family: Family, hf: HFModel, folder: Path, ranks: Ranks) -> list[str]:
    """Read an exported Hugging Face folder back: sorted names of this rank's parameters that are not bitwise there, and of tensors that nobody asked for."""
    layout = _layout(family, hf, ranks)
    written = HFModel(folder, read_json(folder / "config.json"), hf_files.read_entries(folder))
    return _differing(_weight_pieces(chunks, named_weights(chunks), layout, hf), written, _written_names(layout, hf))


def differing_adapters(chunks: Chunks, family: Family, hf: HFModel, folder: Path, ranks: Ranks) -> list[str]:
    """Read an exported PEFT folder back, as ``differing_weights``."""
    layout = _layout(family, hf, ranks)
    specs = _adapter_specs(chunks, _adapted_linears(chunks, layout, ranks), layout, hf)
    return _differing(_adapter_pieces(chunks, layout, _every_row), hf_files.open_adapter(folder), [spec.name for spec in specs])


def adapter_config(tuning: TuningConfig, target_modules: Sequence[str], base: str) -> dict[str, Any]:
    """The contents of adapter_config.json; ``tuning`` is resolved."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": tuning.lora_rank,
        "lora_alpha": tuning.lora_alpha,
        "lora_dropout": tuning.lora_dropout,
        "use_rslora": bool(tuning.use_rslora),
        "target_modules": list(target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _layout(family: Family, hf: HFModel, ranks: Ranks) -> Layout:
    return Layout.of(family, family.architecture(hf.config), ranks.tp)


def _check_names(layout: Layout, hf: HFModel, names: Sequence[str], ranks: Ranks) -> None:
    twins = set(layout.twins.values())
    match_names(f"the files of {hf.folder}", layout.names(), [name for name in hf.entries if name not in twins and not layout.family.is_droppable(name)])
    own = [name for name in names if name != EMBEDDING or ranks.is_first_stage]
    stages = transfer.gather(own, parallel_state.get_pipeline_model_parallel_group())
    match_names("the Megatron-core model", layout.rows, [name for stage in stages for name in stage])


def _load(piece: Piece, hf: HFModel) -> None:
    entry = hf.entries[piece.name]
    if entry.shape != piece.shape:
        raise ModelError(f"{hf.folder / entry.file}: tensor {piece.name} has shape {list(entry.shape)}; the model needs {list(piece.shape)}")
    hf.copy_into(piece.place, piece.name, piece.slices)


def _check_twin(piece: Piece, layout: Layout, hf: HFModel) -> None:
    twin = _twin(piece, layout, hf)
    if twin is not None and not torch.equal(hf.read(piece.name, piece.slices), hf.read(twin, piece.slices)):
        raise ModelError(
            f"{hf.folder / hf.entries[twin].file}: {twin} differs from {piece.name}, but config.json says that they are tied (tie_word_embeddings)"
        )


def _twin(piece: Piece, layout: Layout, hf: HFModel) -> str | None:
    """The tensor that the source holds although its model is tied, equal to this piece's."""
    twin = layout.twins.get(piece.name)
    return twin if twin in hf.entries else None


def _check_finite(piece: Piece, hf: HFModel) -> None:
    """Look at every element of a piece that is loaded; raises ModelError naming the tensor when it has NaN or infinite ones."""
    if bool(piece.place.isfinite().all()):
        return
    file = hf.folder / hf.entries[piece.name].file
    if bool(hf.read(piece.name, piece.slices).isfinite().all()):
        raise ModelError(f"{file}: tensor {piece.name} has values too large for {piece.place.dtype}; choose another model.torchDtype")
    raise ModelError(f"{file}: tensor {piece.name} has weights that are NaN or infinite; the file is damaged")


def _every_row(name: str) -> bool:
    return True


def _own_rows(layout: Layout, ranks: Ranks) -> Callable[[str], bool]:
    """Which parameters this data-parallel copy writes: every ``dp``-th; the last stage's copy of a tied embedding is never written."""
    numbers = {name: number for number, name in enumerate(layout.rows)}
    return lambda name: numbers[name] % ranks.dp.size == ranks.dp.rank and (name != EMBEDDING or ranks.is_first_stage)


def _written_names(layout: Layout, hf: HFModel) -> list[str]:
    return [*layout.names(), *(twin for twin in layout.twins.values() if twin in hf.entries)]


def _weight_pieces(chunks: Chunks, weights: Iterable[tuple[str, Tensor]], layout: Layout, hf: HFModel) -> Iterator[tuple[str, Piece]]:
    """The pieces of these weights of the model with their adapters merged; a tied output layer that the source has written out is there again."""
    adapted = {f"{name}.weight": layer for name, layer in lora.adapters(chunks)}
    for name, parameter in weights:
        tensor = lora.merged_weight(adapted[name]) if name in adapted else parameter
        for piece in layout.weight(name, tensor.detach()):
            yield name, piece
            twin = _twin(piece, layout, hf)
            if twin is not None:
                yield name, replace(piece, name=twin)


def _adapter_pieces(chunks: Chunks, layout: Layout, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Piece]]:
    for linear, layer in lora.adapters(chunks):
        name = f"{linear}.weight"
        if wanted(name):
            lora_a, lora_b = _matrices(layer)
            for piece in layout.adapter(linear, lora_a, lora_b):
                yield name, piece


def _matrices(layer: lora.LoraLinear) -> tuple[Tensor, Tensor]:
    lora_a, lora_b = layer.lora_A.weight, layer.lora_B.weight
    assert isinstance(lora_a, Tensor)
    assert isinstance(lora_b, Tensor)
    return lora_a.detach(), lora_b.detach()


def _adapted_linears(chunks: Chunks, layout: Layout, ranks: Ranks) -> list[str]:
    """The linear layers of the whole model that have an adapter, in the model's order; raises ModelError where only some layers of a kind have one."""
    own = [name for name, _ in lora.adapters(chunks)]
    found = [name for stage in transfer.gather(own, parallel_state.get_pipeline_model_parallel_group()) for name in stage]
    kinds = {_leaf(f"{name}.weight") for name in found}
    linears = [name.removesuffix(".weight") for name in layout.rows if name.endswith(".weight") and _leaf(name) in kinds]
    match_names("the adapters of the model", linears, found)
    return linears


def _adapter_specs(chunks: Chunks, linears: Sequence[str], layout: Layout, hf: HFModel) -> list[TensorSpec]:
    lora_a, _ = _matrices(next(iter(lora.adapters(chunks)))[1])
    specs = []
    for name in (name for linear in linears for name in layout.rows[f"{linear}.weight"].hf):
        rows, columns = hf.entries[name].shape
        specs.append(TensorSpec(adapter_name(name, "lora_A"), (lora_a.shape[0], columns), lora_a.dtype))
        specs.append(TensorSpec(adapter_name(name, "lora_B"), (rows, lora_a.shape[0]), lora_a.dtype))
    return specs


def _leaf(name: str) -> str:
    """``q_proj`` of ``model.layers.0.self_attn.q_proj.weight``: the name of the module."""
    return name.split(".")[-2]


def _write_folder(writer: FolderWriter, pieces: Pieces, layout: Layout, ranks: Ranks, texts: Mapping[str, str], copied: Mapping[str, Path]) -> None:
    """Make the folder, write every rank's pieces, list the files in the manifest, give the folder its name."""
    first = ranks.rank == 0
    numbers = {name: number for number, name in enumerate(layout.rows)}
    try:
        agreement.together(lambda: writer.create(texts, copied) if first else None)
        for name, piece in pieces:
            _write(writer, piece, numbers[name], ranks)
        agreement.together(writer.close)
        entries: dict[str, Any] = {}
        for part in agreement.from_every(agreement.together(lambda: writer.seal(ranks.rank, ranks.world_size))):
            entries |= part
        agreement.together(lambda: writer.publish(entries) if first else None)
    except EngineError:
        if first:
            writer.discard()
        raise


def _write(writer: FolderWriter, piece: Piece, number: int, ranks: Ranks) -> None:
    """Write one piece: rows as they lie, columns after an exchange for rows, what all hold alike by one rank in turn."""
    if piece.cut is Cut.COLUMNS:
        row, rows = transfer.columns_to_rows(piece.part(), ranks.tp, parallel_state.get_tensor_model_parallel_group())
        writer.write(piece.name, row, rows)
    elif piece.cut is Cut.ROWS or number % ranks.tp.size == ranks.tp.rank:
        writer.write(piece.name, piece.slices[0].start, piece.part())


def _differing(pieces: Pieces, written: HFModel, expected: Iterable[str]) -> list[str]:
    names = set(written.entries.keys() - set(expected))
    for name, piece in pieces:
        if piece.name not in written.entries or written.entries[piece.name].shape != piece.shape:
            names.add(name)
            continue
        stored = written.read(piece.name, piece.slices)
        if not torch.equal(_bits(stored), _bits(piece.part().to(device="cpu", dtype=stored.dtype))):
            names.add(name)
    return sorted(names)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
