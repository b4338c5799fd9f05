// The words of the prompt as chips: point at one to see its map, press it to keep the map, press two to compare them.

import { el } from "../dom.js";
import { percent } from "./numbers.js";

const MOST = 2; // words that are kept

export class Words {
  // onChange() is called when another word is pointed at or kept.
  constructor(onChange) {
    this.onChange = onChange;
    this.list = el("div", { className: "inside-words", role: "group", "aria-label": "Words of the prompt" });
    this.bar = el("div", { className: "inside-bar", role: "img" });
    this.key = el("div", { className: "inside-key" });
    this.element = el("div", { className: "inside-prompt" }, this.list, this.bar, this.key);
    this.words = [];
    this.chips = [];
    this.pointed = null; // the index of a word
    this.kept = []; // at most two of them
  }

  // Show these words. Words that were kept stay kept, if the prompt still has them.
  set(words, parts) {
    const names = this.kept.map((index) => nameOf(this.words, index));
    this.words = words;
    this.kept = words.map((_, index) => index).filter((index) => names.includes(nameOf(words, index)));
    this.pointed = null;
    this.chips = words.map((word, index) => this.chip(word, index));
    const children = [];
    words.forEach((word, index) => {
      if (index && word.part !== words[index - 1].part) children.push(el("span", { className: "inside-and" }, "AND"));
      children.push(this.chips[index]);
    });
    if (!words.length) children.push(el("p", { className: "hint" }, "The prompt has no words."));
    this.list.replaceChildren(...children);
    this.mark();
  }

  chip(word, index) {
    const share = el("span", { className: "inside-share" }, "");
    const fill = el("span", { className: "inside-fill" });
    const point = (pointed) => () => {
      this.pointed = pointed ? index : this.pointed === index ? null : this.pointed;
      this.onChange();
    };
    const title = word.tokens > 1 ? `${word.tokens} tokens` : "1 token";
    return el("button", {
      type: "button", className: "inside-word", title, "aria-pressed": "false",
      on: {
        // a finger points only while it is down: pressing is what shows a map there
        pointerenter: (event) => event.pointerType !== "touch" && point(true)(),
        pointerleave: (event) => event.pointerType !== "touch" && point(false)(),
        focus: (event) => event.target.matches(":focus-visible") && point(true)(),
        blur: point(false),
        click: () => this.keep(index),
      },
    }, el("span", { className: "inside-text" }, word.text), share, fill);
  }

  keep(index) {
    if (this.kept.includes(index)) this.kept = this.kept.filter((each) => each !== index);
    else this.kept = [...this.kept, index].slice(-MOST);
    this.mark();
    this.onChange();
  }

  release() {
    this.kept = [];
    this.mark();
    this.onChange();
  }

  mark() {
    this.chips.forEach((chip, index) => chip.setAttribute("aria-pressed", String(this.kept.includes(index))));
  }

  // The words whose maps are to be shown: none, one, or two to compare.
  get shown() {
    const { pointed, kept } = this;
    if (kept.length < MOST) return pointed !== null ? [pointed] : kept;
    return pointed === null || kept.includes(pointed) ? kept : [kept[0], pointed];
  }

  // Write the share of attention of each word, null for one that the prompt does not have now, and of what is no word.
  shares(shares, special) {
    const top = Math.max(...shares.map((share) => share ?? 0), 1e-9);
    this.chips.forEach((chip, index) => {
      const share = shares[index];
      const missing = share === null || share === undefined;
      chip.classList.toggle("inside-absent", missing);
      chip.querySelector(".inside-share").textContent = missing ? "–" : percent(share);
      chip.querySelector(".inside-fill").style.width = `${missing ? 0 : (100 * share) / top}%`;
    });
    const words = special ? 1 - special.start - special.end - special.padding : 0;
    const parts = special ? [["words", words], ...Object.entries(special)] : [];
    this.bar.replaceChildren(...parts.map(([name, share]) => {
      const piece = el("span", { className: `inside-${name}` });
      piece.style.flexGrow = String(Math.max(share, 0));
      return piece;
    }));
    const texts = parts.map(([name, share]) => `${name} ${percent(Math.max(share, 0))}`);
    this.bar.setAttribute("aria-label", `Attention: ${texts.join(", ")}`);
    this.key.replaceChildren(...parts.map(([name], i) => el("span", { className: `inside-key-${name}` }, texts[i])));
    this.bar.hidden = !parts.length;
  }
}

// A word and which of its occurrences it is, so that it is found again in another run.
function nameOf(words, index) {
  const { text, part } = words[index];
  return `${part} ${words.slice(0, index).filter((word) => word.text === text && word.part === part).length} ${text}`;
}
