// What the browser keeps: conversations and settings. A conversation is
//   {id, title, created, updated, messages}
// a user message {id, role, content}, an answer {id, role, alternatives: [{parts, stats, error}], chosen}.

const CONVERSATIONS = "nanochat.conversations";
const SETTINGS = "nanochat.settings";
const MAX_CONVERSATIONS = 200;

export const newId = () => crypto.getRandomValues(new Uint32Array(3)).reduce((id, n) => id + n.toString(36), "");

function read(key, fallback) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? fallback;
  } catch {
    return fallback;
  }
}

export const loadSettings = () => read(SETTINGS, {});

export function saveSettings(settings) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
  } catch { /* a private window: settings last as long as the page */ }
}

export class Conversations {
  constructor() {
    this.all = read(CONVERSATIONS, []).filter(isConversation);
  }

  create() {
    const now = Date.now();
    return { id: newId(), title: "", created: now, updated: now, messages: [] };
  }

  find(id) {
    return this.all.find((one) => one.id === id);
  }

  // Newest first; the words of a search must all occur in title or text.
  list(query = "") {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    const matches = (one) => words.every((word) => searchText(one).includes(word));
    return this.all.filter(matches).sort((a, b) => b.updated - a.updated);
  }

  save(conversation) {
    conversation.updated = Date.now();
    if (!conversation.title && conversation.messages.length) {
      conversation.title = titleOf(conversation.messages[0].content);
    }
    if (!this.find(conversation.id)) this.all.push(conversation);
    this.#write();
  }

  remove(id) {
    this.all = this.all.filter((one) => one.id !== id);
    this.#write();
  }

  // Returns how many were taken; what does not look like a conversation is left out.
  import(text) {
    const value = JSON.parse(text);
    const found = (Array.isArray(value) ? value : [value]).filter(isConversation);
    for (const one of found) this.all.push({ ...one, id: newId() });
    this.#write();
    return found.length;
  }

  #write() {
    this.all.sort((a, b) => b.updated - a.updated);
    this.all.length = Math.min(this.all.length, MAX_CONVERSATIONS);
    for (;;) {
      try {
        localStorage.setItem(CONVERSATIONS, JSON.stringify(this.all));
        return;
      } catch {
        if (this.all.length < 2) return; // no storage at all: the page still works
        this.all.pop(); // storage is full: the oldest goes
      }
    }
  }
}

const isText = (value) => typeof value === "string";
const isPart = (part) => part && isText(part.type) && isText(part.text);
const isAlternative = (one) => one && Array.isArray(one.parts) && one.parts.every(isPart);

function isMessage(message) {
  if (!message || !isText(message.id)) return false;
  if (message.role === "user") return isText(message.content);
  return message.role === "assistant" && Number.isInteger(message.chosen)
    && Array.isArray(message.alternatives) && message.alternatives.every(isAlternative)
    && Boolean(message.alternatives[message.chosen]);
}

const isConversation = (one) => Boolean(one) && isText(one.id) && isText(one.title)
  && Number.isFinite(one.updated) && Array.isArray(one.messages) && one.messages.every(isMessage);

export const titleOf = (text) => text.trim().replace(/\s+/g, " ").slice(0, 60);

export const answerOf = (message) => message.alternatives[message.chosen];

export const textOf = (message) =>
  message.role === "user" ? message.content : plainText(answerOf(message).parts);

export const plainText = (parts) =>
  parts.filter((part) => part.type === "text").map((part) => part.text).join("");

function searchText(conversation) {
  return [conversation.title, ...conversation.messages.map(textOf)].join("\n").toLowerCase();
}

// The conversation as the server wants it.
export const asMessages = (messages) => messages.map((message) => (
  message.role === "user" ? { role: "user", content: message.content }
    : { role: "assistant", content: answerOf(message).parts }
));

export function asMarkdown(conversation) {
  const lines = [`# ${conversation.title || "nanochat"}`];
  for (const message of conversation.messages) {
    lines.push(message.role === "user" ? "**User**" : "**Assistant**");
    lines.push(message.role === "user" ? message.content : answerOf(message).parts.map(partMarkdown).join(""));
  }
  return `${lines.join("\n\n")}\n`;
}

const partMarkdown = (part) => {
  if (part.type === "text") return part.text;
  return part.type === "python" ? `\`${part.text}\`` : ` = \`${part.text}\``;
};
