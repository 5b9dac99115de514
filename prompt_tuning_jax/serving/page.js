"use strict";
const $ = (id) => document.getElementById(id);
const known = new Map();
let wordsOf = null, ready = false, readsImages = false, images = [];

function element(tag, text, parent) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

async function call(path, options = {}) {
  // The browser names the boundary of a form itself.
  const headers = options.body instanceof FormData ? {} : { "content-type": "application/json" };
  // A header takes bytes: letters beyond latin-1 go as their UTF-8.
  const token = String.fromCharCode(...new TextEncoder().encode($("token").value.trim()));
  if (token) headers.authorization = `Bearer ${token}`;
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) $("token_field").hidden = false;
  if (!answer.ok) {
    const { error } = await answer.json().catch(() => ({ error: { message: answer.statusText } }));
    throw new Error(error.field ? `${error.field}: ${error.message}` : error.message);
  }
  return answer;
}

async function loadTasks() {
  const found = await (await call("/v1/tasks")).json();
  known.clear();
  $("tasks").replaceChildren();
  for (const task of found.tasks) {
    known.set(task.name, task);
    const option = element("option", undefined, $("tasks"));
    option.value = task.name;
    option.label = `${task.name} (${task.method})`;
  }
  $("model").textContent = `${found.model} · ${found.total} task${found.total === 1 ? "" : "s"}`;
  if (!$("task").value && found.tasks.length) $("task").value = found.tasks[0].name;
  wordsOf = null;
  readsImages = found.reads_images;
  for (const id of ["mode_field", "labels_field", "text_options"]) $(id).hidden = readsImages;
  $("image_field").hidden = !readsImages;
  showWording();
  await showWords();
}

// What is dropped or chosen, with a preview of each.
function take(files) {
  images = [...files].filter((file) => /^image\/(png|jpeg)$/.test(file.type));
  $("error").textContent = images.length ? "" : "these are neither PNG nor JPEG files";
  $("previews").replaceChildren();
  $("previews").hidden = !images.length;
  for (const file of images.slice(0, 16)) {
    const shown = element("img", undefined, $("previews"));
    shown.alt = shown.title = file.name;
    const reader = new FileReader();
    reader.addEventListener("load", () => { shown.src = reader.result; });
    reader.readAsDataURL(file);
  }
}

// What the task's training put around its inputs, and a field for each of several columns.
function showWording() {
  const [name] = $("task").value.trim().split("/");
  const task = known.get(name) || {};
  const template = task.inputs_template || "";
  const columns = $("raw").checked ? [] : task.columns || [];
  $("raw_field").hidden = !template;
  $("wording").textContent = template && !$("raw").checked ? `sent as: ${template}` : "";
  $("text_field").hidden = readsImages || columns.length > 0;
  $("text").required = !readsImages && !columns.length;
  $("columns").hidden = !columns.length;
  showCount();
  const shown = [...$("columns").querySelectorAll("textarea")];
  if (shown.map((one) => one.name).join("\n") === columns.join("\n")) return;
  $("columns").replaceChildren();
  for (const column of columns) {
    const field = element("textarea", undefined, element("label", `${column} `, $("columns")));
    field.name = column;
  }
  showCount();
}

// The inputs to ask for: the columns' values, each line of the text, or all of it.
function given() {
  const fields = [...$("columns").querySelectorAll("textarea")];
  if (fields.length) return [Object.fromEntries(fields.map((field) => [field.name, field.value]))];
  const lines = $("text").value.split("\n").map((line) => line.trim()).filter(Boolean);
  return $("lines").checked && lines.length > 1 ? lines : [$("text").value];
}

function showCount() {
  const columns = !$("columns").hidden;
  const several = !columns && $("text").value.trim().includes("\n");
  const inputs = given().length;
  $("lines_field").hidden = columns;
  $("count").textContent = several
    ? (inputs > 1 ? `${inputs} inputs` : "several lines, one input") : "";
}

async function showWords() {
  const [name] = $("task").value.trim().split("/");
  if (!ready || name === wordsOf) return;
  wordsOf = name;
  const table = $("words_table");
  table.replaceChildren();
  // Methods that are no prompts have no positions.
  const hasPrompts = known.has(name) && known.get(name).prompts.some((one) => one.length);
  $("words").hidden = !hasPrompts;
  if (!hasPrompts) return;
  const found = await (await call(`/v1/tasks/${encodeURIComponent(name)}/words`)).json();
  if (wordsOf !== name) return;
  const head = element("tr", undefined, table);
  element("th", "", head);
  for (const { prompt } of found.prompts) element("th", prompt, head);
  const longest = Math.max(...found.prompts.map((one) => one.positions.length));
  for (let position = 0; position < longest; position += 1) {
    const row = element("tr", undefined, table);
    element("td", position, row);
    for (const { positions } of found.prompts) {
      const words = positions[position] || [];
      const cell = element("td", words.slice(0, 3).map((one) => one.word).join(", "), row);
      cell.title = words.map((one) => `${one.word} ${one.cosine.toFixed(2)}`).join("\n");
    }
  }
}

function share(row, value) {
  const cell = element("td", undefined, row);
  cell.className = "track";
  element("i", undefined, cell).style.width = `${100 * value}%`;
  element("span", `${(100 * value).toFixed(1)} %`, cell);
}

