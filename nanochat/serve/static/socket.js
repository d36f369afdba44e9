// The other way to the model: one answer over a WebSocket, with the events that server-sent events bring.
// It also tells how many others wait before us.

import { t } from "./i18n.js";

const CODES = { 1008: 401, 1009: 413, 1013: 503 };

// Yields {queued}, {start}, {token}, {tool, text}, {done, ...} or {error, status}; whoever leaves stops the answer.
export async function* socketEvents(body, key, signal) {
  const address = new URL("ws", document.baseURI);
  address.protocol = address.protocol.replace("http", "ws");
  const socket = new WebSocket(address);
  const frames = inbox(socket, signal);
  socket.addEventListener("open", () => {
    if (key) send(socket, { type: "auth", token: key });
    send(socket, { ...body, type: "chat", stateless: true }); // the page keeps the conversation, not the server
  });
  try {
    for await (const frame of frames) {
      const event = asEvent(frame);
      if (event) yield event;
      if (frame.type === "done" || frame.type === "error") return;
    }
  } finally {
    socket.close();
  }
}

const send = (socket, frame) => socket.send(JSON.stringify(frame));

function asEvent({ type, position, phase, ...frame }) {
  if (type === "queued") return { queued: position };
  if (type === "start") return { start: true, ...frame };
  if (type === "tool") return { ...frame, tool: phase };
  return ["token", "done", "error"].includes(type) ? frame : null; // not the greeting
}

// The frames as they come; a socket that closes is an error, and a signal that aborts is one too.
async function* inbox(socket, signal) {
  const waiting = [];
  let wake = () => {};
  let opened = false;
  socket.addEventListener("open", () => { opened = true; });
  const put = (frame) => {
    waiting.push(frame);
    wake();
  };
  socket.addEventListener("message", ({ data }) => put(JSON.parse(data)));
  socket.addEventListener("close", ({ code, reason }) => {
    const message = reason || `${t(opened ? "broken" : "unreached")} (WebSocket, ${code})`;
    put({ type: "error", status: CODES[code] ?? 0, error: { message } });
  });
  signal.addEventListener("abort", () => wake());
  for (;;) {
    while (!waiting.length && !signal.aborted) await new Promise((resolve) => { wake = resolve; });
    signal.throwIfAborted();
    yield waiting.shift();
  }
}
