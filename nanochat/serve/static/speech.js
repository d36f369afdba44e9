// What a screen reader hears: whole sentences of an answer and at most every few seconds, never single tokens.

import { byId, element } from "./dom.js";

const PAUSE_MS = 2500;
const MAX_CHARS = 4000; // of one answer; who wants more reads it in the page
const KEPT = 5; // paragraphs; spoken ones only double the text of the page

export function announce(text) {
  const log = byId("announcer");
  log.append(element("p", "", text));
  while (log.childElementCount > KEPT) log.firstChild.remove();
}

export class Speech {
  #said = 0;
  #at = performance.now();

  // text: the answer so far. What is not yet a whole sentence waits for the end.
  update(text, finished) {
    const now = performance.now();
    if (!finished && now - this.#at < PAUSE_MS) return;
    const rest = text.slice(this.#said, MAX_CHARS);
    const sentences = finished ? rest : /^[\s\S]*(?:[.!?:](?=\s)|[\n\u3002\uFF01\uFF1F])/.exec(rest)?.[0] ?? "";
    if (!sentences.trim()) return;
    this.#said += sentences.length;
    this.#at = now;
    announce(sentences.trim());
  }
}
