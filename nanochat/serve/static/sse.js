// Server-sent events from a fetch response: bytes may be cut anywhere, in characters and in lines.

export async function* serverEvents(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      buffer += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const events = buffer.replaceAll("\r\n", "\n").split("\n\n");
      buffer = events.pop();
      for (const event of events) {
        const data = eventData(event);
        if (data !== "") yield JSON.parse(data);
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function eventData(event) {
  return event.split("\n")
    .filter((line) => line.startsWith("data:"))
    .map((line) => line.slice(line[5] === " " ? 6 : 5))
    .join("\n");
}
