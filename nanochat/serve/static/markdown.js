// A safe subset of Markdown as DOM nodes. Model text only ever becomes text nodes and vetted link targets.

import { highlighted } from "./highlight.js";
import { button, copyText, element } from "./dom.js";
import { CALL_END, CALL_START } from "./marks.js";

const MAX_DEPTH = 6;
const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([\w+#.-]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*?)[ \t#]*$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])([ \t]+|$)/;
const QUOTE = /^ {0,3}> ?/;
const TABLE_RULE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

// A view of text that grows: only the last block is parsed again when more arrives.
export class MarkdownView {
  constructor(labels, widget) {
    this.root = element("div", "markdown");
    this.context = { labels, widget }; // widget(n) makes the node of the n-th tool call
    this.settled = 0; // offset of the last block
    this.last = []; // its nodes
  }

  update(text) {
    for (const node of this.last) node.remove();
    const blocks = parseBlocks(text.slice(this.settled), 0);
    const open = blocks.at(-1);
    const before = this.settled;
    this.last = [];
    for (const block of blocks) {
      const node = render(block, this.context, 0);
      this.root.append(node);
      if (block === open) {
        this.last = [node];
        this.settled = before + block.start;
      }
    }
  }
}

// --- blocks

export function parseBlocks(text, depth) {
  const lines = text.split("\n");
  const starts = [];
  let offset = 0;
  for (const line of lines) {
    starts.push(offset);
    offset += line.length + 1;
  }
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [block, next] = readBlock(lines, at, depth);
    blocks.push({ ...block, start: starts[at] });
    at = next;
  }
  return blocks;
}

function readBlock(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return readFence(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return [{ type: "heading", level: heading[1].length, text: heading[2] }, at + 1];
  if (RULE.test(line)) return [{ type: "rule" }, at + 1];
  if (depth < MAX_DEPTH && QUOTE.test(line)) return readQuote(lines, at, depth);
  if (depth < MAX_DEPTH && ITEM.test(line)) return readList(lines, at, depth);
  if (isTable(lines, at)) return readTable(lines, at);
  return readParagraph(lines, at, depth);
}

function readFence(lines, at, [, marks, language]) {
  let end = at + 1;
  const closes = (line) => line.trim().length >= marks.length && !line.trim().replaceAll(marks[0], "");
  while (end < lines.length && !closes(lines[end])) end += 1;
  return [{ type: "code", language, text: lines.slice(at + 1, end).join("\n") }, end + 1];
}

function readQuote(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, "")).join("\n");
  return [{ type: "quote", blocks: parseBlocks(inner, depth + 1) }, end];
}

function readList(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const ordered = /\d/.test(first[2]);
  const items = [];
  let end = at;
  while (end < lines.length) {
    const item = ITEM.exec(lines[end]);
    const own = item && /\d/.test(item[2]) === ordered && !RULE.test(lines[end]);
    if (own) items.push([lines[end].slice(item[0].length)]);
    else if (/^( {2,}|\t)/.test(lines[end])) items.at(-1).push(lines[end].replace(/^(\t| {2,4})/, ""));
    else if (!lines[end].trim() && continues(lines, end, ordered)) items.at(-1).push("");
    else break;
    end += 1;
  }
  const blocks = items.map((item) => parseBlocks(item.join("\n"), depth + 1));
  return [{ type: "list", ordered, from: ordered ? parseInt(first[2], 10) : 1, items: blocks }, end];
}

function continues(lines, at, ordered) {
  const next = lines[at + 1] ?? "";
  const item = ITEM.exec(next);
  return /^( {2,}|\t)\S/.test(next) || Boolean(item && /\d/.test(item[2]) === ordered);
}

const isTable = (lines, at) => lines[at].includes("|") && TABLE_RULE.test(lines[at + 1] ?? "");

function readTable(lines, at) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const align = cells(lines[at + 1]).map((rule) => (
    rule.endsWith(":") ? (rule.startsWith(":") ? "center" : "right") : "left"
  ));
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  return [{ type: "table", head: cells(lines[at]), align, rows: lines.slice(at + 2, end).map(cells) }, end];
}

function readParagraph(lines, at, depth) {
  let end = at + 1;
  const starts = (line, i) => FENCE.test(line) || HEADING.test(line) || RULE.test(line)
    || (depth < MAX_DEPTH && (QUOTE.test(line) || ITEM.test(line))) || isTable(lines, i);
  while (end < lines.length && lines[end].trim() && !starts(lines[end], end)) end += 1;
  return [{ type: "paragraph", text: lines.slice(at, end).join("\n") }, end];
}

// --- nodes

function render(block, context, depth) {
  switch (block.type) {
    case "heading": return inline(element(`h${Math.min(block.level + 2, 6)}`), block.text, context);
    case "rule": return element("hr");
    case "code": return codeBlock(block, context);
    case "quote": return withBlocks(element("blockquote"), block.blocks, context, depth);
    case "list": return list(block, context, depth);
    case "table": return table(block, context);
    default: return inline(element("p"), block.text, context);
  }
}

function withBlocks(parent, blocks, context, depth) {
  for (const block of blocks) parent.append(render(block, context, depth + 1));
  return parent;
}

