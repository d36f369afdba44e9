"""Conversations that the server keeps: one SQLite table, in memory or in a file."""

from __future__ import annotations

import json
import sqlite3
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from nanochat.serve.errors import ApiError

_SCHEMA = """
create table if not exists sessions (
    id text primary key, owner text not null, title text not null, system text, params text not null,
    messages text not null, created real not null, updated real not null
);
create index if not exists sessions_by_age on sessions (updated);
"""
TITLE_CHARS = 60


@dataclass(slots=True)
class Session:
    """A conversation with its settings. Times are unix seconds."""

    id: str
    owner: str
    title: str = ""
    system: str | None = None
    params: dict = field(default_factory=dict)
    messages: list[dict] = field(default_factory=list)
    created: float = field(default_factory=time.time)
    updated: float = field(default_factory=time.time)

    def public(self) -> dict:
        """What its owner may see."""
        body = asdict(self)
        del body["owner"]
        return body


class SessionStore:
    """Sessions by id and owner. Idle ones expire after ttl_s; beyond max_sessions the oldest goes."""

    def __init__(self, path: str, ttl_s: float, max_sessions: int) -> None:
        self._ttl_s, self._max_sessions = ttl_s, max_sessions
        self._busy: set[str] = set()
        self._db = sqlite3.connect(path or ":memory:", check_same_thread=False, isolation_level=None)
        self._db.execute("pragma journal_mode=wal")
        self._db.execute("pragma synchronous=normal")
        self._db.executescript(_SCHEMA)

    def __len__(self) -> int:
        return self._db.execute("select count(*) from sessions").fetchone()[0]

    def create(
        self, owner: str, title: str = "", system: str | None = None, params: dict | None = None
    ) -> Session:
        """A new, empty session."""
        session = Session(uuid.uuid4().hex, owner, title, system, params or {})
        self.save(session)
        return session

    def get(self, session_id: str, owner: str) -> Session:
        """The session; 404 for an unknown or expired one, or one of somebody else."""
        self._expire()
        session_id = session_id.encode("utf-8", "replace").decode()  # lone surrogates are no text for SQLite
        row = self._db.execute(
            "select * from sessions where id = ? and owner = ?", (session_id, owner)
        ).fetchone()
        if row is None:
            raise ApiError(404, "session_not_found", f"there is no session {session_id[:64]!r}")
        number, whose, title, system, params, messages, created, updated = row
        return Session(
            number, whose, title, system, json.loads(params), json.loads(messages), created, updated
        )

    def list(self, owner: str, limit: int, before: float | None) -> list[dict]:
        """Summaries, most recently used first."""
        self._expire()
        rows = self._db.execute(
            "select id, title, created, updated, json_array_length(messages) from sessions"
            " where owner = ? and updated < ? order by updated desc limit ?",
            (owner, before if before is not None else float("inf"), limit),
        )
        names = ("id", "title", "created", "updated", "message_count")
        return [dict(zip(names, row, strict=True)) for row in rows]

    def save(self, session: Session) -> None:
        """Write a session, titled by its first message if it has no title."""
        session.updated = time.time()
        if not session.title and session.messages:
            session.title = " ".join(str(session.messages[0]["content"]).split())[:TITLE_CHARS]
        self._db.execute(
            "insert or replace into sessions values (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                session.id, session.owner, session.title, session.system, json.dumps(session.params),
                json.dumps(session.messages), session.created, session.updated,
            ),
        )  # fmt: skip
        self._expire()

    def delete(self, session_id: str, owner: str) -> None:
        """Forget a session; 404 if there is none."""
        self.get(session_id, owner)
        self._db.execute("delete from sessions where id = ?", (session_id,))

    @contextmanager
    def in_use(self, session_id: str) -> Iterator[None]:
        """One generation at a time per session; 409 for a second."""
        if session_id in self._busy:
            raise ApiError(409, "session_busy", "this session is answering another message")
        self._busy.add(session_id)
        try:
            yield
        finally:
            self._busy.discard(session_id)

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def _expire(self) -> None:
        self._db.execute("delete from sessions where updated < ?", (time.time() - self._ttl_s,))
        self._db.execute(
            "delete from sessions where id in (select id from sessions order by updated desc limit -1 offset ?)",
            (self._max_sessions,),
        )
