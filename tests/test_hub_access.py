"""Folders come from the hub and go there; what the hub says is one line."""

from __future__ import annotations

from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects

from nanochat.common import UserError
from nanochat.interop import hf_export, hf_import
from nanochat.interop.hub_access import hub_errors
from tests.toy_export import tokenizer, toy_model

BEFORE = (".gitattributes", "model-00001-of-00002.safetensors", "pytorch_model.bin", "old.py", "notes.md")


class Hub:
    """Stands in for HfApi: one repository, as a set of file names."""

    def __init__(self) -> None:
        self.files = set(BEFORE)

    def create_repo(self, repo, private, exist_ok):
        return SimpleNamespace(repo_id=repo)

    def upload_folder(self, repo_id, folder_path, commit_message, allow_patterns, delete_patterns):
        replaced = set(filter_repo_objects(self.files, allow_patterns=delete_patterns)) - {".gitattributes"}
        new = {path.name for path in folder_path.iterdir()}
        self.files = (self.files - replaced) | set(filter_repo_objects(new, allow_patterns=allow_patterns))


@pytest.mark.parametrize(("name", "shard_bytes"), [("ungrouped", 50_000), ("all features", 10**9)])
def test_a_pushed_repository_holds_this_model_and_no_other(tmp_path, name, shard_bytes, monkeypatch):
    hub, folder = Hub(), tmp_path / "model"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    hf_export.export_folder(
        toy_model(name), tokenizer(), folder, "# card\n", is_chat=True, shard_bytes=shard_bytes
    )
    wanted = {path.name for path in folder.iterdir()}
    (folder / "private.txt").write_text("")  # not the model's
    hf_export.push(folder, "me/model", True)
    assert hub.files == wanted | {".gitattributes", "notes.md"}


def answer(status: int, text: str = ""):
    response = SimpleNamespace(headers={}, status_code=status, request=None)
    return HfHubHTTPError(text, response=response)  # pyright: ignore


def test_what_the_hub_says_is_one_line_with_the_reason():
    long = "404 Client Error. (Request ID: Root=1-2;3)\n\nRepository Not Found for url: https://x/y.\nPlease make sure"
    cases = [
        (answer(404, long), "no: 404 Client Error. Repository Not Found for url: https://x/y."),
        (answer(403, "Forbidden"), "no: Forbidden (set HF_TOKEN or run: hf auth login)"),
        (answer(500), "no: HfHubHTTPError"),
        (LocalTokenNotFoundError("no token"), "no: no token (set HF_TOKEN or run: hf auth login)"),
        (HFValidationError("bad name"), "no: bad name"),
        (OSError(""), "no: OSError"),
    ]
    for error, line in cases:
        with pytest.raises(UserError) as caught, hub_errors("no"):
            raise error
        assert str(caught.value) == line


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(
        constants, "ENDPOINT", "http://127.0.0.1:9"
    )  # what HF_ENDPOINT sets; nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    actions = [
        lambda: hf_import.fetch("owner/name"),
        lambda: hf_export.check_token("me/model"),
        lambda: hf_export.push(tmp_path, "me/model", True),
    ]
    for action in actions:
        with pytest.raises(UserError, match=r"cannot (download|push to) .*: .*(refused|onnect)") as caught:
            action()
        assert "\n" not in str(caught.value) and "HF_TOKEN" not in str(caught.value)
    with pytest.raises(UserError, match="cannot push to me/a/b"):
        hf_export.check_token("me/a/b")


def test_only_models_of_the_hub_have_revisions(tmp_path):
    assert hf_import.fetch(str(tmp_path)) == (tmp_path, None)
    with pytest.raises(UserError, match=r"--revision=v1: .* is a folder"):
        hf_import.fetch(str(tmp_path), "v1")


def test_a_download_takes_what_is_needed_and_knows_its_commit(monkeypatch):
    offered = [
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "x/model.safetensors",
        "adapter.safetensors",
    ]
    asked = []

    def download(name, revision, allow_patterns):
        asked.extend(filter_repo_objects(offered, allow_patterns=allow_patterns))
        return "/cache/models--owner--name/snapshots/abc123"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder, commit = hf_import.fetch("owner/name", "main")
    assert (folder.name, commit) == ("abc123", "abc123") and asked == offered[:2]


def test_names_that_are_neither_folder_nor_model(tmp_path):
    with pytest.raises(UserError, match="neither a folder"):
        hf_import.fetch(str(tmp_path / "nowhere"))
