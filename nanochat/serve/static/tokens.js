// What the model considered: each token shaded by its probability, with its rivals on hover or focus.

import { byId, element } from "./dom.js";
import { t } from "./i18n.js";

const VISIBLE = 0.0005; // what would be shown as 0.0 % is left to "all others"

// tokens: [{text, scores: [{token, logprob, top_logprobs}]}], scores empty for what a tool wrote.
export function tokenView(tokens) {
  const root = element("div", "tokens");
  tokens.forEach(({ text, scores }, index) => {
    const node = element("span", scores.length ? "token" : "token forced", text);
    node.tabIndex = index ? -1 : 0;
    if (scores.length) node.style.setProperty("--doubt", String(1 - Math.exp(scores.at(-1).logprob)));
    for (const type of ["pointerenter", "focus"]) node.addEventListener(type, () => show(node, scores));
    for (const type of ["pointerleave", "blur"]) node.addEventListener(type, hide);
    root.append(node);
  });
  root.addEventListener("keydown", walk);
  return root;
}

function walk(event) {
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
  const box = node.getBoundingClientRect();
  const left = Math.min(box.left, innerWidth - popover.offsetWidth - 12);
  const above = box.bottom + popover.offsetHeight + 10 > innerHeight;
  popover.style.left = `${Math.max(12, left)}px`;
  popover.style.top = `${above ? box.top - popover.offsetHeight - 6 : box.bottom + 6}px`;
}

function hide() {
  byId("popover").hidden = true;
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

const visible = (text) => JSON.stringify(text).slice(1, -1).replaceAll(" ", "\u2423") || "\u2205";

function row(text, probability, chosen, extra = "") {
  const node = element("div", `rival ${chosen ? "chosen" : ""} ${extra}`);
  const bar = element("span", "rival-bar");
  bar.style.width = `${Math.round(100 * probability)}%`;
  const percent = 100 * probability;
  node.append(bar, element("code", "", text), element("span", "rival-percent", `${percent.toFixed(percent < 10 ? 1 : 0)} %`));
  return node;
}
