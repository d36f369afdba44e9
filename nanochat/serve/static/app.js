// The page: puts its parts together and listens to mouse, keys and the server's state.

import { getConfig, isReady, setKey } from "./api.js";
import { Chat, atEnd, scrollToEnd } from "./chat.js";
import { readCommand } from "./commands.js";
import { ask, byId, download, element, setIcon } from "./dom.js";
import { t } from "./i18n.js";
import { remark } from "./messages.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Conversations, asMarkdown } from "./store.js";

const STARTERS = ["Who are you?", "What is 27 + 58?", "How many r are in strawberry?", "Tell me a short story."];
const POLL_MS = 2000;

const input = byId("input");
const conversations = new Conversations();
const settings = new Settings((name) => {
  if (["plain", "probabilities", "language", "all"].includes(name) && !chat.busy) chat.draw();
  if (name === "theme" || name === "all") showTheme();
});
const chat = new Chat(conversations, settings, { onChange: refresh, onUsage: showContext, onError: onAnswerError });
const sidebar = new Sidebar(conversations, chat, openConversation);
let config = null;

// --- conversations

function openConversation(conversation) {
  chat.open(conversation);
  document.body.classList.remove("drawer-open");
  input.focus();
}

const newConversation = () => {
  input.value = "";
  fitInput();
  openConversation(conversations.create());
};

function exportConversation() {
  if (!chat.messages.length) return remark(t("nothingToExport"));
  const name = (chat.conversation.title || "nanochat").replace(/[^\p{L}\p{N} _-]/gu, "").trim() || "nanochat";
  return download(`${name}.md`, asMarkdown(chat.conversation), "text/markdown");
}

function exportAll() {
  download("nanochat-conversations.json", JSON.stringify(conversations.list(), null, 1), "application/json");
}

async function importFile(file) {
  try {
    const count = conversations.import(await file.text());
    remark(t("imported", count));
  } catch {
    remark(t("importFailed"));
  }
  sidebar.render();
}

// --- the message field

function submit() {
  const line = input.value.trim();
  if (!line || chat.busy) return;
  const text = readCommand(line, { chat, settings, newConversation, exportConversation });
  input.value = "";
  fitInput();
  if (text === null) scrollToEnd();
  else chat.send(text);
  refresh();
}

function fitInput() {
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight, 200)}px`;
  byId("send").disabled = !input.value.trim();
}

// --- showing state

function refresh() {
  const { busy, conversation } = chat;
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  byId("welcome").hidden = chat.messages.length > 0;
  byId("title").textContent = conversation.title || "nanochat";
  document.title = conversation.title ? `${conversation.title} · nanochat` : "nanochat";
  sidebar.render();
  showJump();
}

function showContext(usage) {
  const node = byId("context");
  const limit = config?.context_length;
  node.hidden = !usage || !limit;
  if (node.hidden) return;
  const used = usage.total_tokens;
  node.querySelector(".context-text").textContent = `${used}/${limit}`;
  node.querySelector(".meter span").style.width = `${Math.min(100, (100 * used) / limit)}%`;
  node.title = t("contextUse", used, limit);
}

const showJump = () => { byId("jump").hidden = atEnd(); };

function isDark() {
  const theme = settings.get("theme");
  return theme === "dark" || (theme === "system" && matchMedia("(prefers-color-scheme: dark)").matches);
}

const showTheme = () => setIcon(document.querySelector("[data-action=theme]"), isDark() ? "sun" : "moon");

function notice(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}

// --- the server

async function connect() {
  try {
    if (await isReady()) {
      config = await getConfig();
      notice("");
      settings.configure(config);
      byId("model").textContent = config.model;
      showContext(chat.lastUsage());
      if (config.auth_required && !sessionStorage.getItem("nanochat.key")) await askForKey();
      return;
    }
    notice(t("loading"));
  } catch {
    notice(t("unreachable"));
  }
  setTimeout(connect, POLL_MS);
}

async function askForKey() {
  const key = await ask(t("askKey"), { value: "", secret: true });
  if (key) setKey(key);
}

function onAnswerError(error) {
  if (error.status === 401) askForKey();
  else if (error instanceof TypeError || error.status === 503) connect();
}

// --- what mouse and keys do

const ACTIONS = {
  new: newConversation,
  stop: () => chat.stop(),
  jump: scrollToEnd,
  export: exportAll,
  import: () => byId("import-file").click(),
  theme: () => settings.set("theme", isDark() ? "light" : "dark"),
  drawer: (node) => {
    const open = document.body.classList.toggle("drawer-open");
    document.querySelector(".menu").setAttribute("aria-expanded", String(open));
    if (open) byId("search").focus();
    else if (node.matches(".close-drawer")) document.querySelector(".menu").focus();
  },
  settings: () => {
    const panel = byId("settings");
    panel.hidden = !panel.hidden;
    document.querySelector(".top [data-action=settings]").setAttribute("aria-expanded", String(!panel.hidden));
    if (!panel.hidden) panel.querySelector("input").focus();
  },
};

function onInputKey(event) {
  if (event.isComposing || event.keyCode === 229) return; // Enter confirms a composed word, it does not send
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    submit();
  } else if (event.key === "ArrowUp" && !input.value && !chat.busy) {
    const last = chat.messages.findLast((message) => message.role === "user");
    if (last) {
      event.preventDefault();
      chat.edit(last);
    }
  }
}

function onKey(event) {
  const typing = event.target.matches?.("input,textarea,select");
  if (event.isComposing) return;
  if (event.key === "Escape" && chat.busy) chat.stop();
  else if (event.key === "Escape") document.body.classList.remove("drawer-open");
  else if ((event.ctrlKey || event.metaKey) && event.shiftKey && event.key.toLowerCase() === "o") {
    event.preventDefault();
    newConversation();
  } else if (event.key === "/" && !typing) {
    event.preventDefault();
    input.focus();
  }
}

function start() {
  for (const node of document.querySelectorAll("[data-icon]")) setIcon(node, node.dataset.icon);
  for (const node of document.querySelectorAll("[data-action]")) {
    node.addEventListener("click", () => ACTIONS[node.dataset.action](node));
  }
  for (const text of STARTERS) {
    const starter = element("button", "starter", text);
    starter.type = "button";
    starter.addEventListener("click", () => { if (!chat.busy) chat.send(text); });
    byId("starters").append(starter);
  }
  byId("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  byId("import-file").addEventListener("change", (event) => importFile(event.target.files[0]));
  byId("scroller").addEventListener("scroll", showJump, { passive: true });
  input.addEventListener("input", fitInput);
  input.addEventListener("keydown", onInputKey);
  document.addEventListener("keydown", onKey);
  settings.render();
  showTheme();
  refresh();
  fitInput();
  input.focus();
  connect();
}

start();
