// The page: puts its parts together and listens to mouse, keys and the server's state.

import { getConfig, isReady, setKey } from "./api.js";
import { Chat, atEnd, scrollToEnd } from "./chat.js";
import { readCommand } from "./commands.js";
import { ask, byId, download, element, focusInput, setIcon } from "./dom.js";
import { t } from "./i18n.js";
import { remark } from "./messages.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Conversations, MAX_CONVERSATIONS, asMarkdown } from "./store.js";

const STARTERS = ["Who are you?", "What is 27 + 58?", "How many r are in strawberry?", "Tell me a short story."];
const POLL_MS = 2000;

const input = byId("input");
const narrow = matchMedia("(max-width: 900px)"); // as in style.css: sidebar and settings lie over the page
const conversations = new Conversations(onOtherTab, ({ title }) => remark(t("gaveWay", title || t("untitled"))));
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
  showDrawer(false);
  focusInput();
}

// The address names the conversation, so that reloading and the browser's Back find it again.
function showAddress({ id, messages }) {
  const wanted = messages.length ? `#${id}` : "";
  if (location.hash === wanted) return;
  history.pushState(null, "", wanted || location.pathname + location.search);
}

function followAddress() {
  const id = location.hash.slice(1);
  if (id !== chat.conversation.id) openConversation(conversations.find(id) ?? conversations.create());
}

function onOtherTab(id) {
  if (id === chat.conversation.id && !chat.busy) chat.open(conversations.find(id) ?? conversations.create());
  sidebar.render();
}

const newConversation = () => {
  input.value = "";
  fitInput();
  openConversation(conversations.create());
};

function exportConversation(format) {
  if (!chat.messages.length) return remark(t("nothingToExport"));
  const name = (chat.conversation.title || "nanochat").replace(/[^\p{L}\p{N} _-]/gu, "").trim() || "nanochat";
  if (format === "json") {
    return download(`${name}.json`, JSON.stringify(chat.conversation, null, 1), "application/json");
  }
  return download(`${name}.md`, asMarkdown(chat.conversation), "text/markdown");
}

function exportAll() {
  download("nanochat-conversations.json", JSON.stringify(conversations.list(), null, 1), "application/json");
}

async function importFile(file) {
  try {
    remark(importReport(conversations.import(await file.text())));
  } catch {
    remark(t("importFailed"));
  }
  scrollToEnd();
  sidebar.render();
}

// Nothing of a file is left out without a word.
function importReport({ taken, refused, others }) {
  if (!taken && !refused.length) return t("importFailed");
  const lines = [t("imported", taken)];
  for (const why of new Set(refused.map((one) => one.why))) {
    const titles = refused.filter((one) => one.why === why).map((one) => one.title || t("untitled"));
    lines.push(t("notImported", titles.length, t(why, MAX_CONVERSATIONS), titles.slice(0, 5)));
  }
  if (others) lines.push(t("importOthers", others));
  return lines.join("\n");
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
  showAddress(conversation);
  sidebar.render();
  showJump();
}

function showContext(usage) {
  const node = byId("context");
  const limit = config?.context_length;
  node.hidden = !limit || !Number.isFinite(usage?.total_tokens);
  if (node.hidden) return;
  const used = usage.total_tokens;
  node.querySelector(".context-text").textContent = `${used}/${limit}`;
  node.querySelector(".meter span").style.width = `${Math.min(100, (100 * used) / limit)}%`;
  node.title = t("contextUse", used, limit);
}

const showJump = () => { byId("jump").hidden = atEnd(); };

// --- what lies over the page on narrow screens; the rest cannot be reached meanwhile, by no key and no reader

function showDrawer(open) {
  document.body.classList.toggle("drawer-open", open);
  document.querySelector(".menu").setAttribute("aria-expanded", String(open));
  guard();
}

function showSettings(open) {
  byId("settings").hidden = !open;
  document.body.classList.toggle("panel-open", open);
  const opener = document.querySelector(".top [data-action=settings]");
  opener.setAttribute("aria-expanded", String(open));
  guard();
  (open ? byId("settings").querySelector("button") : opener).focus();
}

function guard() {
  const panel = !byId("settings").hidden;
  const drawer = document.body.classList.contains("drawer-open");
  document.querySelector(".main").inert = narrow.matches && (panel || drawer);
  document.querySelector(".skip").inert = narrow.matches && (panel || drawer);
  byId("sidebar").inert = narrow.matches && (panel || !drawer);
}

function closeTop() {
  if (!byId("settings").hidden) showSettings(false);
  else if (document.body.classList.contains("drawer-open")) closeDrawer();
}

function closeDrawer() {
  showDrawer(false);
  document.querySelector(".menu").focus();
}

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
  else if (!error.status || error.status === 503) connect(); // out of reach, or without a model
}

// --- what mouse and keys do

const ACTIONS = {
  new: newConversation,
  stop: () => chat.stop(),
  jump: scrollToEnd,
  export: exportAll,
  import: () => byId("import-file").click(),
  theme: () => settings.set("theme", isDark() ? "light" : "dark"),
  drawer: () => {
    showDrawer(true);
    document.querySelector(".close-drawer").focus();
  },
  "close-drawer": closeDrawer,
  "close-top": closeTop,
  settings: () => showSettings(byId("settings").hidden),
  skip: () => input.focus(),
  cancel: () => byId("dialog").close("cancel"), // no submit button: Enter takes the first of those, which is OK
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
  if (event.key === "Escape" && byId("dialog").open) return; // the browser closes it
  if (event.key === "Escape" && chat.busy) chat.stop();
  else if (event.key === "Escape") closeTop();
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
    node.addEventListener("click", (event) => {
      event.preventDefault();
      ACTIONS[node.dataset.action]();
    });
  }
  for (const text of STARTERS) {
    const starter = element("button", "starter", text);
    starter.type = "button";
    starter.addEventListener("click", () => { if (!chat.busy) chat.send(text); });
    byId("starters").append(starter);
  }
  byId("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  byId("import-file").addEventListener("change", ({ target }) => {
    if (target.files.length) importFile(target.files[0]);
    target.value = ""; // so that the same file can be chosen again
  });
  byId("scroller").addEventListener("scroll", showJump, { passive: true });
  input.addEventListener("input", fitInput);
  input.addEventListener("keydown", onInputKey);
  document.addEventListener("keydown", onKey);
  addEventListener("popstate", followAddress);
  narrow.addEventListener("change", guard);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
  if (navigator.platform.startsWith("Mac")) document.querySelector("kbd").textContent = "\u21E7 \u2318 O";
  settings.render();
  showTheme();
  guard();
  const wanted = conversations.find(location.hash.slice(1));
  if (wanted) chat.open(wanted);
  else refresh();
  fitInput();
  focusInput();
  connect();
}

start();
