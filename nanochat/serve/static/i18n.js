// The words of the page in English and Chinese.

const EN = {
  skip: "Skip to the message field", conversations: "Conversations", closeSidebar: "Close the conversation list",
  openSidebar: "Open the conversation list", newChat: "New chat", search: "Search conversations",
  import: "Import", export: "Export", toggleTheme: "Switch between light and dark", settings: "Settings",
  closeSettings: "Close settings", welcome: "What would you like to know?",
  welcomeText: "A small language model, trained from scratch, running on this machine.",
  messages: "Messages", jump: "Jump to the latest message", ask: "Ask anything", send: "Send message",
  stop: "Stop the answer", cancel: "Cancel", ok: "OK",
  hint: "Small models make things up. Enter sends, Shift+Enter starts a line, /help lists commands.",
  copy: "Copy", copyCode: "Copy code", copied: "Copied.", answering: "nanochat is answering.", answered: "End of the answer.", edit: "Edit and resend", regenerate: "Regenerate", remove: "Delete from here",
  rename: "Rename", deleteChat: "Delete conversation", previous: "Previous answer", next: "Next answer",
  you: "You said", it: "nanochat said", retry: "Try again", save: "Send", untitled: "New chat",
  emptyReply: "(empty reply)", stopped: "stopped", lengthEnd: "cut off at the token limit",
  loseMessages: (n) => `This removes ${n} later messages. Go on?`,
  confirmDelete: "Delete this conversation?", newTitle: "Name of the conversation",
  loading: "The model is loading …", unreachable: "The server cannot be reached. Trying again …",
  unreached: "The server cannot be reached. Look whether it is still running, then try again.",
  broken: "The connection broke before the answer was complete. Look whether the server is still running, then try again.",
  askKey: "This server needs an API key:", imported: (n) => `${n} conversation${n === 1 ? "" : "s"} imported.`,
  notImported: (n, why, titles) =>
    `${n} not imported, ${why}: ${titles.map((one) => `“${one}”`).join(", ")}${n > titles.length ? " …" : ""}`,
  importTooMany: (most) => `as at most ${most} are kept (delete some and import again)`,
  importTooLong: "too long to be kept",
  importNoRoom: "as the browser has no room for more (delete some and import again)",
  importOthers: (n) => `${n} ${n === 1 ? "entry" : "entries"} of the file ${n === 1 ? "is no conversation" : "are no conversations"}.`,
  importFailed: "This file holds no conversations.", nothingToExport: "There is nothing to export yet.",
  extended: "The conversation is longer than the context that the model was trained with; the answer may be poor.",
  truncated: (n) => `The conversation is longer than the model's context: ${n} old messages were left out.`,
  stats: (tokens, rate, first) => `${tokens} tokens · ${rate} tok/s · first after ${first} ms`,
  contextUse: (used, limit) => `${used} of ${limit} tokens of context used`,
  calculator: "Calculator", considered: "considered here", other: "all others", noScore: "not sampled",
  temperature: "Temperature", temperatureHelp: "How daring the choice of words is. 0 always takes the most likely.",
  top_k: "Top-k", top_kHelp: "Only the k most likely tokens are candidates. 0 admits all.",
  top_p: "Top-p", top_pHelp: "Only the most likely tokens that together reach this probability.",
  max_tokens: "Longest answer", max_tokensHelp: "In tokens; one is about three quarters of a word.",
  seed: "Seed", seedHelp: "The same seed gives the same answer. Empty means a new one each time.",
  system: "System prompt", systemHelp: "An instruction that is put before the conversation.",
  probabilities: "Token probabilities",
  probabilitiesHelp: "Shade answers by how sure the model was; point at a token to see what else it considered. "
    + "Each answer has a button for it too.",
  tokens: "Tokens of the answer; arrow keys move between them",
  showAll: (n) => `Show all ${n} characters`,
  notKept: "This conversation cannot be kept: it is too long, or the browser refuses. It is lost when the page closes.",
  gaveWay: (title) => `There is no room for more conversations: “${title}”, the oldest, was deleted. Export what you want to keep.`,
  plain: "Plain text", plainHelp: "Show answers exactly as written, without Markdown.",
  transport: "Connection", transportEvents: "HTTP stream",
  transportHelp: "How answers arrive. A WebSocket also tells how many others are waiting.",
  queued: (n) => `${n} before you`,
  theme: "Appearance", language: "Language", reset: "Reset to server defaults",
  themeSystem: "System", themeLight: "Light", themeDark: "Dark", random: "random",
  unknownCommand: (name) => `/${name} is not a command; /help lists them. Start with // to send a slash.`,
  badValue: (name, low, high) => `/${name} takes a number from ${low} to ${high}.`,
  valueIs: (name, value) => `${name}: ${value}`,
  help: "/temperature X  /topk N  /topp X  /maxtokens N  /seed N  /system TEXT: show or change a setting; /system off: no text\n"
    + "/new, /clear: new conversation   /retry: another answer   /undo: take back the last exchange\n"
    + "/export: save as Markdown, /export json: to import again   /stats: about the last answer   //text: send text that starts with a slash",
  noStats: "No answer yet.",
};

