"""Mixtures of pretraining sets: exact shares, a fixed order, and a state that continues exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nanochat.common import UserError
from nanochat.dataloader import PretrainLoader
from tests.toy_data import ByteTokenizer, make_world, write_shard

LENGTH = 16


@pytest.fixture
def sets(tmp_path, monkeypatch) -> Path:
    """Two imported sets whose texts can be told apart, mixed 3 to 1; the smaller one is read several times."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_DATA", "hub")
    monkeypatch.setenv("NANOCHAT_DATASET", "lower:3,upper:1")
    for name, first, count in (("lower", "a", 200), ("upper", "A", 40)):
        texts = [chr(ord(first) + i % 26) * (1 + i * 7 % 23) for i in range(count)]
        folder = tmp_path / "imported_data" / name
        write_shard(folder / "shard_00000.parquet", [texts[:90], texts[90:]] if count > 90 else [texts])
        write_shard(folder / "shard_00001.parquet", [texts[:30]])
    return tmp_path


def make_loader(batch_size: int = 2, **options) -> PretrainLoader:
    return PretrainLoader(
        ByteTokenizer(), batch_size, LENGTH, options.pop("split", "train"), make_world(), **options
    )


def rows(loader: PretrainLoader, count: int) -> list[torch.Tensor]:
    """The next rows, inputs and last target."""
    found: list[torch.Tensor] = []
    while len(found) < count:
        inputs, targets = next(loader)
        found += torch.cat([inputs, targets[:, -1:]], dim=1)
    return found[:count]


def is_upper(row: torch.Tensor) -> bool:
    letters = [chr(token - 1) for token in row.tolist() if token > 0]
    assert letters and len({letter.isupper() for letter in letters}) == 1, "a row holds text of one set only"
    return letters[0].isupper()


@pytest.mark.parametrize("packing", ["bestfit", "stream"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_rows_come_in_their_shares_at_every_moment(sets, packing, split):
    loader = make_loader(packing=packing, split=split)
    upper = [is_upper(row) for row in rows(loader, 200)]
    for count in range(1, 201):
        assert abs(sum(upper[:count]) - count / 4) < 1
    assert loader.stats()["rows"] >= 200 and len(loader.state_dict()["sets"]) == 2
    loader.close()


@pytest.mark.parametrize("packing", ["bestfit", "stream"])
@pytest.mark.parametrize(("before", "batch_size"), [(1, 2), (5, 4), (37, 1)])
def test_the_state_continues_exactly(sets, packing, before, batch_size):
    """Also with another batch size, through JSON, in the middle of documents and after several epochs."""
    whole = make_loader(packing=packing)
    expected = rows(whole, 2 * before + 60)[2 * before :]
    whole.close()
    first = make_loader(packing=packing)
    rows(first, 2 * before)
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    second = make_loader(batch_size, packing=packing, state=state)
    assert second.state_dict() == state
    for found, wanted in zip(rows(second, 60), expected, strict=True):
        assert torch.equal(found, wanted)
    second.close()


def test_another_mixture_does_not_continue(sets, monkeypatch):
    loader = make_loader()
    rows(loader, 2)
    state = loader.state_dict()
    loader.close()
    for other in ("lower:2,upper:1", "upper:1,lower:3", "lower"):
        monkeypatch.setenv("NANOCHAT_DATASET", other)
        with pytest.raises(UserError, match=r"cannot resume the data: mixture was \[\['lower', 0.75\]"):
            make_loader(state=state)


def test_one_set_with_a_weight_is_that_set(sets, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DATASET", "upper:5")
    loader = make_loader()
    assert all(map(is_upper, rows(loader, 20)))
    assert "mixture" not in loader.state_dict() and "sets" not in loader.state_dict()
    loader.close()
