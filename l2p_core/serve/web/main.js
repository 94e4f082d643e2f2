// The page: the form, the running jobs, the viewer and the gallery.

import { blobOf, generate } from "./api.js";
import { Gallery } from "./gallery.js";
import { MaskEditor } from "./mask.js";
import { readSettings } from "./png.js";
import { TEXTS } from "./texts.js";

const $ = (id) => document.getElementById(id);
const server = await (await fetch("settings")).json();
const gallery = await Gallery.open();
const FORM = [
  "prompt", "negative_prompt", "width", "height", "num_inference_steps", "cfg_scale", "sampler",
];
const MORE = server.settings.map((each) => each.name)
  .filter((name) => ![...FORM, "seed", "denoising_strength"].includes(name));

let texts = TEXTS.en;
let input = null; // the blob of the input image
let strengthChosen = false; // whether the user chose a denoising strength
let sizeChosen = false; // whether a restored size stands, also for the next input image
let shown = null; // the gallery's entry in the viewer
let previous = null; // the one before it
let urls = new Map(); // entry → object URL

// Texts

function say(name, values = {}) {
  return texts[name].replace(/\{(\w+)\}/g, (_, key) => values[key]);
}

function speak(language) {
  texts = TEXTS[language];
  $("language").value = document.documentElement.lang = language;
  for (const element of document.querySelectorAll("[data-t]")) {
    element.textContent = say(element.dataset.t);
  }
  $("preset").options[0].textContent = say("custom");
  if (shown) describe(shown);
}

function tell(message, isNote = false) {
  $("message").textContent = message ?? "";
  $("message").className = isNote ? "note" : "";
  $("message").hidden = !message;
  if (message) $("message").scrollIntoView({ block: "nearest" });
}

// The form

function buildForm() {
  $("model").textContent = document.title = server.model;
  $("prompt").placeholder = server.example;
  $("preset").append(new Option("", ""));
  for (const [width, height] of server.presets) {
    $("preset").append(new Option(`${width} x ${height}`, `${width}x${height}`));
  }
  for (const name of ["width", "height"]) {
    Object.assign($(name), { min: server.multiple, max: server.limits.side, step: server.multiple });
  }
  $("num_inference_steps").max = server.limits.steps;
  $("count").max = server.limits.images;
  for (const { name, choices } of server.settings) {
    if (MORE.includes(name)) addSetting(name, choices);
    else if (choices) $(name).append(...choices.map((choice) => new Option(choice)));
  }
}

function addSetting(name, choices) {
  const label = document.createElement("label");
  const title = document.createElement("span");
  title.dataset.t = name;
  const field = document.createElement(choices ? "select" : "input");
  field.id = name;
  if (choices) field.append(...choices.map((choice) => new Option(choice)));
  else Object.assign(field, { type: "number", step: "any" });
  label.append(title, field);
  $("more").append(label);
}

function setDefaults() {
  for (const { name, default: value } of server.settings) {
    if (name !== "prompt" && name !== "denoising_strength" && $(name)) $(name).value = value;
  }
  $("seed").value = "";
  $("random").checked = true;
  $("count").value = 1;
  showPreset();
}

function showPreset() {
  const size = `${$("width").value}x${$("height").value}`;
  $("preset").value = [...$("preset").options].some((each) => each.value === size) ? size : "";
}

/** What the form says, as fields of the API. What is left empty has the server's default. */
function fields() {
  const names = [...FORM, ...MORE];
  if (input) names.push("denoising_strength");
  const values = Object.fromEntries(
    names.map((name) => [name, $(name).value]).filter(([name, value]) => value !== "" || name === "prompt"),
  );
  if (!$("random").checked && $("seed").value) values.seed = $("seed").value;
  return { ...values, n: Number($("count").value) || 1 };
}

// The input image and its mask

const editor = new MaskEditor(
  $("mask"),
  $("input_shown"),
  () => ({ brush: Number($("brush").value), erase: $("erase").checked }),
  suggestStrength,
);

function suggestStrength() {
  if (!strengthChosen) $("denoising_strength").value = editor.empty ? server.edit_strength : 1;
}