function list(block, context, depth) {
  const node = element(block.ordered ? "ol" : "ul");
  if (block.ordered && block.from !== 1) node.start = block.from;
  for (const item of block.items) {
    const tight = item.length === 1 && item[0].type === "paragraph";
    node.append(tight ? inline(element("li"), item[0].text, context) : withBlocks(element("li"), item, context, depth));
  }
  return node;
}

function table(block, context) {
  const row = (cells, tag) => {
    const node = element("tr");
    block.head.forEach((_, column) => {
      const cell = inline(element(tag), cells[column] ?? "", context);
      cell.style.textAlign = block.align[column] ?? "left";
      node.append(cell);
    });
    return node;
  };
  const head = element("thead");
  head.append(row(block.head, "th"));
  const body = element("tbody");
  for (const cells of block.rows) body.append(row(cells, "td"));
  const node = element("table");
  node.append(head, body);
  const frame = element("div", "table");
  frame.tabIndex = 0; // wide tables scroll, also by keyboard
  frame.append(node);
  return frame;
}

function codeBlock(block, context) {
  const frame = element("div", "code");
  const bar = element("div", "code-bar");
  const copy = button("copy", context.labels.copyCode, () => {
    copyText(withoutMarks(block.text));
    copy.classList.add("done");
    setTimeout(() => copy.classList.remove("done"), 1500);
  });
  bar.append(element("span", "", block.language || "text"), copy);
  const pre = element("pre");
  pre.tabIndex = 0;
  const code = element("code");
  code.append(highlighted(withoutMarks(block.text), block.language));
  pre.append(code);
  frame.append(bar, pre);
  return frame;
}

// --- inline

const SPECIAL = /[\\`*_~[\uE000]|https?:\/\//g;
const TAGS = { "**": "strong", __: "strong", "~~": "del", "*": "em", _: "em" };

const withoutMarks = (text) => text.replace(/\uE000\d+\uE001/g, "");

export function inline(parent, text, context, depth = 0) {
  const absent = new Set(); // closing marks known not to come any more: keeps hostile text linear
  const find = (mark, from) => {
    if (absent.has(mark)) return -1;
    const at = text.indexOf(mark, from);
    if (at < 0) absent.add(mark);
    return at;
  };
  let plain = "";
  let at = 0;
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const hit = depth < MAX_DEPTH ? SPECIAL.exec(text) : null;
    if (!hit) break;
    plain += text.slice(at, hit.index);
    const [node, next] = readInline(text, hit.index, find, context, depth);
    if (typeof node === "string") plain += node;
    else parent.append(plain, node), (plain = "");
    at = next;
  }
  parent.append(plain + text.slice(at));
  return parent;
}

function readInline(text, at, find, context, depth) {
  const char = text[at];
  if (char === "\\") {
    const escaped = /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "");
    return escaped ? [text[at + 1], at + 2] : ["\\", at + 1];
  }
  if (char === "`") return readCode(text, at, find);
  if (char === CALL_START) return readCall(text, at, context);
  if (char === "[") return readLink(text, at, find, context, depth);
  if (char === "h") return readUrl(text, at);
  return readEmphasis(text, at, find, context, depth);
}

function readCall(text, at, context) {
  const end = text.indexOf(CALL_END, at);
  return [context.widget(Number(text.slice(at + 1, end))), end + 1];
}

function readCode(text, at, find) {
  const marks = /^`+/.exec(text.slice(at, at + 8))[0];
  const end = find(marks, at + marks.length);
  if (end < 0) return [marks, at + marks.length];
  return [element("code", "", withoutMarks(text.slice(at + marks.length, end)).trim()), end + marks.length];
}

function readEmphasis(text, at, find, context, depth) {
  const mark = text[at + 1] === text[at] ? text.slice(at, at + 2) : text[at];
  const literal = [mark, at + mark.length];
  const from = at + mark.length;
  // "2*3*4" and snake_case are what people mean: emphasis never starts inside a word.
  if (!(mark in TAGS) || /[\p{L}\p{N}]/u.test(text[at - 1] ?? "") || /\s/.test(text[from] ?? " ")) return literal;
  const end = find(mark, from);
  if (end <= from || /\s/.test(text[end - 1]) || text.slice(from, end).includes("\n\n")) return literal;
  return [inline(element(TAGS[mark]), text.slice(from, end), context, depth + 1), end + mark.length];
}

function readLink(text, at, find, context, depth) {
  const middle = find("](", at);
  const end = middle < 0 ? -1 : find(")", middle);
  if (end < 0 || middle - at > 1000 || end - middle > 2000) return ["[", at + 1];
  const anchor = link(text.slice(middle + 2, end).trim());
  if (!anchor) return ["[", at + 1];
  return [inline(anchor, text.slice(at + 1, middle), context, depth + 1), end + 1];
}

function readUrl(text, at) {
  const url = /^https?:\/\/[^\s<>"'`)\]]*[^\s<>"'`)\].,;:!?]/.exec(text.slice(at, at + 2000));
  const anchor = url && link(url[0]);
  if (!anchor) return ["h", at + 1];
  anchor.textContent = url[0];
  return [anchor, at + url[0].length];
}

function link(target) {
  if (!/^(https?:\/\/|mailto:)\S+$/i.test(target)) return null;
  const node = element("a");
  node.href = target;
  node.target = "_blank";
  node.rel = "noopener noreferrer";
  return node;
}
