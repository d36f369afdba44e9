// The server as the page sees it.

import { t } from "./i18n.js";
import { socketEvents } from "./socket.js";
import { serverEvents } from "./sse.js";

const KEY = "nanochat.key";

export class ServerError extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

// Pasted keys bring spaces with them, and a header takes only ASCII: any other key is as wrong as one with a "?".
export function setKey(key) {
  sessionStorage.setItem(KEY, key.trim().replace(/[^!-~]/g, "?"));
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

// Yields the events of an answer, in the full dialect of POST /chat/completions whatever brings them.
export async function* complete(body, signal, transport) {
  let begun = false;
  let finished = false;
  try {
    const events = transport === "websocket"
      ? socketEvents(body, sessionStorage.getItem(KEY), signal) : await posted(body, signal);
    for await (const event of events) {
      if (event.error) throw new ServerError(event.status ?? 200, event.error.message, event.error.code);
      begun = true;
      finished ||= Boolean(event.done);
      yield event;
    }
  } catch (error) {
    if (!(error instanceof TypeError) || signal.aborted) throw error;
    throw new ServerError(0, t(begun ? "broken" : "unreached")); // each browser has other words for it
  }
  if (!finished) throw new ServerError(0, t("broken"));
}

async function posted(body, signal) {
  const request = { method: "POST", headers: headers(), body: JSON.stringify({ ...body, events: "full" }), signal };
  const response = await fetch("chat/completions", request);
  if (!response.ok) throw await asError(response);
  return serverEvents(response.body);
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
