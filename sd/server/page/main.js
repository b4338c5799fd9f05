// Puts the page together: the form, the run, the gallery, the editor and what is inside.

import { Editor } from "./editor/editor.js";
import { Inside } from "./inside/inside.js";

const $ = (id) => document.getElementById(id);
const editor = new Editor($("editor"));
const inside = new Inside($("inside"), { body: () => ({}), onSettings() {} });

document.body.dataset.ready = "";
