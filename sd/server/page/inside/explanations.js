// What is shown, in plain words, and where the book says more.

import { el } from "../dom.js";

export const QUESTION = "How does noise become an image?";

export const INTRODUCTION = [
  "After each step you see what the model expects the image to be, how much noise is left, and which places look at " +
    "which word of the prompt.",
  "Press Look inside: it generates the image of the form, the same as Generate does.",
];

const TEXTS = {
  words: [
    "The places of the image look at the words through cross-attention. Point at a word to see where, press it to " +
      "keep its map, press a second one to compare. Percent is its share of all attention. Most goes to start, end " +
      "and padding, which carry the meaning of the whole prompt as well.",
    "docs/4-unet.md, Where the image attends to words; docs/1-text.md",
  ],
  steps: [
    "Each frame is the clean image that the model expects at that step: first a blur of all that fits the prompt, " +
      "then the layout, then details. Arrow keys move along.",
    "docs/5-samplers.md",
  ],
  noise: [
    "A step removes a part of the noise. Points are the timesteps at which the network is asked.",
    "docs/3-noise.md; docs/10-few-steps.md for few steps",
  ],
  guidance: [
    "With guidance the network predicts twice, with the prompt and without it, and the difference is amplified. The " +
      "Guidance map shows where it is large.",
    "docs/6-guidance.md",
  ],
};

export function explanation(name) {
  const [text, where] = TEXTS[name];
  const book = el("span", { className: "inside-book" }, `Book: ${where}`);
  return el("p", { className: "hint inside-explanation" }, `${text} `, book);
}
