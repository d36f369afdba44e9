// Runs before the first paint, so that a chosen theme does not flash.
(() => {
  let theme = "system";
  try {
    theme = JSON.parse(localStorage.getItem("nanochat.settings") || "{}").theme || "system";
  } catch { /* a private window may refuse storage */ }
  if (theme !== "system") document.documentElement.dataset.theme = theme;
})();
