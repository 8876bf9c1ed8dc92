// The page: what its controls ask of the stream, and where what comes back goes.

import { Branches } from "./branches.js";
import { Player } from "./canvas.js";
import { Keys, keeps } from "./keys.js";
import { Latest, Words } from "./presets.js";
import { Recorder } from "./record.js";
import { fetchJson, Stream } from "./stream.js";
import { Strip } from "./strip.js";
import { Timeline } from "./timeline.js";

const $ = (id) => document.getElementById(id);
const LOSSLESS = 256;  // px: up to this width frames are sent as PNG, whose pixels are exact
const MODES = {
  recache: "The remembered blocks are committed again under the new prompt: the picture goes on, and follows at once.",
  keep: "What is remembered stays as it is: the picture changes slowly.",
  cut: "A new scene: the next block moves away in time from what is remembered.",
};
const ANSWERS = ["invalid_value", "unsupported", "unknown_id", "limit"];  // errors that are an answer to a request
const ENDS = {
  client: "The session has ended.", idle: "The session was idle for too long.", shutdown: "The server has shut down.",
  end: "This memory policy holds no more frames: choose another one, or start over.",
  moved: "The session goes on in another window.", refused: "The server refused the session.",
  internal: "The server failed.", lost: "The connection was lost for too long.",
};

const stream = new Stream();
const player = new Player($("video"), (block) => stream.send("ack", { block }));
const strip = new Strip($("strip"));
const timeline = new Timeline($("timeline"), $("changes"));
const branches = new Branches($("branches"), $("no-branches"), go);
const recorder = new Recorder($("video"), $("recordings"), $("format"), showRecording);

let model, presets, keys, current = "", paused = false, came = null;
const waiting = [];  // requests without an answer, in their order: {what, at, ...}
let due = [];  // answered ones, until the block that follows them is seen

// ---- asking

function request(what, type, fields, more = {}) {
  if (!stream.send(type, fields)) return say("Not connected: try again in a moment.");
  waiting.push({ what, at: performance.now(), ...more });
  return true;
}

function ask(prompt) {
  const text = prompt.trim().replace(/\s+/g, " ");
  if (!text) return;
  const mode = document.querySelector("[name=mode]:checked").value;
  const blend = Math.max(0, Math.trunc($("blend").valueAsNumber || 0));
  $("prompt").value = text;
  presets.show(text);
  say("");
  const change = timeline.asked(text, mode);
  if (!request("prompt", "prompt", { prompt: text, mode, blend_blocks: blend }, { change, before: current })) timeline.refused(change);
  current = text;
  if (paused) pause(false);  // whoever asks wants to see it
}

function pause(value) {
  if (!request(value ? "pause" : "resume", value ? "pause" : "resume", {})) return;
  paused = player.paused = value;
  strip.paused();
  $("pause").setAttribute("aria-pressed", String(value));
  $("pause").querySelector("span").textContent = value ? "Go on" : "Pause";
  $("video").parentElement.classList.toggle("paused", value);
}

function snapshot() { request("snapshot", "snapshot", {}); }

function go(how, id) {
  const seed = how === "fork" ? randomSeed() : undefined;
  if (request(how, how, how === "fork" ? { id, seed } : { id }, { id, seed }) && paused) pause(false);
}

const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

function start() {
  const seed = Math.min(Math.max(Math.trunc($("seed").valueAsNumber || 0), 0), 2 ** 32 - 1);
  $("seed").value = seed;
  current = $("prompt").value.trim() || model.prompts.examples[0];
  $("prompt").value = current;
  waiting.length = 0;
  due = [];
  timeline.clear();
  branches.clear();
  strip.opened();
  recorder.stop();
  say("");
  cover("Waiting for the first frame");
  presets.show(current);
  const change = timeline.asked(current, "");
  due.push({ what: "open", at_block: 0, change });
  if (paused) unpause();
  const lossless = model.width <= LOSSLESS && model.formats.includes("png");
  // fps 0: as fast as blocks are acknowledged, which is the picture's pace
  stream.open({ prompt: current, seed, memory: $("memory").value, fps: 0, format: lossless ? "png" : "jpeg" });
}

function unpause() {
  paused = player.paused = false;
  $("pause").setAttribute("aria-pressed", "false");
  $("pause").querySelector("span").textContent = "Pause";
  $("video").parentElement.classList.remove("paused");
}

// ---- what comes back

function answered(what) {
  const found = waiting.findIndex((one) => one.what === what);
  return found < 0 ? null : waiting.splice(found, 1)[0];
}

stream.addEventListener("state", ({ detail: { state, reason } }) => {
  $("state").dataset.state = state;
  $("state").textContent = { connecting: "connecting", live: "live", lost: reason || "reconnecting", ended: "ended" }[state];
  if (state === "lost") {  // answers of before do not come any more
    for (const { change } of waiting.splice(0)) if (change) timeline.refused(change);
  }
  if (state === "ended") cover(`${ENDS[reason] ?? reason} Start over for a new one.`);
});

stream.addEventListener("ready", ({ detail }) => {
  player.ready(detail);
  strip.ready(detail);
});

stream.addEventListener("block", ({ detail: block }) => {
  came = block;
  strip.came(block);
  player.push(block);
});

stream.addEventListener("applied", ({ detail: { what, at_block: block } }) => {
  const request = answered(what);
  if (!request) return;
  if (what === "restore" || what === "fork") {
    player.flush();
    branches.at(request.id);
    if (what === "fork") $("seed").value = request.seed;
  }
  if (what === "memory") showPolicy();
  if (["prompt", "action", "restore", "fork"].includes(what)) due.push({ ...request, at_block: block });
});

stream.addEventListener("snapshot", ({ detail: { id } }) => {
  answered("snapshot");
  branches.add(id, came?.position ?? 0, textOf(came?.prompt_applied ?? current), player.latest);
});

