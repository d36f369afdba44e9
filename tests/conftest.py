"""A small TinyWorld with its tokenizer, made once, for tests that train or evaluate for real."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.browsing import LOOKS, chromium, opened

# Test processes side by side share the cores, and so do the programs that they start: torch's threads would
# wait for each other. Before anything imports torch.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY_CHARS = 300_000
TINY_VOCAB = 512


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_works():
    """A shell starts background jobs with SIGINT ignored, and child processes would inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def a_base_folder_of_their_own(tmp_path_factory):
    """Tests neither see nor touch the runs of whoever starts them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.mktemp("home")))
        patch.delenv("WANDB_RUN", raising=False)  # nor log to their account
        yield


@pytest.fixture
def one_seeded_thread():
    """torch on one thread, from a fixed seed."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """A base folder with TinyWorld data and a tokenizer. Read only: tests copy it (see tiny_run)."""
    from nanochat.dataset import parquets_iter_batched
    from nanochat.tinyworld import generate
    from nanochat.tokenizer import RustBPETokenizer

    base = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        patch.setenv("NANOCHAT_DATA", "tinyworld")
        generate(base / "tinyworld", seed=0, chars=TINY_CHARS)
        texts = (text for batch in parquets_iter_batched("train") for text in batch)
        RustBPETokenizer.train_from_iterator(texts, TINY_VOCAB).save(base / "tokenizer")
    return base


@pytest.fixture
def tiny_run(tiny_base, tmp_path, monkeypatch) -> Path:
    """A base folder of its own for one test: data linked, tokenizer copied, environment set."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "tinyworld").symlink_to(tiny_base / "tinyworld")
    shutil.copytree(tiny_base / "tokenizer", base / "tokenizer")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.setenv("NANOCHAT_DATA", "tinyworld")
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    return base


@pytest.fixture(scope="module")
def browser():
    """A Chromium for the tests of one module. Not longer: its driver holds the thread's event loop."""
    with chromium() as running:
        yield running


@pytest.fixture(params=LOOKS)
def page(request, browser, server):
    """The page of a module's `server`, in every look."""
    with opened(browser, server, request.param) as page:
        yield page


@pytest.fixture
def one_page(browser, server):
    """The page as a desktop shows it, for what does not depend on the look."""
    with opened(browser, server) as page:
        yield page