function show(result) {
  $("result").hidden = false;
  $("answer").textContent = result.prediction;
  $("agreement").textContent = result.votes
    ? `${Math.round(100 * result.agreement)} % of ${result.prompts.length} prompts agree` : "";
  const table = $("table");
  table.replaceChildren();
  const head = element("tr", undefined, table);
  element("th", "prompt", head);
  const labels = result.probabilities ? Object.keys(result.probabilities) : [];
  for (const label of labels) element("th", label, head);
  if (!labels.length) element("th", "text", head);
  const rows = result.prompts.map((one) => [one.prompt || "no prompt", one]);
  if (result.prompts.length > 1) rows.unshift(["ensemble", result]);
  for (const [name, one] of rows) {
    const row = element("tr", undefined, table);
    element("td", name, row);
    for (const label of labels) share(row, one.probabilities[label]);
    if (!labels.length) element("td", one.prediction, row);
  }
}

// Several inputs: a row for each.
function showAll(inputs, results) {
  $("result").hidden = false;
  $("agreement").textContent = "";
  $("answer").textContent = `${inputs.length} inputs`;
  const table = $("table");
  table.replaceChildren();
  const head = element("tr", undefined, table);
  const labels = results[0].probabilities ? Object.keys(results[0].probabilities) : [];
  for (const title of ["input", labels.length ? "answer" : "text", ...labels]) {
    element("th", title, head);
  }
  results.forEach((result, number) => {
    const row = element("tr", undefined, table);
    element("td", inputs[number], row).className = "input";
    const cell = element("td", result.prediction, row);
    if (result.votes) cell.title = `${Math.round(100 * result.agreement)} % of the prompts agree`;
    for (const label of labels) share(row, result.probabilities[label]);
  });
}

function showResults(inputs, results, milliseconds) {
  $("latency").textContent = "";
  if (results.length === 1) show(results[0]);
  else showAll(inputs, results);
  if (milliseconds !== undefined) {
    const server = milliseconds.server === undefined
      ? "" : `${milliseconds.server.toFixed(1)} ms on the server, `;
    $("latency").textContent = `${server}${milliseconds.whole.toFixed(1)} ms in total`;
  }
}

async function follow(answer, task, inputs) {
  const texts = inputs.map(() => new Map());
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", part; !(part = await reader.read()).done;) {
    const lines = (rest + part.value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line.slice("data: ".length));
      if (event.error) throw new Error(event.error.message);
      if (event.results) return event.results;
      const own = texts[event.index];
      own.set(event.prompt, (own.get(event.prompt) || "") + event.text);
      const results = texts.map((one) => {
        const prompts = [...one].map(([prompt, prediction]) => ({ prompt, prediction }));
        return { task, prediction: prompts.length ? prompts[0].prediction : "", prompts };
      });
      showResults(inputs, results);
    }
  }
  throw new Error("the response ended too early");
}

async function askImages(task) {
  if (!images.length) throw new Error("drop an image, or choose one");
  const body = new FormData();
  body.append("task", task);
  for (const file of images) body.append("image", file, file.name);
  const began = performance.now();
  const found = await (await call("/v1/predict/images", { method: "POST", body })).json();
  const milliseconds = { server: 1000 * found.seconds, whole: performance.now() - began };
  showResults(images.map((file) => file.name), found.results, milliseconds);
}

async function ask(event) {
  event.preventDefault();
  $("error").textContent = "";
  $("result").hidden = true;  // what is there answers another question
  $("button").disabled = true;
  const task = $("task").value.trim(), mode = $("mode").value, options = {};
  const labels = $("labels").value.split(",").map((one) => one.trim()).filter(Boolean);
  if (mode === "label" && labels.length) options.labels = labels;
  if (mode === "generate") options.stream = true;
  if ($("raw").checked) options.raw = true;
  const inputs = given();
  const body = JSON.stringify({ task, inputs, mode, options });
  const began = performance.now();
  try {
    if (readsImages) {
      await askImages(task);
      $("button").disabled = false;
      return;
    }
    const answer = await call("/v1/predict", { method: "POST", body });
    if (mode === "generate") {
      const results = await follow(answer, task, inputs);
      showResults(inputs, results, { whole: performance.now() - began });
    } else {
      const found = await answer.json();
      const whole = performance.now() - began;
      showResults(inputs, found.results, { server: 1000 * found.seconds, whole });
    }
  } catch (error) {
    $("result").hidden = true;  // a text that was being written is not the whole of it
    $("error").textContent = error.message;
  }
  $("button").disabled = false;
}

function statusOf(now) {
  if (now.status === "starting") {
    return now.required_compiled < now.required_to_compile
      ? `compiling ${now.required_compiled} of ${now.required_to_compile}` : "starting";
  }
  const rest = now.status === "ready" && now.compiled < now.to_compile
    ? ` · ${now.compiled} of ${now.to_compile} programs compiled` : "";
  return `${now.status} · ${now.rows_per_second.toFixed(1)} rows/s · ${now.waiting} waiting${rest}`;
}

async function watch() {
  try {
    const now = await (await fetch("/healthz")).json();
    $("status").textContent = statusOf(now);
    ready = now.status === "ready";
    if (!known.size && $("token_field").hidden) await loadTasks();
    await showWords();
  } catch (error) {
    $("status").textContent = "the server does not respond";
  }
  setTimeout(watch, 1000);
}

function quietly(promise) {
  promise.catch((error) => { $("error").textContent = error.message; });
}
$("form").addEventListener("submit", ask);
$("images").addEventListener("change", () => take($("images").files));
document.addEventListener("dragover", (event) => { if (readsImages) event.preventDefault(); });
document.addEventListener("drop", (event) => {
  if (!readsImages) return;
  event.preventDefault();
  take(event.dataTransfer.files);
});
$("task").addEventListener("change", () => { showWording(); quietly(showWords()); });
$("raw").addEventListener("change", showWording);
$("text").addEventListener("input", showCount);
$("lines").addEventListener("change", showCount);
$("token").addEventListener("change", () => quietly(loadTasks()));
quietly(watch());