stream.addEventListener("error", ({ detail: { code, message } }) => {
  // answers come in the order of the requests: this is the oldest one's, unless it is about none
  const request = ANSWERS.includes(code) ? waiting.shift() : null;
  if (request?.change) {
    timeline.refused(request.change);
    current = request.before;
    presets.show(current);  // the box keeps what was written, to be mended
  }
  if (request?.what === "memory") $("memory").value = request.before;
  say(message);
});

player.addEventListener("shown", ({ detail: { block, frame } }) => {
  strip.shown();
  if (frame) return;
  cover("");
  const now = performance.now();
  const here = due.filter((one) => block.index >= one.at_block);
  due = due.filter((one) => block.index < one.at_block);
  const text = textOf(block.prompt_applied);
  $("video").setAttribute("aria-label", `The live video: ${text}`);
  timeline.block(text, block.position, here.some(({ what }) => what === "restore" || what === "fork"));
  for (const one of here) {
    if (one.change) timeline.arrived(one.change, block.position);
    if (one.what === "restore" || one.what === "fork") returned(text);
    if (one.what === "action" || one.what === "prompt") strip.lag(now - one.at);
  }
  $("position").textContent = `block ${block.position}`;
});

// A snapshot brings its own prompt back.
function returned(text) {
  current = text;
  $("prompt").value = text;
  presets.show(text);
}

// ---- showing

const textOf = (prompt) => typeof prompt === "string" ? prompt : prompt.map(({ text }) => text).join(" + ");

function say(text) { $("line").textContent = text; }

function cover(text) {
  $("cover").textContent = text;
  $("cover").hidden = !text;
}

let clock = 0;
function showRecording(on) {
  clearInterval(clock);
  const show = () => { $("recording").querySelector("span").textContent = `${recorder.seconds.toFixed(0)} s`; };
  if (on) clock = setInterval(show, 500);
  show();
  $("recording").hidden = !on;
  $("record").setAttribute("aria-pressed", String(on));
  $("record").querySelector("span").textContent = on ? "Stop" : "Record";
}

// The ways to change the prompt that a memory policy has
function showPolicy() {
  const policy = model.memory.find(({ name }) => name === $("memory").value);
  const inputs = [...document.querySelectorAll("[name=mode]")];
  for (const input of inputs) input.disabled = !policy.modes.includes(input.value);
  if (inputs.some((input) => input.checked && input.disabled)) inputs.find((input) => !input.disabled).checked = true;
  $("memory-about").textContent = policy.about;
  showMode();
}

function showMode() { $("mode-help").textContent = MODES[document.querySelector("[name=mode]:checked").value]; }

// ---- controls

// Keys are for the stream again, as after a choice by mouse or touch.
function watch() { $("video").focus({ preventScroll: true }); }
$("presets").addEventListener("click", ({ detail }) => { if (detail) watch(); });  // 0: by keyboard

$("ask").addEventListener("submit", (event) => { event.preventDefault(); ask($("prompt").value); });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Escape") watch();
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask($("prompt").value);
});
$("ask").addEventListener("change", ({ target }) => { if (target.name === "mode") showMode(); });
$("pause").addEventListener("click", () => pause(!paused));
$("snapshot").addEventListener("click", snapshot);
$("record").addEventListener("click", () => recorder.toggle());
$("restart").addEventListener("click", start);
$("dice").addEventListener("click", () => { $("seed").value = randomSeed(); start(); });
$("seed").addEventListener("keydown", ({ key }) => { if (key === "Enter") start(); });
$("help").addEventListener("click", () => $("shortcuts").showModal());
let policy = "";
$("memory").addEventListener("focus", ({ target }) => { policy = target.value; });
$("memory").addEventListener("change", ({ target }) => {
  say("");
  if (!request("memory", "set", { memory: target.value }, { before: policy })) target.value = policy;
  policy = target.value;
});

const SHORTCUTS = {
  " ": () => pause(!paused), "/": () => $("prompt").select(), b: snapshot, r: () => recorder.toggle(), t: () => $("theme").click(),
  z: () => { if (branches.current) go("restore", branches.current); }, "?": () => $("shortcuts").showModal(),
};
document.addEventListener("keydown", (event) => {
  const action = SHORTCUTS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action || event.repeat || event.ctrlKey || event.metaKey || event.altKey || keeps(event) || keys?.has(event.code)) return;
  if (event.key === " " && event.target.closest("button, a")) return;  // their own key
  event.preventDefault();
  action();
});

// The place on the server is free for others at once
addEventListener("pagehide", () => stream.close());
addEventListener("pageshow", ({ persisted }) => { if (persisted) start(); });

// ---- the start

async function begin() {
  model = await fetchJson("api/model");
  const { vocabulary, examples } = model.prompts;
  document.title = `${model.name} · cfjax live`;
  $("model").textContent = `${model.name} · ${model.width} × ${model.height} · ${model.fps} frames/s`;
  presets = vocabulary ? new Words($("presets"), vocabulary, ask) : new Latest($("presets"), examples, ask);
  for (const { name, about } of model.memory) $("memory").add(Object.assign(new Option(name, name), { title: about }));
  showPolicy();
  if (!recorder.possible) for (const id of ["record", "format"]) $(id).hidden = true;
  if (model.actions.length) {
    keys = new Keys($("pad"), model.actions, (held) => request("action", "action", { keys: held }));
    $("steer").hidden = false;
    for (const entry of document.querySelectorAll(".steering")) entry.hidden = false;
  }
  $("prompt").value = examples[0];
  start();
}

begin().catch((error) => {
  $("state").dataset.state = "ended";
  $("state").textContent = "no server";
  cover(error.message);
});
