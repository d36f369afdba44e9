// One conversation on the page: asking, streaming the answer, and changing what was said.

import { complete } from "./api.js";
import { ask, byId, copyText, focusInput, redraw } from "./dom.js";
import { t } from "./i18n.js";
import { addToken, editInPlace, messageView, remark, updateMessage } from "./messages.js";
import { Speech, announce } from "./speech.js";
import { answerOf, asMessages, newId, spokenText } from "./store.js";

export class Chat {
  constructor(conversations, settings, { onChange, onUsage, onError }) {
    this.conversations = conversations;
    this.settings = settings;
    this.notify = onChange;
    this.onUsage = onUsage;
    this.onError = onError;
    this.abort = null;
    this.conversation = conversations.create();
    this.actions = {
      copy: copyText,
      edit: (message) => this.edit(message),
      remove: (message) => this.remove(message),
      regenerate: (message) => this.regenerate(message),
      retry: (message) => this.retry(message),
      choose: (message, index) => this.choose(message, index),
    };
  }

  get busy() {
    return this.abort !== null;
  }

  get messages() {
    return this.conversation.messages;
  }

  open(conversation) {
    this.stop();
    this.conversation = conversation;
    this.draw();
    this.onUsage(this.lastUsage());
    scrollToEnd();
  }

  draw() {
    const views = this.messages.map((message) => messageView(message, this.actions, this.settings));
    redraw(byId("messages"), () => byId("messages").replaceChildren(...views), byId("input"));
    this.notify();
  }

  lastUsage() {
    const answers = this.messages.filter((message) => message.role === "assistant");
    return answers.length ? answerOf(answers.at(-1)).stats?.usage ?? null : null;
  }

  // --- what people do

  send(text) {
    this.#append({ id: newId(), role: "user", content: text });
    const message = { id: newId(), role: "assistant", alternatives: [{ parts: [] }], chosen: 0 };
    this.#append(message);
    scrollToEnd();
    return this.#answer(message);
  }

  stop() {
    this.abort?.abort();
  }

  async regenerate(message) {
    if (this.busy || !(await this.#truncate(this.messages.indexOf(message) + 1))) return;
    message.alternatives.push({ parts: [] });
    message.chosen = message.alternatives.length - 1;
    await this.#answer(message);
  }

  // After a failure: the failed attempt gives way to a new one.
  async retry(message) {
    if (this.busy || !(await this.#truncate(this.messages.indexOf(message) + 1))) return;
    message.alternatives[message.chosen] = { parts: [] };
    await this.#answer(message);
  }

  async edit(message) {
    if (this.busy) return;
    const text = await editInPlace(this.#node(message), message.content);
    if (text === null || !(await this.#truncate(this.messages.indexOf(message), 2))) return;
    await this.send(text);
  }

  async remove(message) {
    if (!this.busy) await this.#truncate(this.messages.indexOf(message));
  }

  choose(message, index) {
    if (this.busy) return;
    message.chosen = index;
    this.conversations.save(this.conversation);
    this.draw();
  }

  undo() {
    const last = this.messages.findLastIndex((message) => message.role === "user");
    return last < 0 || this.busy ? Promise.resolve(false) : this.#truncate(last, 2);
  }

  // --- how it happens

  #node(message) {
    return byId("messages").querySelector(`[data-id="${CSS.escape(message.id)}"]`);
  }

  #append(message) {
    this.messages.push(message);
    byId("messages").append(messageView(message, this.actions, this.settings));
    this.conversations.save(this.conversation);
    this.notify();
  }

  // Keep the first `count` messages; asks when more than `free` are lost. Resolves to whether it happened.
  async #truncate(count, free = 1) {
    const lost = this.messages.length - count;
    if (lost > free && !(await ask(t("loseMessages", lost)))) return false;
    if (lost > 0) {
      this.messages.length = count;
      this.conversations.save(this.conversation);
      this.draw();
    }
    return true;
  }

  async #answer(message) {
    const { conversation } = this;
    const alternative = answerOf(message);
    const speech = new Speech();
    const abort = this.abort = new AbortController();
    const before = asMessages(this.messages.slice(0, this.messages.indexOf(message)));
    this.place = 0; // in the server's queue
    const paint = painter(() => {
      this.#paint(message, true);
      if (conversation === this.conversation) speech.update(spokenText(alternative.parts), false);
    });
    this.#paint(message, true);
    this.notify();
    if (byId("messages").contains(document.activeElement)) focusInput(); // the toolbar is hidden meanwhile
    announce(t("answering"));
    try {
      const body = { messages: before, ...this.settings.sampling() };
      for await (const event of complete(body, abort.signal, this.settings.get("transport"))) {
        this.#take(alternative, event);
        paint();
      }
    } catch (error) {
      if (error.name === "AbortError") alternative.stats = { finish_reason: "cancelled" };
      else {
        alternative.error = error.message;
        this.onError(error);
      }
    }
    paint.cancel();
    if (this.abort === abort) this.abort = null;
    const deleted = !this.conversations.find(conversation.id); // meanwhile, and it must not come back
    const kept = deleted || this.conversations.save(conversation);
    this.#paint(message, false);
    if (conversation === this.conversation) this.#tell(alternative, speech, kept);
    this.notify();
  }

  // The answer is complete: say so to those who hear the page, and put back the focus that was on the stop button.
  #tell(alternative, speech, kept) {
    this.onUsage(this.lastUsage());
    speech.update(spokenText(alternative.parts), true);
    announce(alternative.error ?? (alternative.parts.length ? t("answered") : t("emptyReply")));
    if (!kept && !this.toldUnkept) remark(t("notKept"));
    this.toldUnkept ||= !kept;
    if ([document.body, byId("stop"), byId("send")].includes(document.activeElement)) focusInput();
  }

  #take(alternative, event) {
    const { parts } = alternative;
    this.place = event.queued ?? 0;
    if (event.start && event.truncated_messages) remark(t("truncated", event.truncated_messages));
    if (event.start && event.warning) remark(t("extended"));
    if (event.token) {
      if (parts.at(-1)?.type === "text") parts.at(-1).text += event.token;
      else parts.push({ type: "text", text: event.token });
    }
    if (event.tool) parts.push({ type: event.tool === "call" ? "python" : "python_output", text: event.text });
    if (event.token || event.tool || event.logprobs) {
      addToken(alternative, event.tool ? ` ${event.text} ` : event.token, event.logprobs ?? []);
    }
    if (event.done && event.usage) {
      alternative.stats = { finish_reason: event.finish_reason, usage: event.usage, timings: event.timings };
    }
  }

  #paint(message, streaming) {
    const node = this.#node(message);
    if (!node) return; // another conversation is on the page
    const follow = atEnd();
    updateMessage(node, message, this.actions, this.settings, streaming && { place: this.place });
    if (follow) scrollToEnd();
  }
}

// Draw at most once per frame, and when drawing is slow, leave the browser three quarters of the time.
function painter(draw) {
  let timer = null;
  let cost = 0;
  const run = () => {
    const begun = performance.now();
    timer = null;
    draw();
    cost = performance.now() - begun;
  };
  const paint = () => {
    timer ??= setTimeout(run, Math.max(16, 3 * cost));
  };
  paint.cancel = () => clearTimeout(timer);
  return paint;
}

// --- scrolling: follow the text only while the reader is at the end

export function atEnd() {
  const scroller = byId("scroller");
  return scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
}

export function scrollToEnd() {
  const scroller = byId("scroller");
  scroller.scrollTop = scroller.scrollHeight;
}
