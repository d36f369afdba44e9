"""Downloads against a server that speaks the hub's HTTP: every fault ends in the right file or a clear error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat import download
from nanochat.common import UserError, hash_file
from nanochat.download import Facts, fetch, get_json
from tests.hub_server import HubServer, serving

ROOT = Path(__file__).parents[1]
BODY = bytes(range(256)) * 12_000  # 3 MB: several chunks
PATH = "/store/file"
LINK = "/datasets/o/n/resolve/main/file"


@pytest.fixture
def server():
    with serving() as server:
        server.offer("o/n", {"file": BODY})
        yield server


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "BACKOFF_S", 0.0)
    for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def ranges(server: HubServer) -> list[str]:
    """The Range headers that the store got, empty where there was none."""
    return [headers.get("Range", "") for headers in server.headers[PATH]]


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "faults",
    [
        [], ["429", "503"], ["cut"], ["cut", "500", "cut", "cut", "cut", "cut", "cut"], ["wrong"], ["cut", "wrong"],
        ["cut", "whole"], ["cut", "shifted"], ["nolength"], ["408", "cut", "nolength"],
    ],
    ids=lambda faults: "-".join(faults) or "none",
)  # fmt: skip
@pytest.mark.parametrize("has_etags", [True, False], ids=["etags", "no-etags"])
def test_passing_faults_end_in_the_right_file(server, tmp_path, faults, has_etags):
    server.faults[PATH] = list(faults)
    server.has_etags = has_etags
    facts = fetch(server.url + LINK, tmp_path / "file", Facts(len(BODY), hash_file_of(BODY)))
    assert (tmp_path / "file").read_bytes() == BODY
    assert facts == Facts(len(BODY), hash_file_of(BODY))
    assert leftovers(tmp_path) == ["file"]


def hash_file_of(body: bytes) -> str:
    from hashlib import sha256

    return sha256(body).hexdigest()


def test_the_hub_says_size_and_hash_of_what_nothing_is_known_of(server, tmp_path):
    server.faults[PATH] = ["wrong", "nolength"]
    assert fetch(server.url + LINK, tmp_path / "file") == Facts(len(BODY), hash_file_of(BODY))
    assert (tmp_path / "file").read_bytes() == BODY and server.hits[PATH] == 2


def test_dropped_connections_are_continued_not_started_again(server, tmp_path):
    server.faults[PATH] = ["cut", "cut"]
    told: list[int] = []
    fetch(server.url + LINK, tmp_path / "file", on_bytes=told.append)
    first, *later = ranges(server)
    starts = [int(text.removeprefix("bytes=").removesuffix("-")) for text in later]
    assert first == "" and len(starts) == 2
    assert 0 <= len(BODY) // 2 - starts[0] < 1 << 16 and starts[1] > starts[0]
    assert told == sorted(told) and told[-1] == len(BODY)


@pytest.mark.parametrize("fault", ["404", "401", "403", "410"])
def test_a_refusal_is_said_at_once(server, tmp_path, fault):
    server.faults[LINK] = [fault] * 9
    with pytest.raises(UserError, match=rf"cannot download http.*: the server answered {fault}"):
        fetch(server.url + LINK, tmp_path / "file")
    assert server.hits[LINK] == 1 and leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("503", "answered 503"),
        ("429", "answered 429; try later"),
        ("wrong", r"SHA-256 is \w+\.\.\. instead of"),
    ],
)
def test_lasting_faults_are_given_up(server, tmp_path, fault, problem):
    server.faults[PATH] = [fault] * 99
    with pytest.raises(UserError, match=problem):
        fetch(server.url + LINK, tmp_path / "file")
    assert server.hits[PATH] == download.ATTEMPTS and leftovers(tmp_path) == []


def test_a_server_that_always_drops_still_delivers_in_the_end_or_keeps_the_part(server, tmp_path):
    """Every attempt halves what is missing; near the end nothing new comes and it is given up, then goes on."""
    server.faults[PATH] = ["cut"] * 99
    with pytest.raises(UserError, match="cannot download"):
        fetch(server.url + LINK, tmp_path / "file")
    assert leftovers(tmp_path) == [".file.part", ".file.part.etag"], "nothing under the name itself"
    server.faults.clear()
    fetch(server.url + LINK, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY and ranges(server)[-1] != ""


def test_a_part_of_an_older_file_is_not_continued(server, tmp_path):
    server.faults[PATH] = ["cut", "404"]
    with pytest.raises(UserError):
        fetch(server.url + LINK, tmp_path / "file")
    newer = BODY[::-1]
    server.offer("o/n", {"file": newer})
    fetch(server.url + LINK, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == newer and ranges(server)[-1] != ""


@pytest.mark.parametrize("rest", [b"", b"longer than the file"])
def test_a_part_that_is_whole_or_too_long(server, tmp_path, rest):
    (tmp_path / ".file.part").write_bytes(BODY + rest)
    fetch(server.url + LINK, tmp_path / "file", Facts(len(BODY), hash_file_of(BODY)))
    assert (tmp_path / "file").read_bytes() == BODY and leftovers(tmp_path) == ["file"]
    assert server.hits[PATH] == (2 if rest else 0)


def test_an_unverifiable_part_is_thrown_away(server, tmp_path):
    server.has_etags = server.has_links = False
    (tmp_path / ".file.part").write_bytes(b"who knows")
    fetch(server.url + LINK, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY and ranges(server) == [""]


def test_killed_processes_continue(server, tmp_path):
    """SIGKILL in the middle of a download, twice; the third process asks for the rest only."""
    server.faults[PATH] = ["stall", "stall"]
    code = (
        "import sys; from pathlib import Path; from nanochat.download import fetch, locked\n"
        "path = Path(sys.argv[2])\n"
        "with locked(path): fetch(sys.argv[1], path)"
    )
    command = [sys.executable, "-c", code, server.url + LINK, str(tmp_path / "file")]
    part = tmp_path / ".file.part"
    least = 0
    for _ in range(2):
        process = subprocess.Popen(command, cwd=ROOT)
        deadline = time.monotonic() + 60
        while not (part.exists() and part.stat().st_size > least):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "file").exists()
        least = part.stat().st_size
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    assert (tmp_path / "file").read_bytes() == BODY
    asked = [int(text.removeprefix("bytes=").removesuffix("-")) for text in ranges(server)[1:]]
    assert 0 < asked[0] < asked[1] and len(ranges(server)) == 3


def test_offline_is_said_and_nothing_is_asked(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set, but .* is not here yet"):
        fetch(server.url + LINK, tmp_path / "file")
    assert not server.hits


def test_nobody_listening(tmp_path):
    with pytest.raises(UserError, match="ConnectionError; is the network reachable"):
        fetch("http://127.0.0.1:9/file", tmp_path / "file")


def test_the_token_goes_to_the_hub_only(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.files["/elsewhere"] = b"x"
    fetch(f"{server.url}/elsewhere", tmp_path / "a")
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/")
    fetch(server.url + LINK, tmp_path / "b")
    assert "Authorization" not in server.headers["/elsewhere"][0]
    assert server.headers[LINK][0]["Authorization"] == "Bearer hf_secret"


def test_a_full_disk_is_said_before_the_bytes_come(server, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 1000))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"0\.0 GB free, but 0\.0 GB are to come"):
        fetch(server.url + LINK, tmp_path / "file")
    assert leftovers(tmp_path) == []


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="mounting a small disk needs root on Linux"
)
def test_a_disk_that_fills_up(server, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("this system does not allow mounting")
    try:
        server.faults[PATH] = ["nolength"]
        server.has_links = False  # so that nobody knows that it will not fit
        with pytest.raises(UserError, match=r"cannot write .*No space left"):
            fetch(server.url + LINK, folder / "file")
        assert not (folder / "file").exists()
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_pause_that_the_server_asks_for(monkeypatch):
    import requests

    response = requests.Response()
    response.headers["Retry-After"] = "7"
    assert download._asked_wait(requests.HTTPError(response=response)) == 7.0
    response.headers["Retry-After"] = "86400"
    assert download._asked_wait(requests.HTTPError(response=response)) == download.LONGEST_WAIT_S
    assert download._asked_wait(requests.ConnectionError()) == 0.0


def test_lists_come_in_pages(server):
    server.offer("o/n", {f"{i}": b"x" for i in range(6)})
    server.faults["/api/datasets/o/n/tree/main"] = ["", "503"]
    entries = get_json(f"{server.url}/api/datasets/o/n/tree/main")
    assert [entry["path"] for entry in entries] == [".gitattributes", "0", "1", "2", "3", "4", "5"]
    assert get_json(f"{server.url}/nowhere", missing=[]) == []
    server.files["/text"] = b"<html>"
    with pytest.raises(UserError, match="the answer is not JSON"):
        get_json(f"{server.url}/text")


def test_hashes(tmp_path):
    (tmp_path / "a").write_bytes(BODY)
    assert hash_file(tmp_path / "a") == hash_file_of(BODY)
    assert (
        Facts().problem(tmp_path / "a") == Facts(len(BODY), hash_file_of(BODY)).problem(tmp_path / "a") == ""
    )
    assert "3,072,000 bytes instead of 3" in Facts(3).problem(tmp_path / "a")
