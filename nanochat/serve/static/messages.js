// The list of messages: one article each, with a toolbar of what can be done to it.

import { AnswerView } from "./answer.js";
import { button, byId, element, redraw, setIcon } from "./dom.js";
import { t } from "./i18n.js";
import { announce } from "./speech.js";
import { answerOf, textOf } from "./store.js";

// Scored tokens live as long as the page: they are too many to keep.
const scoredTokens = new WeakMap();
// Whether the tokens of an answer are to be seen; the setting decides where nobody chose.
const tokensShown = new WeakMap();
const showsTokens = (alternative, settings) => tokensShown.get(alternative) ?? settings.get("probabilities");
const isScored = (alternative) => Boolean(scoredTokens.get(alternative)?.some(({ scores }) => scores.length));
export function addToken(alternative, text, scores) {
  if (!scoredTokens.has(alternative)) scoredTokens.set(alternative, []);
  const tokens = scoredTokens.get(alternative);
  const last = tokens.at(-1);
  if (last && !last.text) Object.assign(last, { text, scores: [...last.scores, ...scores] });
  else tokens.push({ text, scores });
}

// `actions` are the handlers copy, edit, remove, regenerate, choose(message, index), retry.
export function messageView(message, actions, settings) {
  const node = element("article", `message ${message.role}`);
  node.dataset.id = message.id;
  node.append(element("h3", "visually-hidden", t(message.role === "user" ? "you" : "it")));
  if (message.role === "user") {
    node.append(element("div", "bubble", message.content));
  } else {
    node.answer = new AnswerView({ plain: settings.get("plain") });
    node.append(node.answer.root, element("div", "failure"));
  }
  node.append(element("div", "toolbar"));
  updateMessage(node, message, actions, settings);
  return node;
}

// streaming: false, or {place} in the server's queue.
export function updateMessage(node, message, actions, settings, streaming = false) {
  node.classList.toggle("streaming", Boolean(streaming));
  node.setAttribute("aria-busy", String(Boolean(streaming)));
  if (message.role === "assistant") {
    const alternative = answerOf(message);
    const tokens = isScored(alternative) && showsTokens(alternative, settings) ? scoredTokens.get(alternative) : null;
    node.answer.update(alternative, { streaming, tokens });
    showFailure(node.querySelector(".failure"), alternative.error, message, actions);
  }
  if (!streaming) redraw(node, () => fillToolbar(node, message, actions, settings), byId("input"));
}

function showFailure(node, error, message, actions) {
  node.replaceChildren();
  if (!error) return;
  const again = element("button", "retry", t("retry"));
  again.type = "button";
  again.addEventListener("click", () => actions.retry(message));
  node.append(element("span", "", error), again);
}

function fillToolbar(node, message, actions, settings) {
  const toolbar = node.querySelector(".toolbar");
  const copy = button("copy", t("copy"), async () => {
    await actions.copy(textOf(message));
    announce(t("copied"));
    setIcon(copy, "check");
    setTimeout(() => setIcon(copy, "copy"), 1500);
  });
  if (message.role === "user") {
    toolbar.replaceChildren(
      copy,
      button("edit", t("edit"), () => actions.edit(message)),
      button("trash", t("remove"), () => actions.remove(message)),
    );
    return;
  }
  toolbar.replaceChildren(
    ...alternatives(message, actions),
    copy,
    button("retry", t("regenerate"), () => actions.regenerate(message)),
    ...tokensButton(node, message, actions, settings),
    button("trash", t("remove"), () => actions.remove(message)),
    element("span", "stats", statsText(answerOf(message))),
  );
}

function tokensButton(node, message, actions, settings) {
  const alternative = answerOf(message);
  if (!isScored(alternative)) return [];
  const shown = showsTokens(alternative, settings);
  const toggle = button("bars", t("probabilities"), () => {
    tokensShown.set(alternative, !shown);
    updateMessage(node, message, actions, settings);
  });
  toggle.setAttribute("aria-pressed", String(shown));
  return [toggle];
}

function alternatives(message, actions) {
  const count = message.alternatives.length;
  if (count < 2) return [];
  const left = button("left", t("previous"), () => actions.choose(message, message.chosen - 1));
  const right = button("right", t("next"), () => actions.choose(message, message.chosen + 1));
  left.disabled = message.chosen === 0;
  right.disabled = message.chosen === count - 1;
  return [left, element("span", "count", `${message.chosen + 1}/${count}`), right];
}

export function statsText({ stats }) {
  if (!stats) return "";
  const { usage, timings } = stats;
  const numbers = usage && timings?.tokens_per_second
    ? t("stats", usage.completion_tokens, Math.round(timings.tokens_per_second), Math.round(timings.ttft_ms)) : "";
  const end = { length: t("lengthEnd"), cancelled: t("stopped") }[stats.finish_reason];
  return [numbers, end].filter(Boolean).join(" · ");
}

// A user message turns into a text field; resolves to the new text or null.
export function editInPlace(node, text) {
  const form = element("form", "editor");
  const area = element("textarea");
  area.value = text;
  area.rows = Math.min(8, text.split("\n").length + 1);
  area.setAttribute("aria-label", t("edit"));
  const cancel = element("button", "", t("cancel"));
  cancel.type = "button";
  const save = element("button", "primary", t("save"));
  form.append(area, cancel, save);
  const bubble = node.querySelector(".bubble");
  bubble.replaceWith(form);
  node.classList.add("editing");
  const before = document.activeElement;
  area.focus();
  return new Promise((resolve) => {
    const finish = (value) => {
      form.replaceWith(bubble);
      node.classList.remove("editing");
      before.focus();
      resolve(value);
    };
    cancel.addEventListener("click", () => finish(null));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      finish(area.value.trim() || null);
    });
    area.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") finish(null);
      if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        form.requestSubmit();
      }
      event.stopPropagation();
    });
  });
}

// The page's own remarks (results of commands) stand between messages but belong to no conversation.
export function remark(text) {
  announce(text);
  byId("messages").append(element("p", "remark", text));
}
