"""Long documents in parts: the carried state makes the parts add up to the whole document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from train.training_helpers import tiny_run

from megalodon_deploy.train.config import TrainConfig
from megalodon_deploy.train.data.rows import NO_TARGET, Batch, split
from megalodon_deploy.train.data.tokens import open_tokens
from megalodon_deploy.train.plan import OneProcess
from megalodon_deploy.train.trainer import Trainer


def make_trainer(tmp_path: Path, **settings: Any) -> Trainer:
    """Six documents of 1 to 200 bytes."""
    folder = tmp_path / "texts"
    folder.mkdir(exist_ok=True)
    for index, length in enumerate((1, 30, 49, 97, 130, 200)):
        (folder / f"{index}.txt").write_text("".join(chr(33 + (7 * index + i * i) % 90) for i in range(length)))
    values = {"data__paths": [str(folder)], "data__rows": "streams", "data__held_out_fraction": 0, **settings}
    config: TrainConfig = tiny_run(tmp_path, run__batch_size=3, **values)
    parts = split(open_tokens(config.data, lambda stage, fraction: None), 0)
    trainer = Trainer(config, *parts, OneProcess(torch.device("cpu")))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return trainer


def document_of(trainer: Trainer, batch: Batch, row: int) -> tuple[int, ...]:
    """The whole document that begins in this row."""
    part = trainer.rows.part  # type: ignore[attr-defined]
    documents = [part.joined(int(part.length[:i].sum()), int(n)) for i, n in enumerate(part.length) if n > 1]
    first = batch.tokens[row, : int((batch.targets[row] != NO_TARGET).sum())]
    (match,) = [document for document in documents if document[: len(first)].tolist() == first.tolist()]
    return tuple(match.tolist())


@pytest.mark.parametrize(("seq_len", "micro"), [(48, 3), (24, 2), (12, 3), (8, 1)])  # chunks of 24
def test_the_parts_of_a_document_add_up(tmp_path: Path, seq_len: int, micro: int) -> None:
    trainer = make_trainer(tmp_path, run__seq_len=seq_len, run__micro_batch_size=micro)
    reading: list[tuple[tuple[int, ...], float]] = [((), 0.0)] * 3  # of each row: its document, loss so far
    finished: list[tuple[tuple[int, ...], float]] = []
    with torch.no_grad():
        for _ in range(60):
            batch = trainer.rows.next(slice(0, 3))
            assert batch.fresh is not None
            for row in np.flatnonzero(batch.fresh):
                finished.append(reading[row])
                reading[row] = (document_of(trainer, batch, int(row)), 0.0)
            for index, (begin, end) in enumerate(trainer._micro_ranges()):
                for row, loss in enumerate(row_losses(trainer, batch.part(begin, end), index), begin):
                    document, before = reading[row]
                    reading[row] = (document, before + loss)
        assert len({document for document, _ in finished if document}) == 5
        for document, loss in finished[3:]:
            tokens = torch.tensor([document])
            logits, _ = trainer.model(tokens[:, :-1])
            expected = functional.cross_entropy(logits[0], tokens[0, 1:], reduction="sum").item()
            assert loss == pytest.approx(expected, rel=1e-4)


def row_losses(trainer: Trainer, part: Batch, index: int) -> list[float]:
    """Loss of each row, other rows' targets hidden; the state advances once."""
    before = trainer.states[index]
    losses = []
    for row in range(len(part.tokens)):
        targets = part.targets.copy()
        targets[[other for other in range(len(targets)) if other != row]] = NO_TARGET
        alone = Batch(part.tokens, targets, None, part.fresh, part.num_targets)
        loss, trainer.states[index] = trainer.objective(*trainer.micro_batch(alone, before))
        losses.append(loss.item())
    return losses


def test_gradients_stop_at_the_edge_of_a_part(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, run__seq_len=24)
    for _ in range(3):
        trainer.step()
    (state,) = trainer.states
    assert state is not None
    assert not any(tensor.requires_grad for tensor in state.tensors.values())
    assert (state.position > 0).all()
    assert (state.position % 24 == 0).all()
