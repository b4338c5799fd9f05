// Shows /openapi.json: each operation with its parameters, its body and its answers, and a form to try it.
// Texts are only ever set as textContent.

const METHODS = ["get", "post", "put", "delete"];
const DEEPEST = 6; // levels of a schema that are shown

/** An element with a class, and children: elements or texts. */
function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

/** A schema without its reference. */
function resolved(schema, api) {
  if (!schema?.$ref) return schema ?? {};
  return schema.$ref.slice(2).split("/").reduce((part, name) => part?.[name], api) ?? {};
}

/** The type of a schema in a few words. */
function typeOf(given, api) {
  const schema = resolved(given, api);
  const options = schema.anyOf ?? schema.oneOf;
  if (options) return options.map((each) => resolved(each, api).title ?? typeOf(each, api)).join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  const type = Array.isArray(schema.type) ? schema.type.join(" or ") : schema.type ?? "any";
  const { minimum: low, maximum: high } = schema;
  if (low !== undefined && high !== undefined) return `${type}, ${low} to ${high}`;
  return low !== undefined ? `${type}, from ${low}` : type;
}

/** The rows of a table with the properties of a schema. */
function rows(given, api, prefix = "", depth = 0) {
  const schema = resolved(given, api);
  if (depth > DEEPEST) return [];
  if (schema.items) return rows(schema.items, api, `${prefix}[]`, depth + 1);
  const options = schema.anyOf ?? schema.oneOf;
  if (options) {
    const seen = new Set(); // what several kinds have is shown once
    const isNew = (row) => row.dataset.kind || (!seen.has(row.firstChild.textContent) && seen.add(row.firstChild.textContent));
    return options.flatMap((each) => rows(each, api, prefix, depth + 1).filter(isNew));
  }
  const found = [];
  if (depth > 0 && schema.title && schema.properties?.kind) {
    found.push(make("tr", "kind", make("td", "path", prefix), make("td", "", `of kind ${schema.title}`), make("td", "", schema.description ?? "")));
    found[0].dataset.kind = schema.title;
  }
  for (const [name, value] of Object.entries(schema.properties ?? {})) {
    const path = prefix ? `${prefix}.${name}` : name;
    const part = resolved(value, api);
    const must = schema.required?.includes(name) ? ", required" : "";
    const usual = part.default !== undefined && part.default !== null ? ` (default ${JSON.stringify(part.default)})` : "";
    found.push(make("tr", "", make("td", "path", path), make("td", "", typeOf(value, api) + must), make("td", "", (value.description ?? part.description ?? "") + usual)));
    found.push(...rows(value, api, path, depth + 1));
  }
  return found;
}

/** A table of the properties of a schema, or a word if there are none. */
function table(schema, api) {
  const found = rows(schema, api);
  return found.length ? make("table", "", make("tbody", "", ...found)) : make("p", "", typeOf(schema, api));
}

function headers() {
  const key = document.getElementById("key").value;
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** A form that sends a request. */
function form(method, path, operation) {
  const box = make("form", "");
  const place = make("input", "path");
  place.value = path;
  place.setAttribute("aria-label", "path");
  place.size = 40;
  const body = make("textarea");
  body.setAttribute("aria-label", "body as JSON");
  body.value = path === "/api/generate" ? '{"request": {"prompt": "a red house", "params": {"steps": 10}}}' : "{}";
  const sends = operation.requestBody?.content?.["application/json"];
  const answer = make("pre");
  answer.setAttribute("aria-live", "polite");
  answer.hidden = true;
  box.append(place, " ", make("button", "", "Send"), ...(sends ? [body] : []), answer);
  box.addEventListener("submit", async (event) => {
    event.preventDefault();
    answer.hidden = false;
    answer.textContent = "…";
    try {
      const json = sends ? { "Content-Type": "application/json" } : {};
      const reply = await fetch(place.value, { method: method.toUpperCase(), headers: { ...headers(), ...json }, body: sends ? body.value : undefined });
      const text = await reply.text();
      answer.textContent = `${reply.status} ${reply.statusText}\n${text.slice(0, 5000)}${text.length > 5000 ? " …" : ""}`;
    } catch (error) {
      answer.textContent = String(error);
    }
  });
  return box;
}

/** One operation. */
function entry(method, path, operation, api) {
  const box = make("details", "", make("summary", "", make("span", "method", method.toUpperCase()), make("span", "path", path), make("span", "about", operation.summary ?? "")));
  box.addEventListener("toggle", () => {
    if (box.dataset.filled) return;
    box.dataset.filled = "yes";
    box.append(make("p", "", operation.description ?? ""));
    for (const parameter of operation.parameters ?? []) {
      box.append(make("p", "", make("code", "", parameter.name), ` in ${parameter.in}: ${typeOf(parameter.schema, api)}. ${parameter.description ?? ""}`));
    }
    for (const [type, content] of Object.entries(operation.requestBody?.content ?? {})) {
      box.append(make("h3", "", "Body: ", make("code", "", type)), table(content.schema, api));
    }
    for (const [status, response] of Object.entries(operation.responses ?? {})) {
      box.append(make("h3", "", `Answer ${status}`), make("p", "", response.description ?? ""));
      for (const [type, content] of Object.entries(response.content ?? {})) {
        box.append(make("p", "", make("code", "", type)), table(content.schema, api));
      }
    }
    if (!operation.requestBody || operation.requestBody.content["application/json"]) {
      box.append(make("h3", "", "Try it"), form(method, path, operation));
    }
  });
  return box;
}

async function show() {
  const main = document.getElementById("operations");
  const reply = await fetch("/openapi.json", { headers: headers() });
  if (!reply.ok) {
    main.replaceChildren(make("p", "", `/openapi.json: ${reply.status}. If the server has a key, enter it above.`));
    return;
  }
  const api = await reply.json();
  const groups = new Map();
  for (const [path, item] of Object.entries(api.paths)) {
    for (const method of METHODS.filter((name) => item[name])) {
      const group = item[method].tags?.[0] ?? "other";
      if (!groups.has(group)) groups.set(group, []);
      groups.get(group).push(entry(method, path, item[method], api));
    }
  }
  main.replaceChildren(...[...groups].flatMap(([name, entries]) => [make("h2", "", name), ...entries]));
}

document.getElementById("key").addEventListener("change", show);
document.getElementById("key-form").addEventListener("submit", (event) => event.preventDefault());
show();
