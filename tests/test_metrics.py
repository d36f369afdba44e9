"""metrics.jsonl: what is written, and what survives a resumed run."""

from __future__ import annotations

import json

from nanochat.metrics import MetricsLog, StatusLine, duration, read_metrics


def test_events_are_json_and_non_finite_is_null(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.log(1, {"train/loss": 2.5, "train/mfu": float("inf")}, kind="train")
        log.log(1, {"val/bpb": float("nan")})
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events] == [1, 1]
    assert events[0]["train/loss"] == 2.5 and events[0]["train/mfu"] is None and events[1]["val/bpb"] is None


def test_resuming_drops_what_happened_after_the_checkpoint(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.log(step, {"train/loss": 0.0}, kind="train")
            log.log(step, {"val/bpb": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "tra')  # torn by a kill
    with MetricsLog(tmp_path, resume_step=2) as log:
        log.log(2, {"val/bpb": 1.0})
    story = [(event["step"], event["kind"]) for event in read_metrics(tmp_path / "metrics.jsonl")]
    assert story == [(1, "train"), (1, "eval"), (2, "train"), (2, "eval")]


def test_a_fresh_run_starts_a_fresh_file(tmp_path):
    for _ in range(2):
        with MetricsLog(tmp_path) as log:
            log.log(1, {"train/loss": 0.0}, kind="train")
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_other_ranks_write_nothing(tmp_path):
    with MetricsLog(tmp_path / "x", is_main=False) as log:
        log.log(1, {"a": 1})
    assert not (tmp_path / "x").exists()


def test_status_in_a_pipe_is_plain_and_rare(capsys):
    status = StatusLine(every_seconds=60)
    status._last = float("-inf")
    status.show("one")
    status.show("two")
    status.note("kept")
    status.show("last", final=True)
    assert capsys.readouterr().out == "one\nkept\nlast\n"


def test_duration():
    assert [duration(s) for s in (0.4, 59, 61, 3723, 4e5)] == ["0s", "59s", "1m01s", "1h02m", "5 days"]
