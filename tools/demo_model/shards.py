"""Tokenized training data: worker processes write shards, the trainer packs them into batches.

A shard holds whole documents: `ids` [n], `trained` [n], `lengths` [documents].
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from tools.demo_model.documents import training_document

MAX_DOCUMENT = 1536


def encode_documents(
    tokenizer: Tokenizer, rng: random.Random, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, trained and lengths of `count` documents; longer ones than MAX_DOCUMENT are left out."""
    documents = [training_document(rng) for _ in range(count)]
    texts = [text for document in documents for text, _ in document]
    encoded = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    ids: list[int] = []
    trained: list[bool] = []
    lengths: list[int] = []
    for document in documents:
        parts = [(next(encoded).ids, flag) for _, flag in document]
        length = sum(len(part) for part, _ in parts)
        if length > MAX_DOCUMENT:
            continue
        for part, flag in parts:
            ids += part
            trained += [flag] * len(part)
        lengths.append(length)
    return np.array(ids, np.uint16), np.array(trained, np.bool_), np.array(lengths, np.int32)


def _work(tokenizer_path: str, directory: str, seed: int, worker: int, shard_size: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_file(tokenizer_path)
    parent, number = os.getppid(), 0
    while os.getppid() == parent:  # ends with the trainer
        rng = random.Random(f"shard {seed} {worker} {number}")
        ids, trained, lengths = encode_documents(tokenizer, rng, shard_size)
        temporary = Path(directory) / f"{worker:02}-{number:05}.tmp"
        with temporary.open("wb") as file:
            np.savez(file, ids=ids, trained=trained, lengths=lengths)
        temporary.rename(temporary.with_suffix(".npz"))
        number += 1


def start_workers(
    tokenizer_path: Path, directory: Path, seed: int, count: int, shard_size: int
) -> list[multiprocessing.process.BaseProcess]:
    """Processes that write shards until they are terminated."""
    directory.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    workers = []
    for worker in range(count):
        arguments = (str(tokenizer_path), str(directory), seed, worker, shard_size)
        process = context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        workers.append(process)
    return workers


def _shards(directory: Path, rng: random.Random) -> Iterator[Path]:
    """New shards as they appear; an old one again while there is no new one."""
    seen: list[Path] = []
    known: set[Path] = set()
    while True:
        fresh = sorted(set(directory.glob("*.npz")) - known, key=lambda path: path.name[3:])
        known.update(fresh)
        seen += fresh
        yield from fresh
        if not fresh and len(seen) >= 8:
            yield rng.choice(seen)
        elif not fresh:
            time.sleep(0.2)


Batch = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def batches(directory: Path, tokens: int, seed: int) -> Iterator[Batch]:
    """ids, positions, labels [tokens] (label -100: no loss) and cu_lens, forever.

    Documents are whole; what is left of a batch is filled with padding as a document of its own.
    """
    rng = random.Random(seed)
    for path in _shards(directory, rng):
        with np.load(path) as file:
            ids, trained, lengths = file["ids"], file["trained"], file["lengths"]
        ends = np.cumsum(lengths)
        labels = np.full(len(ids), -100, np.int64)
        labels[:-1] = np.where(trained[1:], ids[1:].astype(np.int64), -100)
        labels[ends - 1] = -100
        first = 0
        while True:
            start = ends[first] - lengths[first]
            last = int(np.searchsorted(ends, start + tokens, side="right"))
            if last >= len(ends):
                break  # the rest of the shard does not fill a batch
            yield _pack(ids, labels, ends, first, last, tokens)
            first = last


def _pack(
    ids: np.ndarray, labels: np.ndarray, ends: np.ndarray, first: int, last: int, tokens: int
) -> Batch:
    start = int(ends[first - 1]) if first else 0
    used = int(ends[last - 1]) - start
    cu = np.concatenate([[0], ends[first:last] - start, [tokens] if used < tokens else []])
    out_ids = np.zeros(tokens, np.int64)
    out_ids[:used] = ids[start : start + used]
    out_labels = np.full(tokens, -100, np.int64)
    out_labels[:used] = labels[start : start + used]
    lens = np.diff(cu).astype(np.int64)
    positions = np.arange(tokens) - np.repeat(cu[:-1].astype(np.int64), lens)
    return out_ids, positions, out_labels, cu.astype(np.int32)
