// What a line that starts with a slash does. Nothing of it is sent to the server.

import { t } from "./i18n.js";
import { remark, statsText } from "./messages.js";
import { answerOf } from "./store.js";

const NUMBERS = { temperature: "temperature", topk: "top_k", topp: "top_p", maxtokens: "max_tokens", seed: "seed" };

// Returns the text to send: the line itself, "/text" for "//text", or null when it was a command.
export function readCommand(line, { chat, settings, newConversation, exportConversation }) {
  if (!line.startsWith("/")) return line;
  if (line.startsWith("//")) return line.slice(1);
  const [, word, rest] = /^\/(\S*)\s*([\s\S]*)$/.exec(line);
  const name = word.toLowerCase();
  const simple = {
    help: () => remark(t("help")),
    new: newConversation,
    clear: newConversation,
    retry: () => retry(chat),
    undo: () => chat.undo(),
    export: () => exportConversation(rest.trim()),
    stats: () => remark(lastStats(chat) || t("noStats")),
    system: () => setSystem(settings, rest),
  };
  if (name in NUMBERS) setNumber(settings, name, rest.trim());
  else if (Object.hasOwn(simple, name)) simple[name]();
  else remark(t("unknownCommand", word));
  return null;
}

function setNumber(settings, name, text) {
  const key = NUMBERS[name];
  const { min, max, step } = settings.field(key);
  const value = Number(text);
  const valid = text !== "" && value >= min && value <= max && (step < 1 || Number.isInteger(value));
  if (valid) settings.set(key, value);
  else if (text !== "" && !(key === "seed" && text === "random")) return remark(t("badValue", name, min, max));
  else if (text === "random") settings.set(key, null);
  return remark(t("valueIs", t(key), settings.get(key) ?? t("random")));
}

function setSystem(settings, text) {
  if (text) settings.set("system", text.trim().toLowerCase() === "off" ? "" : text);
  remark(t("valueIs", t("system"), settings.get("system") || "\u2013"));
}

const lastAnswer = (chat) => chat.messages.findLast((message) => message.role === "assistant");

function retry(chat) {
  const message = lastAnswer(chat);
  if (message) chat.regenerate(message);
}

function lastStats(chat) {
  const message = lastAnswer(chat);
  return message ? statsText(answerOf(message)) : "";
}
