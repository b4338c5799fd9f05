// Light, dark, or as the system has it. Loaded before the page is painted, so that it does not flash.

const KEY = "sd-theme";
const ORDER = ["auto", "light", "dark"];
const dark = matchMedia("(prefers-color-scheme: dark)");

function chosen() {
  const found = localStorage.getItem(KEY);
  return ORDER.includes(found) ? found : "auto";
}

function apply() {
  const theme = chosen() === "auto" ? (dark.matches ? "dark" : "light") : chosen();
  document.documentElement.dataset.theme = theme;
  const button = document.getElementById("theme");
  if (!button) return;
  const said = { auto: "as the system", light: "light", dark: "dark" }[chosen()];
  button.setAttribute("aria-label", `Theme: ${said}`);
  button.title = `Theme: ${said}`;
  button.querySelector("use").setAttribute("href", `#i-${chosen()}`);
}

apply();
dark.addEventListener("change", apply);
document.addEventListener("DOMContentLoaded", () => {
  apply();
  document.getElementById("theme").addEventListener("click", () => {
    localStorage.setItem(KEY, ORDER[(ORDER.indexOf(chosen()) + 1) % ORDER.length]);
    apply();
  });
});
