// How an answer looks: Markdown with calculator chips in the text, or its tokens with their probabilities.

import { element, icon } from "./dom.js";
import { t } from "./i18n.js";
import { MarkdownView } from "./markdown.js";
import { CALL_END, CALL_START } from "./marks.js";
import { tokenView } from "./tokens.js";

const MAX_CHARS = 200000; // longer answers are shown in full on demand: laying them out takes seconds

export class AnswerView {
  constructor({ plain }) {
    this.root = element("div", "answer");
    this.plain = plain;
    this.limit = MAX_CHARS;
    this.calls = [];
    this.markdown = new MarkdownView({ copyCode: t("copyCode") }, (index) => chip(this.calls[index]));
    this.waiting = waitingDots();
    this.root.append(this.waiting);
  }

  // parts: the answer so far; tokens: its scored tokens, when they are to be seen.
  update({ parts, error }, { streaming = false, tokens = null } = {}) {
    const empty = parts.length === 0;
    const { shown, length } = shortened(parts, this.limit);
    this.waiting.remove();
    if (tokens?.length) {
      this.root.replaceChildren(tokenView(tokens));
    } else if (this.plain) {
      this.root.replaceChildren(...shown.map(plainPart));
    } else {
      if (!this.markdown.root.isConnected || this.root.childElementCount > 1) this.root.replaceChildren(this.markdown.root);
      this.calls = callsOf(shown);
      this.markdown.update(sourceOf(shown));
    }
    if (length > this.limit && !tokens?.length) this.root.append(this.#more({ parts, error }, length));
    if (empty && streaming) this.root.append(this.waiting);
    this.waiting.dataset.place = streaming?.place ? t("queued", streaming.place) : "";
    if (empty && !streaming && !error) this.root.replaceChildren(element("p", "faint", t("emptyReply")));
  }

  #more(alternative, length) {
    const more = element("button", "more", t("showAll", length.toLocaleString(document.documentElement.lang)));
    more.type = "button";
    more.addEventListener("click", () => {
      this.limit = Infinity;
      this.update(alternative);
    });
    return more;
  }
}

// The parts cut after `limit` characters, and how many there are in all.
function shortened(parts, limit) {
  const shown = [];
  let length = 0;
  for (const part of parts) {
    if (length < limit) shown.push({ ...part, text: whole(part.text, limit - length) });
    length += part.text.length;
  }
  return { shown, length };
}

// The beginning of a text; a character of two units is not cut in half.
function whole(text, length) {
  if (text.length <= length) return text;
  const cut = text.slice(0, length);
  return /[\uD800-\uDBFF]$/.test(cut) ? cut.slice(0, -1) : cut;
}

// Text with a numbered mark for each tool call; the mark's characters cannot come from the model.
function sourceOf(parts) {
  let source = "";
  let index = -1;
  for (const part of parts) {
    if (part.type === "text") source += part.text.replace(/[\uE000\uE001]/g, "\uFFFD");
    else if (part.type === "python" || index < 0) source += `${CALL_START}${(index += 1)}${CALL_END}`;
  }
  return source;
}

function callsOf(parts) {
  const calls = [];
  for (const part of parts) {
    if (part.type === "python") calls.push({ call: part.text, output: null });
    else if (part.type === "python_output") {
      if (!calls.length) calls.push({ call: "", output: null });
      calls.at(-1).output = part.text;
    }
  }
  return calls;
}

export function chip({ call, output }) {
  const node = element("span", "tool");
  node.title = t("calculator");
  node.setAttribute("role", "img");
  node.setAttribute("aria-label", `${t("calculator")}: ${call} = ${output ?? "?"}`);
  node.append(icon("calculator"), element("code", "tool-call", call));
  if (output !== null) node.append(element("span", "tool-equals", "="), element("code", "tool-output", output));
  return node;
}

function plainPart(part) {
  if (part.type === "text") return element("span", "plain", part.text);
  return chip(part.type === "python" ? { call: part.text, output: null } : { call: "", output: part.text });
}

function waitingDots() {
  const dots = element("span", "dots");
  dots.append(element("i"), element("i"), element("i"));
  return dots;
}