/** Show an image in the editor, and choose a size for it. */
async function setInput(blob, mask = null) {
  URL.revokeObjectURL($("input_shown").src);
  $("input_shown").src = URL.createObjectURL(blob);
  try {
    await $("input_shown").decode();
  } catch {
    removeInput();
    return tell(say("not_an_image", { name: blob.name ?? "" }));
  }
  input = blob;
  $("editor").hidden = false;
  if (!sizeChosen) chooseSize($("input_shown").naturalWidth, $("input_shown").naturalHeight);
  sizeChosen = false;
  if (mask) await editor.restore(mask);
  else editor.clear();
  suggestStrength();
}

function removeInput() {
  input = null;
  strengthChosen = sizeChosen = false;
  $("editor").hidden = true;
  $("input_file").value = "";
  $("input_shown").removeAttribute("src");
}

/** The size nearest to the image's proportions with about the trained number of pixels. */
function chooseSize(width, height) {
  const [trainedWidth, trainedHeight] = server.presets[0];
  const scale = Math.sqrt((trainedWidth * trainedHeight) / (width * height));
  for (const [name, side] of [["width", width], ["height", height]]) {
    const nearest = Math.round((side * scale) / server.multiple) * server.multiple;
    $(name).value = Math.min(Math.max(nearest, server.multiple), server.limits.side);
  }
  showPreset();
}

// Jobs

async function run() {
  tell();
  const wanted = fields();
  const [image, mask] = [input, input && (await editor.blob())];
  const abort = new AbortController();
  const job = document.createElement("div");
  job.className = "job";
  const [preview, facts, status, bar, cancel] = ["img", "div", "span", "progress", "button"].map(
    (name) => document.createElement(name),
  );
  preview.alt = "";
  status.textContent = say("starting");
  cancel.textContent = say("cancel");
  cancel.onclick = () => abort.abort();
  facts.append(status, bar);
  job.append(preview, facts, cancel);
  $("jobs").append(job);
  job.scrollIntoView({ block: "nearest" }); // on a phone the form is above it

  const left = new Set(Array(wanted.n).keys());
  try {
    await generate(wanted, image, mask, abort.signal, (event) => {
      if (event.place) {
        status.textContent = say("waiting", { place: event.place });
      } else if (event.step) {
        const count = wanted.n;
        status.textContent = say("step", { ...event, image: event.image_index + 1, count });
        bar.value = (wanted.n - left.size + event.step / event.steps) / wanted.n;
      } else if (event.type.endsWith("partial_image")) {
        preview.src = `data:image/png;base64,${event.b64_json}`;
      } else if (event.type.endsWith("completed")) {
        left.delete(event.image_index);
        keep({ image: blobOf(event.b64_json, "image/png"), input: image, mask });
      }
    });
    if (left.size) tell(say("lost"));
  } catch (error) {
    if (error.name !== "AbortError") {
      tell(error instanceof TypeError ? say("lost") : error.message);
    }
  } finally {
    job.remove();
  }
}

// The gallery and the viewer

async function keep(entry) {
  const kept = await gallery.add(entry);
  showGallery();
  await show(kept);
}

function urlOf(entry) {
  if (!urls.has(entry)) urls.set(entry, URL.createObjectURL(entry.image));
  return urls.get(entry);
}

function showGallery() {
  $("empty").hidden = gallery.entries.length > 0;
  $("gallery").replaceChildren(
    ...gallery.entries.map((entry) => {
      const button = document.createElement("button");
      const image = document.createElement("img");
      button.type = "button";
      button.className = entry === shown ? "selected" : "";
      image.loading = "lazy";
      image.alt = "";
      image.src = urlOf(entry);
      button.append(image);
      button.onclick = () => show(entry);
      return button;
    }),
  );
}

async function show(entry) {
  if (entry !== shown) previous = shown;
  shown = entry;
  $("viewer").hidden = !entry;
  showGallery();
  if (!entry) return;
  $("shown").src = $("download").href = urlOf(entry);
  showComparison();
  await describe(entry);
}

