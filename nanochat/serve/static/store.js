// What the browser keeps: settings, and each conversation under a key of its own, so that several tabs can write.
// A conversation is
//   {id, title, created, updated, messages}
// a user message {id, role, content}, an answer {id, role, alternatives: [{parts, stats, error}], chosen}.

const CONVERSATION = "nanochat.conversation.";
const SETTINGS = "nanochat.settings";
export const MAX_CONVERSATIONS = 200;
const MAX_CHARS = 2000000; // of one conversation: browsers give about five million for all

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

function storedConversations() {
  try {
    const keys = Object.keys(localStorage).filter((key) => key.startsWith(CONVERSATION));
    return keys.map((key) => read(key, null)).filter(isConversation);
  } catch {
    return []; // a private window may refuse storage
  }
}

export class Conversations {
  // onChange(id) is called when another tab changed or removed a conversation, onDrop(conversation) when one gave way.
  constructor(onChange, onDrop) {
    this.all = storedConversations();
    this.onDrop = onDrop;
    addEventListener("storage", ({ key, newValue }) => {
      if (!key?.startsWith(CONVERSATION)) return;
      const id = key.slice(CONVERSATION.length);
      const changed = newValue === null ? null : read(key, null);
      this.all = this.all.filter((one) => one.id !== id);
      if (isConversation(changed)) this.all.push(changed);
      onChange(id);
    });
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

  // Returns whether it is really kept: it may be too long, or the browser may refuse.
  save(conversation) {
    conversation.updated = Date.now();
    if (!conversation.title && conversation.messages.length) {
      conversation.title = titleOf(conversation.messages[0].content);
    }
    return this.#put(conversation);
  }

  remove(id) {
    this.all = this.all.filter((one) => one.id !== id);
    try {
      localStorage.removeItem(CONVERSATION + id);
    } catch { /* a private window kept nothing */ }
  }

  // Takes the newest first, as long as nothing that is here has to give way. Returns
  // {taken, refused: [{title, why}], others}: how many, which not, and how many entries were no conversations.
  import(text) {
    const value = JSON.parse(text);
    const entries = Array.isArray(value) ? value : [value];
    const found = entries.filter(isConversation).sort((a, b) => b.updated - a.updated);
    const refused = [];
    for (const one of found) {
      const why = this.#add({ ...one, id: newId() });
      if (why) refused.push({ title: one.title, why });
    }
    return { taken: found.length - refused.length, refused, others: entries.length - found.length };
  }

  // Returns why it was not added: a key of the page's words, or nothing.
  #add(conversation) {
    const text = JSON.stringify(conversation);
    if (text.length > MAX_CHARS) return "importTooLong";
    if (this.all.length >= MAX_CONVERSATIONS) return "importTooMany";
    try {
      localStorage.setItem(CONVERSATION + conversation.id, text);
    } catch {
      return "importNoRoom";
    }
    this.all = [...this.all, conversation];
    return "";
  }

  #put(conversation) {
    this.all = [...this.all.filter((one) => one.id !== conversation.id), conversation];
    while (this.all.length > MAX_CONVERSATIONS) this.#drop(this.#oldest(conversation));
    const text = JSON.stringify(conversation);
    if (text.length > MAX_CHARS) return false;
    for (;;) {
      try {
        localStorage.setItem(CONVERSATION + conversation.id, text);
        return true;
      } catch {
        const oldest = this.#oldest(conversation);
        if (!oldest || read(CONVERSATION + oldest.id, null) === null) return false; // no storage at all
        this.#drop(oldest); // storage is full
      }
    }
  }

  #drop(conversation) {
    this.remove(conversation.id);
    this.onDrop(conversation);
  }

  #oldest(butFor) {
    return this.list().findLast((one) => one.id !== butFor.id);
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

// What a screen reader says of an answer.
export const spokenText = (parts) =>
  parts.map((part) => (part.type === "python_output" ? ` = ${part.text} ` : part.text)).join("");

function searchText(conversation) {
  return [conversation.title, ...conversation.messages.map(textOf)].join("\n").toLowerCase();
}

const hasFailed = (message) => message?.role === "assistant" && answerOf(message).error && !answerOf(message).parts.length;

// The conversation as the server wants it, without questions that only failed: a refused one would fail every later one.
export const asMessages = (messages) => messages.filter(
  (message, index) => !hasFailed(message) && !hasFailed(messages[index + 1]),
).map((message) => (
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
