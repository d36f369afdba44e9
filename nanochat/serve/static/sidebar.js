// The list of conversations.

import { ask, button, byId, element, redraw } from "./dom.js";
import { t } from "./i18n.js";

export class Sidebar {
  constructor(conversations, chat, openConversation) {
    this.conversations = conversations;
    this.chat = chat;
    this.openConversation = openConversation;
    byId("search").addEventListener("input", () => this.render());
  }

  render() {
    const found = this.conversations.list(byId("search").value);
    const list = byId("conversations");
    redraw(list, () => list.replaceChildren(...found.map((one) => this.#entry(one))), document.querySelector(".new"));
  }

  #entry(conversation) {
    const item = element("li");
    item.dataset.id = conversation.id;
    const open = element("button", "entry", conversation.title || t("untitled"));
    open.type = "button";
    open.title = conversation.title;
    if (conversation.id === this.chat.conversation.id) open.setAttribute("aria-current", "true");
    open.addEventListener("click", () => this.openConversation(conversation));
    item.append(
      open,
      button("edit", t("rename"), () => this.#rename(conversation)),
      button("trash", t("deleteChat"), () => this.#remove(conversation)),
    );
    return item;
  }

  async #rename(conversation) {
    const title = await ask(t("newTitle"), { value: conversation.title });
    if (!title?.trim()) return;
    conversation.title = title.trim().slice(0, 200);
    this.conversations.save(conversation);
    this.chat.notify();
  }

  async #remove(conversation) {
    if (!(await ask(t("confirmDelete")))) return;
    this.conversations.remove(conversation.id);
    if (conversation.id === this.chat.conversation.id) this.openConversation(this.conversations.create());
    this.render();
  }
}
