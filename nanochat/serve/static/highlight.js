// Just enough syntax colouring for short examples: comments, strings, numbers and the usual keywords.

const KEYWORDS = new Set((
  "and as async await bool boolean break case catch char class const continue def default del do double elif else "
  + "enum except export extends extern False false final finally float fn for from function global go if impl import "
  + "in int interface is lambda let long match mod mut new None nonlocal not null or package pass private protected "
  + "pub public raise return self static string struct super switch this throw trait True true try type typeof "
  + "undefined union unsafe use using var void while with yield select where insert update delete create table"
).split(" "));
const HASH_COMMENTS = /^(py|python|sh|bash|shell|zsh|ruby|rb|r|yaml|yml|toml|make|makefile|)$/;
const TOKEN = new RegExp([
  "(?<comment>//[^\\n]*|/\\*[\\s\\S]*?(?:\\*/|$)|#[^\\n]*|--[ ][^\\n]*)",
  "(?<string>\"(?:\\\\.|[^\"\\\\\\n])*\"?|'(?:\\\\.|[^'\\\\\\n])*'?|`(?:\\\\.|[^`\\\\])*`?)",
  "(?<number>\\b\\d[\\d_.]*(?:[eE][+-]?\\d+)?\\w*)",
  "(?<word>[A-Za-z_]\\w*)",
].join("|"), "g");
const MAX_CHARS = 20000; // beyond, colour costs more than it helps

export function highlighted(code, language) {
  const fragment = document.createDocumentFragment();
  if (code.length > MAX_CHARS || /^(text|txt|plain)$/.test(language)) {
    fragment.append(code);
    return fragment;
  }
  const hash = HASH_COMMENTS.test(language.toLowerCase());
  let at = 0;
  for (const match of code.matchAll(TOKEN)) {
    const kind = kindOf(match, hash);
    if (!kind) continue;
    fragment.append(code.slice(at, match.index), span(kind, match[0]));
    at = match.index + match[0].length;
  }
  fragment.append(code.slice(at));
  return fragment;
}

function kindOf({ groups, 0: text }, hash) {
  if (groups.comment !== undefined) return (text[0] === "#") === hash ? "comment" : null;
  if (groups.string !== undefined) return "string";
  if (groups.number !== undefined) return "number";
  return KEYWORDS.has(text) ? "keyword" : null;
}

function span(kind, text) {
  const node = document.createElement("span");
  node.className = `hl-${kind}`;
  node.textContent = text;
  return node;
}
