"""The data of a run: from the names in ``data.dataset`` to rows of tokens, their order, and the batches of a step.

    sources        names of data sets -> files, built-in sets, the hub        (reads files)
    conversations  the text of a file -> checked conversations                (pure)
    order          which rows, and when: sampling, mixing, epochs, batches    (pure)
    template       conversations -> tokens and labels, by the chat template   (calls the tokenizer)
    rows           rows of tokens: cutting, packing                           (pure)
    batch          rows -> the tensors of a micro batch                       (imports torch when used)

``open_rows`` is the whole way; one process of a node walks it (``reading.py``), and all nodes get the same (``Rows.digest``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetune_trainer.contract import ConfigurationError, DataConfig, DataError
from finetune_trainer.data.batch import Batch, collate
from finetune_trainer.data.conversations import Conversation, with_system
from finetune_trainer.data.order import MIXING, SAMPLING, Order, make_generator, make_interleaving, make_sample, micro_batches, order
from finetune_trainer.data.rows import Row, Rows, check_vocabulary, fit_length, pack
from finetune_trainer.data.sources import Source, find_source, load_source
from finetune_trainer.data.template import encode, load_tokenizer

__all__ = ["Batch", "Order", "Row", "Rows", "check_vocabulary", "collate", "load_tokenizer", "micro_batches", "open_rows", "order"]


def open_rows(config: DataConfig, tokenizer: Any, say: Callable[[str], None] = lambda line: None) -> Rows:
    """Every row of a run, tokenized and labelled, in the order of its data set; raises DataError or ConfigurationError before anything is trained.

    ``config.max_length`` is resolved. Each conversation is tokenized once, however often sampling takes it. ``say`` gets a line now and then while that takes long.
    """
    chosen = _choose(config)
    unique = list({id(conversation): conversation for conversation in chosen}.values())
    encoded = encode(tokenizer, [with_system(conversation, config.system) for conversation in unique], say)
    fitted = {id(conversation): fit_length(row, config.max_length, config.truncation_strategy) for conversation, row in zip(unique, encoded, strict=True)}
    rows = [row for row in (fitted[id(conversation)] for conversation in chosen) if row is not None]
    if not rows:
        shortest = min(len(row) for row in encoded)
        raise DataError(
            f"none of the {len(chosen)} rows can be trained on within data.maxLength ({config.max_length} tokens): the shortest has {shortest} tokens, "
            f"and truncationStrategy is {config.truncation_strategy}"
        )
    counts = {"read": len(chosen), "dropped": len(chosen) - len(rows), "trained": len(rows)}
    return Rows(_packed(rows, config), counts)


def _choose(config: DataConfig) -> list[Conversation]:
    """The conversations of all data sets, sampled and mixed; a set that is named twice is read once and sampled twice."""
    sources = [find_source(text) for text in config.dataset]
    _check_probabilities(config)
    loaded: dict[tuple[str, str, str | None], list[Conversation]] = {}
    samples: list[list[Conversation]] = []
    for number, source in enumerate(sources):
        conversations = _load_once(loaded, source, config)
        generator = make_generator(config.data_seed, SAMPLING, number)
        samples.append([conversations[index] for index in make_sample(len(conversations), source.num_rows, config.dataset_shuffle, generator)])
    return _mix(samples, config)


def _load_once(loaded: dict[tuple[str, str, str | None], list[Conversation]], source: Source, config: DataConfig) -> list[Conversation]:
    key = (source.kind, source.name, source.subset)
    if key not in loaded:
        loaded[key] = load_source(source, config)
    return loaded[key]


def _mix(samples: list[list[Conversation]], config: DataConfig) -> list[Conversation]:
    if config.interleave_prob is None:
        mixed = [conversation for sample in samples for conversation in sample]
    else:
        probabilities = [probability / sum(config.interleave_prob) for probability in config.interleave_prob]
        pairs = make_interleaving([len(sample) for sample in samples], probabilities, config.data_seed, config.stopping_strategy)
        mixed = [samples[source][index] for source, index in pairs]
    if not config.dataset_shuffle:
        return mixed
    return [mixed[index] for index in make_generator(config.data_seed, MIXING).permutation(len(mixed))]


def _check_probabilities(config: DataConfig) -> None:
    probabilities = config.interleave_prob
    if probabilities is None:
        return
    if len(probabilities) != len(config.dataset):
        raise ConfigurationError(f"data.interleaveProb has {len(probabilities)} values, expected one for each of the {len(config.dataset)} data sets")
    if abs(sum(probabilities) - 1) > 1e-6:
        raise ConfigurationError(f"data.interleaveProb sums to {sum(probabilities):g}, expected 1")


def _packed(rows: list[Row], config: DataConfig) -> list[Row]:
    if not config.packing:
        return rows
    if config.max_length is None:
        raise ConfigurationError("data.packing is true, which needs data.maxLength: rows are packed into sequences of that length")
    return pack(rows, config.max_length)
