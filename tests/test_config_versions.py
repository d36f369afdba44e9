"""Every version of the stored configuration can be read, and gives the network that it gave when it was written."""

from __future__ import annotations

import pytest
import torch

from nanochat.checkpoint_manager import Checkpoint, check_files
from nanochat.common import UserError
from nanochat.config_versions import CONFIG_VERSION, read_config, stored_config
from nanochat.network_config import GPTConfig
from tests.checkpoint_fixtures import CONFIGS, FOLDER, STEP, fixture_ids, unpack

# The first four logits of the last token, as the code that wrote the fixture computed them.
FIXTURES = {
    "v1-classic": [-0.6619, -0.42785, 1.27635, 0.23819],
    "v1-modern": [2.34279, -1.22029, 1.39133, -1.88522],
    "v2-classic": [-0.6619, -0.42785, 1.27635, 0.23819],
    "v2-modern": [2.34279, -1.22029, 1.39133, -1.88522],
    "v3-classic": [-0.6619, -0.42785, 1.27635, 0.23819],
    "v3-modern": [2.34279, -1.22029, 1.39133, -1.88522],
}


def test_the_table_is_complete():
    assert {path.name.removesuffix(".tar.gz") for path in FOLDER.glob("*.tar.gz")} == set(FIXTURES)
    assert {f"v{version}-{name}" for version in range(1, CONFIG_VERSION + 1) for name in CONFIGS} == set(
        FIXTURES
    )
    assert all(path.stat().st_size < 10_000 for path in FOLDER.iterdir())


@pytest.mark.parametrize("name", FIXTURES)
def test_old_checkpoints_compute_what_they_did(name, tmp_path):
    folder = unpack(name, tmp_path)
    assert check_files(folder, STEP) is None
    model = Checkpoint.open(folder, STEP).model(torch.device("cpu"), torch.float32)
    found = model(fixture_ids())[0, -1, :4]
    torch.testing.assert_close(found, torch.tensor(FIXTURES[name]), atol=2e-5, rtol=0)


def test_a_configuration_comes_back():
    config = GPTConfig.modern(n_layer=3, window_pattern="SL", rope_dtype="bfloat16")
    assert stored_config(config)["version"] == CONFIG_VERSION
    assert read_config(stored_config(config)) == config


def test_what_cannot_be_read_is_said():
    stored = stored_config(GPTConfig())
    with pytest.raises(UserError, match="version 99 is from a newer"):
        read_config(stored | {"version": 99})
    with pytest.raises(UserError, match=r"unknown settings \['warp'\]"):
        read_config(stored | {"warp": 9})
    impossible = {
        "n_head": 0, "n_embd": "wide", "vocab_size": 2.5, "window_pattern": 3, "rope_dtype": "float8_e4m3fn",
        "logit_softcap": 0, "rope_base": "x", "qk_scale": float("nan"), "short_window_divisor": 0,
        "short_window_multiple": "x", "use_smear": 1, "n_layer": True,
    }  # fmt: skip
    for name, value in impossible.items():
        with pytest.raises(UserError, match=name):
            read_config(stored | {name: value})
    # upstream records sizes only; taking our defaults for the rest would compute another network
    upstream = {"sequence_len": 8, "vocab_size": 8, "n_layer": 1, "n_head": 1, "n_kv_head": 1, "n_embd": 8}
    with pytest.raises(UserError, match=r"lacks .*rope_base.* scripts\.import_upstream"):
        read_config(upstream)
