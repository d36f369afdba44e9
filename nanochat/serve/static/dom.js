// Small tools for building the page. There is no innerHTML anywhere: text stays text.

export const byId = (id) => document.getElementById(id);

export function element(tag, className = "", text = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
}

const ICONS = {
  plus: "M12 5v14M5 12h14",
  close: "M6 6l12 12M18 6 6 18",
  menu: "M4 7h16M4 12h16M4 17h16",
  search: "M11 18a7 7 0 1 1 0-14 7 7 0 0 1 0 14zM20 20l-4-4",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M8 8h8v8H8z",
  down: "M12 5v14M6 13l6 6 6-6",
  copy: "M9 9h10v10H9zM5 15V5h10",
  check: "M5 12.500l4.500 4.500L19 7.500",
  edit: "M4 20h4L19 9l-4-4L4 16zM13.500 6.500l4 4",
  retry: "M20 11a8 8 0 1 0-2.300 6M20 5v6h-6",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  left: "M14.500 6l-6 6 6 6",
  right: "M9.500 6l6 6-6 6",
  upload: "M12 15V4M7 8.500 12 4l5 4.500M5 19h14",
  download: "M12 4v11M7 10.500l5 4.500 5-4.500M5 19h14",
  moon: "M19 14.500A7.500 7.500 0 0 1 9.500 5a7.500 7.500 0 1 0 9.500 9.500z",
  sun: "M12 16a4 4 0 1 0 0-8 4 4 0 0 0 0 8zM12 3v2M12 19v2M3 12h2M19 12h2M5.600 5.600 7 7M17 17l1.400 1.400M18.400 5.600 17 7M7 17l-1.400 1.400",
  sliders: "M4 8h9M19 8h1M4 16h1M11 16h9M16 10.500a2.500 2.500 0 1 0 0-5 2.500 2.500 0 0 0 0 5zM8 18.500a2.500 2.500 0 1 0 0-5 2.500 2.500 0 0 0 0 5z",
  calculator: "M6 4h12v16H6zM9 8h6M9 12.500h.01M12 12.500h.01M15 12.500h.01M9 16h.01M12 16h.01M15 16h.01",
  bars: "M5 19v-5M10 19V5M15 19v-9M20 19v-3",
};
const SVG = "http://www.w3.org/2000/svg";

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.classList.add("icon-svg");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

export function setIcon(node, name) {
  node.querySelector(".icon-svg")?.remove();
  node.prepend(icon(name));
}

export function button(name, label, onClick) {
  const node = element("button", "icon");
  node.type = "button";
  node.title = label;
  node.setAttribute("aria-label", label);
  node.append(icon(name));
  node.addEventListener("click", onClick);
  return node;
}

// Draw a part of the page again; the focus stays with the same control of the same thing, or goes to a fallback.
export function redraw(root, draw, fallback = null) {
  const focused = root.contains(document.activeElement) ? document.activeElement : null;
  const owner = focused?.closest("[data-id]")?.dataset.id;
  draw();
  if (!focused || document.activeElement === focused) return;
  const scope = owner === undefined || root.dataset.id === owner ? root : root.querySelector(`[data-id="${CSS.escape(owner)}"]`);
  const controls = scope ? [...scope.querySelectorAll("button:enabled")] : [];
  const again = controls.find((one) => nameOf(one) === nameOf(focused)) ?? controls[0] ?? fallback;
  again?.focus();
}

const nameOf = (node) => node.getAttribute("aria-label") ?? node.className;

// To the message field, but not on phones and tablets, where that would open the keyboard.
export function focusInput() {
  if (matchMedia("(hover: hover)").matches) byId("input").focus();
}

// Ask in a modal dialog. Resolves to true, to the text typed (when `value` is given), or to null.
export function ask(text, { value, secret = false } = {}) {
  const dialog = byId("dialog");
  const input = byId("dialog-input");
  byId("dialog-text").textContent = text;
  input.hidden = value === undefined;
  input.type = secret ? "password" : "text";
  input.value = value ?? "";
  input.setAttribute("aria-label", text);
  dialog.returnValue = "cancel";
  dialog.showModal();
  (input.hidden ? byId("dialog-ok") : input).focus();
  input.select();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const agreed = dialog.returnValue === "ok";
      resolve(agreed ? (input.hidden ? true : input.value) : null);
    }, { once: true });
  });
}

export async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // Browsers give the clipboard only to secure pages; over plain HTTP in a local network a selection is copied.
  const focused = document.activeElement;
  const area = element("textarea", "visually-hidden", text);
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
  return focused?.focus();
}

export function download(name, text, type) {
  const anchor = element("a");
  anchor.href = URL.createObjectURL(new Blob([text], { type }));
  anchor.download = name;
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(anchor.href), 10000);
}