async function describe(entry) {
  const settings = (await readSettings(entry.image)) ?? {};
  const prompt = settings.completed_prompt ?? settings.prompt;
  $("caption").textContent = say("about", { ...settings, prompt });
  $("download").download = `l2p-${settings.seed}.png`;
}

/** Left of the divider stands the input image, or the image that was shown before. */
function showComparison() {
  const before = shown.input ?? (gallery.entries.includes(previous) ? previous.image : null);
  const on = $("compare").getAttribute("aria-pressed") === "true" && before !== null;
  $("compare").disabled = before === null;
  $("before").hidden = $("divider").hidden = !on;
  URL.revokeObjectURL($("before").src);
  if (on) $("before").src = URL.createObjectURL(before);
  $("before").style.clipPath = `inset(0 ${100 - $("divider").value}% 0 0)`;
}

/** Put an image's settings into the form. entry: of the gallery, or {image} of a file. */
async function restore(entry) {
  const settings = await readSettings(entry.image);
  if (!settings) return tell(say("no_settings", { name: entry.image.name ?? "" }));
  tell();
  setDefaults();
  removeInput();
  sizeChosen = Boolean(settings.input_image);
  if (entry.input) await setInput(entry.input, entry.mask);
  for (const name of [...FORM, ...MORE, "seed", "denoising_strength"]) {
    if (name in settings) $(name).value = settings[name];
  }
  strengthChosen = Boolean(entry.input || settings.input_image);
  $("random").checked = false;
  showPreset();
  if (settings.input_image && !entry.input) tell(say("needs_input"), true);
}

// Events

$("form").onsubmit = (event) => {
  event.preventDefault();
  run();
};
$("form").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
};
$("language").onchange = () => {
  localStorage.setItem("l2p-language", $("language").value);
  speak($("language").value);
};
$("preset").onchange = () => {
  if ($("preset").value) [$("width").value, $("height").value] = $("preset").value.split("x");
};
$("width").onchange = $("height").onchange = showPreset;
$("seed").oninput = () => ($("random").checked = $("seed").value === "");
$("reuse_seed").onclick = async () => {
  const settings = shown && (await readSettings(shown.image));
  if (settings) $("seed").value = settings.seed;
  $("random").checked = !$("seed").value;
};
$("defaults").onclick = () => {
  setDefaults();
  removeInput();
};
$("input_file").onchange = () => $("input_file").files[0] && setInput($("input_file").files[0]);
$("restore_file").onchange = async () => {
  if ($("restore_file").files[0]) await restore({ image: $("restore_file").files[0] });
  $("restore_file").value = "";
};
$("denoising_strength").oninput = () => (strengthChosen = true);
$("remove_input").onclick = removeInput;
$("undo").onclick = () => {
  editor.undo();
  suggestStrength();
};
$("clear_mask").onclick = () => {
  editor.clear();
  suggestStrength();
};
$("restore").onclick = () => restore(shown);
$("edit").onclick = async () => {
  await setInput(shown.image);
  $("input").scrollIntoView({ block: "nearest" });
};
$("compare").onclick = () => {
  const on = $("compare").getAttribute("aria-pressed") === "true";
  $("compare").setAttribute("aria-pressed", String(!on));
  showComparison();
};
$("divider").oninput = showComparison;
$("delete").onclick = async () => {
  const place = gallery.entries.indexOf(shown);
  await gallery.remove(shown);
  URL.revokeObjectURL(urls.get(shown));
  urls.delete(shown);
  show(gallery.entries[Math.min(place, gallery.entries.length - 1)] ?? null);
};

for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  addEventListener(name, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dropping", name === "dragenter" || name === "dragover");
  });
}
addEventListener("drop", (event) => {
  const file = event.dataTransfer.files[0];
  if (!file) return;
  if ($("input").contains(event.target)) setInput(file);
  else restore({ image: file });
});

buildForm();
setDefaults();
speak(
  localStorage.getItem("l2p-language") ??
    server.language ??
    (navigator.language.startsWith("zh") ? "zh" : "en"),
);
await show(gallery.entries[0] ?? null);
document.body.dataset.ready = "yes";
