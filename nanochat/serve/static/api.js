// The server as the page sees it.

import { serverEvents } from "./sse.js";

const KEY = "nanochat.key";

export class ServerError extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

function headers() {
  const key = sessionStorage.getItem(KEY);
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

export async function getConfig() {
  const response = await fetch("config");
  if (!response.ok) throw await asError(response);
  return response.json();
}

export async function isReady() {
  return (await fetch("ready")).ok;
}

// Yields the events of POST /chat/completions in its full dialect.
export async function* complete(body, signal) {
  const request = { method: "POST", headers: headers(), body: JSON.stringify({ ...body, events: "full" }), signal };
  const response = await fetch("chat/completions", request);
  if (!response.ok) throw await asError(response);
  let finished = false;
  for await (const event of serverEvents(response.body)) {
    if (event.error) throw new ServerError(response.status, event.error.message, event.error.code);
    finished ||= Boolean(event.done);
    yield event;
  }
  if (!finished) throw new ServerError(0, "the connection broke before the answer was complete", "broken");
}

async function asError(response) {
  let detail = response.statusText;
  let code = "";
  try {
    const body = await response.json();
    code = body.code || "";
    detail = typeof body.detail === "string" ? body.detail : body.detail.map((one) => one.msg).join("; ");
  } catch { /* not from our server; the status says what there is to say */ }
  return new ServerError(response.status, `${detail} (HTTP ${response.status})`, code);
}
