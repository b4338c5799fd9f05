// Puts the page together: the form, the run, the gallery, the editor and what is inside.

import { Editor } from "./editor/editor.js";
import { Inside } from "./inside/inside.js";
import { $ } from "./dom.js";
import * as views from "./views.js";

const editor = new Editor($("editor"));
const inside = new Inside($("inside"), { body: () => ({}), onSettings() {} });

views.start();
document.body.dataset.ready = "";