const ZH = {
  skip: "跳到输入框", conversations: "对话", closeSidebar: "关闭对话列表", openSidebar: "打开对话列表",
  newChat: "新对话", search: "搜索对话", import: "导入", export: "导出", toggleTheme: "切换浅色与深色",
  settings: "设置", closeSettings: "关闭设置", welcome: "想了解什么？",
  welcomeText: "一个从零训练、在这台机器上运行的小型语言模型。", messages: "消息", jump: "跳到最新消息",
  ask: "请输入问题", send: "发送", stop: "停止生成", cancel: "取消", ok: "确定",
  hint: "小模型会编造内容。回车发送，Shift+回车换行，/help 查看命令。",
  copy: "复制", copyCode: "复制代码", copied: "已复制。", answering: "nanochat 正在回答。", answered: "回答结束。", edit: "编辑并重发", regenerate: "重新生成", remove: "从此处删除",
  rename: "重命名", deleteChat: "删除对话", previous: "上一个回答", next: "下一个回答",
  you: "你说", it: "nanochat 说", retry: "重试", save: "发送", untitled: "新对话",
  emptyReply: "（空回复）", stopped: "已停止", lengthEnd: "达到长度上限",
  loseMessages: (n) => `这会删除之后的 ${n} 条消息。继续吗？`,
  confirmDelete: "删除这个对话？", newTitle: "对话名称",
  loading: "模型正在加载……", unreachable: "无法连接服务器，正在重试……",
  unreached: "无法连接服务器。请确认它仍在运行，然后重试。",
  broken: "回答完成前连接中断。请确认服务器仍在运行，然后重试。",
  askKey: "此服务器需要 API 密钥：", imported: (n) => `已导入 ${n} 个对话。`,
  notImported: (n, why, titles) => `${n} 个未导入（${why}）：${titles.map((one) => `“${one}”`).join("、")}${n > titles.length ? "……" : ""}`,
  importTooMany: (most) => `最多保存 ${most} 个；请先删除一些再导入`,
  importTooLong: "太长，无法保存",
  importNoRoom: "浏览器空间不足；请先删除一些再导入",
  importOthers: (n) => `文件中有 ${n} 项不是对话。`,
  importFailed: "文件中没有对话。", nothingToExport: "还没有可导出的内容。",
  extended: "对话超过了模型训练时的上下文长度，回答可能不太好。",
  truncated: (n) => `对话超过了模型的上下文长度，省略了 ${n} 条旧消息。`,
  stats: (tokens, rate, first) => `${tokens} 个词元 · 每秒 ${rate} · 首个 ${first} 毫秒`,
  contextUse: (used, limit) => `上下文已用 ${used} / ${limit} 个词元`,
  calculator: "计算器", considered: "此处的候选", other: "其他全部", noScore: "非采样",
  temperature: "温度", temperatureHelp: "选词的大胆程度。0 总是取最可能的词。",
  top_k: "Top-k", top_kHelp: "只在最可能的 k 个词元中选择。0 表示不限。",
  top_p: "Top-p", top_pHelp: "只在累计概率达到该值的最可能词元中选择。",
  max_tokens: "最长回答", max_tokensHelp: "以词元计。",
  seed: "种子", seedHelp: "相同的种子得到相同的回答。留空则每次不同。",
  system: "系统提示", systemHelp: "放在对话之前的指示。",
  probabilities: "词元概率", probabilitiesHelp: "按模型的把握给回答着色；指向一个词元可看到其他候选。每个回答也有此按钮。",
  tokens: "回答的词元，用方向键移动", showAll: (n) => `显示全部 ${n} 个字符`,
  notKept: "这个对话无法保存：太长，或浏览器不允许。关闭页面后会丢失。",
  gaveWay: (title) => `对话已满：最早的对话“${title}”已被删除。请导出想保留的对话。`,
  plain: "纯文本", plainHelp: "原样显示回答，不渲染 Markdown。",
  transport: "连接", transportEvents: "HTTP 流", transportHelp: "回答的传输方式。WebSocket 还会显示排队人数。",
  queued: (n) => `前面还有 ${n} 个`,
  theme: "外观", language: "语言", reset: "恢复服务器默认值",
  themeSystem: "跟随系统", themeLight: "浅色", themeDark: "深色", random: "随机",
  unknownCommand: (name) => `没有 /${name} 这个命令；/help 查看全部。以 // 开头可发送斜杠。`,
  badValue: (name, low, high) => `/${name} 需要 ${low} 到 ${high} 之间的数。`,
  valueIs: (name, value) => `${name}：${value}`,
  help: "/temperature X  /topk N  /topp X  /maxtokens N  /seed N  /system 文本：查看或修改设置；/system off：清空\n"
    + "/new、/clear：新对话   /retry：再答一次   /undo：撤回上一轮\n"
    + "/export：存为 Markdown，/export json：可再导入   /stats：上一个回答的数据   //文本：发送以斜杠开头的文本",
  noStats: "还没有回答。",
};

export const LANGUAGES = { en: "English", zh: "中文" };
const WORDS = { en: EN, zh: ZH };
let words = EN;

export function setLanguage(language) {
  const chosen = language in WORDS ? language : navigator.language.startsWith("zh") ? "zh" : "en";
  words = WORDS[chosen];
  document.documentElement.lang = chosen;
  for (const node of document.querySelectorAll("[data-i18n]")) node.textContent = t(node.dataset.i18n);
  for (const node of document.querySelectorAll("[data-i18n-label]")) {
    node.setAttribute("aria-label", t(node.dataset.i18nLabel));
    if (node.tagName === "BUTTON") node.title = t(node.dataset.i18nLabel);
  }
  for (const node of document.querySelectorAll("[data-i18n-placeholder]")) {
    node.placeholder = t(node.dataset.i18nPlaceholder);
  }
}

export function t(key, ...values) {
  const entry = words[key];
  return typeof entry === "function" ? entry(...values) : entry;
}
