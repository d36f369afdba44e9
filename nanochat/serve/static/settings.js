// Sampling and appearance: what the user chose, on top of what the server suggests.

import { byId, element } from "./dom.js";
import { LANGUAGES, setLanguage, t } from "./i18n.js";
import { loadSettings, saveSettings } from "./store.js";

const FIELDS = [
  { name: "temperature", kind: "range", min: 0, max: 2, step: 0.05 },
  { name: "top_k", kind: "range", min: 0, max: 200, step: 1 },
  { name: "top_p", kind: "range", min: 0.01, max: 1, step: 0.01 },
  { name: "max_tokens", kind: "range", min: 1, max: 4096, step: 1 },
  { name: "seed", kind: "number", min: 0, max: 2 ** 31 - 1, step: 1 },
  { name: "system", kind: "text" },
  { name: "probabilities", kind: "check" },
  { name: "plain", kind: "check" },
  { name: "transport", kind: "choice", choices: () => ({ sse: t("transportEvents"), websocket: "WebSocket" }) },
  { name: "theme", kind: "choice", choices: () => ({ system: t("themeSystem"), light: t("themeLight"), dark: t("themeDark") }) },
  { name: "language", kind: "choice", choices: () => ({ "": t("themeSystem"), ...LANGUAGES }) },
];

const CANDIDATES = 8; // of each token whose probabilities are asked for

export class Settings {
  #scores = false; // whether the server tells them
  #chosen = loadSettings();
  #defaults = { temperature: 0.8, top_k: 50, top_p: 1, max_tokens: 512, seed: null, system: "", probabilities: false, plain: false, transport: "sse", theme: "system", language: "" };
  #onChange;

  constructor(onChange) {
    this.#onChange = onChange;
    this.#apply();
  }

  // Take the server's defaults and limits.
  configure(config) {
    Object.assign(this.#defaults, config.defaults);
    this.#scores = config.features.includes("logprobs");
    const room = config.context_length ?? config.limits.max_tokens;
    this.field("max_tokens").max = Math.min(config.limits.max_tokens, room);
    this.field("top_k").max = config.limits.max_top_k;
    this.field("temperature").max = config.limits.max_temperature;
    this.#defaults.max_tokens = Math.min(this.#defaults.max_tokens, this.field("max_tokens").max);
    this.render();
  }

  field(name) {
    return FIELDS.find((field) => field.name === name);
  }

  get(name) {
    return this.#chosen[name] ?? this.#defaults[name];
  }

  set(name, value) {
    if (value === this.#defaults[name]) delete this.#chosen[name];
    else this.#chosen[name] = value;
    saveSettings(this.#chosen);
    this.#apply();
    this.render();
    this.#onChange(name);
  }

  // The settings as fields of a request; only what differs from the server's own is sent.
  sampling() {
    const body = {};
    for (const name of ["temperature", "top_k", "top_p", "max_tokens", "seed"]) {
      const value = this.#chosen[name];
      if (value !== undefined && value !== null) body[name] = value;
    }
    if (this.get("system")) body.system = this.get("system");
    if (this.#scores) body.logprobs = CANDIDATES;
    return body;
  }

  render() {
    const form = byId("settings-form");
    const focused = document.activeElement?.id;
    form.replaceChildren(...FIELDS.map((field) => this.#row(field)), this.#resetButton());
    if (focused?.startsWith("setting-")) byId(focused)?.focus();
  }

  #apply() {
    const theme = this.get("theme");
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    setLanguage(this.get("language"));
  }

  #row(field) {
    const row = element("div", `setting setting-${field.kind}`);
    const id = `setting-${field.name}`;
    const label = element("label", "", t(field.name));
    label.htmlFor = id;
    const control = CONTROLS[field.kind](field, this.get(field.name), (value) => this.set(field.name, value));
    const input = control.matches("input,select,textarea") ? control : control.querySelector("input");
    input.id = id;
    const value = element("output", "", field.kind === "range" ? String(this.get(field.name)) : "");
    if (field.kind === "range") input.addEventListener("input", () => { value.textContent = input.value; });
    row.append(label, value, control);
    const help = t(`${field.name}Help`);
    if (help) {
      const note = element("p", "setting-help", help);
      note.id = `${id}-help`;
      input.setAttribute("aria-describedby", note.id);
      row.append(note);
    }
    return row;
  }

  #resetButton() {
    const reset = element("button", "reset", t("reset"));
    reset.type = "button";
    reset.addEventListener("click", () => {
      const { theme, language } = this.#chosen;
      this.#chosen = JSON.parse(JSON.stringify({ theme, language }));
      saveSettings(this.#chosen);
      this.render();
      this.#onChange("all");
    });
    return reset;
  }
}

const CONTROLS = {
  range: (field, value, change) => numeric("range", field, value, (input) => change(Number(input.value))),
  number: (field, value, change) => {
    const input = numeric("number", field, value ?? "", (node) => {
      change(node.value === "" || !node.checkValidity() ? null : Number(node.value));
    });
    input.placeholder = t("random");
    return input;
  },
  text: (field, value, change) => {
    const area = element("textarea");
    area.rows = 3;
    area.maxLength = 8000;
    area.value = value;
    area.addEventListener("change", () => change(area.value.trim()));
    return area;
  },
  check: (field, value, change) => {
    const box = element("input");
    box.type = "checkbox";
    box.role = "switch";
    box.checked = value;
    box.addEventListener("change", () => change(box.checked));
    return box;
  },
  choice: (field, value, change) => {
    const select = element("select");
    for (const [key, text] of Object.entries(field.choices())) {
      const option = element("option", "", text);
      option.value = key;
      option.selected = key === value;
      select.append(option);
    }
    select.addEventListener("change", () => change(select.value));
    return select;
  },
};

function numeric(type, field, value, change) {
  const input = element("input");
  Object.assign(input, { type, min: field.min, max: field.max, step: field.step });
  input.value = value;
  input.addEventListener("change", () => change(input));
  return input;
}
