// What the model considered: each token shaded by its probability, with its rivals on hover or focus.

import { byId, element } from "./dom.js";
import { t } from "./i18n.js";

const MAX_TOKENS = 5000; // what follows is shown as text: as many nodes would make the page slow
const VISIBLE = 0.0005; // what would be shown as 0.0 % is left to "all others"

// tokens: [{text, scores: [{token, logprob, top_logprobs}]}], scores empty for what a tool wrote.
export function tokenView(tokens) {
  const root = element("div", "tokens");
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", t("tokens"));
  root.append(...tokens.slice(0, MAX_TOKENS).map(tokenNode));
  root.append(tokens.slice(MAX_TOKENS).map(({ text }) => text).join(""));
  root.addEventListener("keydown", walk);
  return root;
}

function tokenNode({ text, scores }, index) {
  const node = element("span", scores.length ? "token" : "token forced", text);
  const probability = scores.length ? Math.exp(scores.at(-1).logprob) : null;
  node.tabIndex = index ? -1 : 0;
  node.setAttribute("role", "button");
  node.setAttribute("aria-label", `${text.trim() || visible(text)}, ${probability === null ? t("noScore") : percent(probability)}`);
  if (probability !== null) node.style.setProperty("--doubt", String(1 - probability));
  for (const type of ["pointerenter", "focus"]) node.addEventListener(type, () => show(node, scores));
  for (const type of ["pointerleave", "blur"]) node.addEventListener(type, hide);
  return node;
}

function walk(event) {
  if (event.key === "Escape") hide(event);
  const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
  const next = step && event.target[step];
  if (!next) return;
  event.preventDefault();
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function show(node, scores) {
  const popover = byId("popover");
  popover.replaceChildren(...(scores.length ? scores.flatMap(rows) : [element("p", "faint", t("noScore"))]));
  popover.hidden = false;
  node.setAttribute("aria-describedby", popover.id);
  const box = node.getBoundingClientRect();
  const left = Math.min(box.left, innerWidth - popover.offsetWidth - 12);
  const above = box.bottom + popover.offsetHeight + 10 > innerHeight;
  popover.style.left = `${Math.max(12, left)}px`;
  popover.style.top = `${above ? box.top - popover.offsetHeight - 6 : box.bottom + 6}px`;
}

function hide(event) {
  byId("popover").hidden = true;
  event.target.removeAttribute("aria-describedby");
}

function rows(score) {
  const known = score.top_logprobs.some((one) => same(one, score));
  const all = known ? score.top_logprobs : [...score.top_logprobs, score];
  const shown = all.filter((one) => Math.exp(one.logprob) >= VISIBLE || same(one, score));
  const rest = 1 - shown.reduce((sum, one) => sum + Math.exp(one.logprob), 0);
  const nodes = shown.map((one) => row(visible(one.token), Math.exp(one.logprob), same(one, score)));
  if (rest >= VISIBLE) nodes.push(row(t("other"), rest, false, "others"));
  return [element("p", "faint", t("considered")), ...nodes];
}

const same = (a, b) => a.bytes.join() === b.bytes.join();

const percent = (probability) => `${(100 * probability).toFixed(probability < 0.1 ? 1 : 0)} %`;

const visible = (text) => JSON.stringify(text).slice(1, -1).replaceAll(" ", "\u2423") || "\u2205";

function row(text, probability, chosen, extra = "") {
  const node = element("div", `rival ${chosen ? "chosen" : ""} ${extra}`);
  const bar = element("span", "rival-bar");
  bar.style.width = `${Math.round(100 * probability)}%`;
  node.append(bar, element("code", "", text), element("span", "rival-percent", percent(probability)));
  return node;
}
