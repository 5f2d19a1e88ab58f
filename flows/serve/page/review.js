// Label what the service kept: fetch a batch, show one photo, send each decision at once.

import { at, made, percent } from "./dom.js";

const BATCH = 24;
const NAME = "handsigns-reviewer";
const TOKEN = "handsigns-token";
const DISCARDED = "discarded";

let [batch, current, labels, decided, pending] = [[], 0, [], 0, 0];
const history = []; // photos in the order of their decisions, across batches

function complain(reason) {
  at("problem").textContent = reason ?? "";
  at("problem").hidden = !reason;
}

async function ask(path, options = {}) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = { "Content-Type": "application/json" };
  if (token) headers.Authorization = `Bearer ${token}`;
  let response;
  try {
    response = await fetch(`review/photos${path}`, { headers, ...options });
  } catch {
    throw new Error("The service did not answer. Try again.");
  }
  if (response.ok) return response;
  if (response.status === 401) introduce();
  const error = new Error((await response.json()).error);
  error.status = response.status;
  throw error;
}

// Who labels.

function introduce() {
  at("who").hidden = false;
  at("work").hidden = at("batch").hidden = true;
  at("name").value = localStorage.getItem(NAME) ?? "";
  at(at("name").value ? "token" : "name").focus();
}

at("who").addEventListener("submit", (event) => {
  event.preventDefault();
  localStorage.setItem(NAME, at("name").value.trim());
  sessionStorage.setItem(TOKEN, at("token").value);
  at("who").hidden = true;
  load();
});

// A batch.

async function load() {
  const by = localStorage.getItem(NAME);
  if (!by) return introduce();
  let found;
  try {
    found = await (await ask(`?limit=${BATCH}&by=${encodeURIComponent(by)}`)).json();
  } catch (error) {
    return complain(error.message);
  }
  complain(found.problem);
  [{ labels, decided, pending }, current] = [found, 0];
  batch.forEach((photo) => URL.revokeObjectURL(photo.image.src));
  batch = found.photos.map((photo, index) => {
    const read = `read as ${photo.label}, ${percent(photo.probabilities[photo.label])}`;
    const image = made("img", "", { alt: `Photo ${index + 1}, ${read}` });
    const mark = made("span", "", { hidden: true });
    const button = made("button", [image, mark], { type: "button" });
    button.addEventListener("click", () => show(index));
    fetchPhoto(photo.id, image);
    return { ...photo, read, image, mark, button, decision: undefined, sending: Promise.resolve() };
  });
  at("strip").replaceChildren(...batch.map((photo) => made("li", photo.button)));
  at("work").hidden = at("batch").hidden = !batch.length;
  drawLabels();
  show(0);
}

async function fetchPhoto(id, image) {
  try {
    image.src = URL.createObjectURL(await (await ask(`/${id}.jpg`)).blob());
    if (batch[current]?.id === id) at("photo").src = image.src;
  } catch (error) {
    complain(error.message);
  }
}

function show(index) {
  count();
  if (!batch.length) return;
  current = Math.max(0, Math.min(index, batch.length - 1));
  const photo = batch[current];
  at("photo").src = photo.image.src;
  at("photo").alt = photo.image.alt;
  const version = photo.version === null ? "" : `, by version ${photo.version}`;
  const says = photo.suggestion === null ? "" : ` A user says ${photo.suggestion}.`;
  at("facts").textContent = `${current + 1} of ${batch.length}: ${photo.read}${version}.${says}`;
  batch.forEach(({ button, mark, decision }, place) => {
    button.setAttribute("aria-current", String(place === current));
    button.classList.toggle("done", decision !== undefined);
    mark.hidden = decision === undefined;
    mark.textContent = decision ?? DISCARDED;
  });
  for (const button of at("labels").children) {
    button.classList.toggle("proposed", button.dataset.label === proposal(photo));
  }
}

function count() {
  const all = decided + pending;
  at("chip").textContent = all ? `${decided} of ${all} done` : "no photos yet";
  at("chip").classList.toggle("ready", Boolean(all) && !pending);
  at("undo").disabled = !history.length;
}

const proposal = (photo) => photo.suggestion ?? photo.label;

// Decisions. The next photo is shown at once; a decision that fails comes back.

function decide(label) {
  const photo = batch[current];
  if (!photo || photo.decision !== undefined) return;
  photo.decision = label;
  [decided, pending] = [decided + 1, pending - 1];
  history.push(photo);
  photo.sending = send(photo, label);
  const left = batch.findIndex(({ decision }, place) => place > current && decision === undefined);
  const first = batch.findIndex(({ decision }) => decision === undefined);
  show(left >= 0 ? left : first >= 0 ? first : current);
  if (first < 0) finish();
}

async function send(photo, label) {
  const by = localStorage.getItem(NAME);
  try {
    const sent = { method: "POST", body: JSON.stringify({ label, by }) };
    complain((await (await ask(`/${photo.id}`, sent)).json()).problem);
  } catch (error) {
    complain(error.message);
    history.splice(history.indexOf(photo), 1);
    // Somebody else was first (409), or flagged it again (404): it needs no decision here.
    if (error.status === 409 || error.status === 404) return;
    takeBack(photo);
  }
}

async function finish() {
  const sent = batch;
  await Promise.all(sent.map(({ sending }) => sending));
  const all = sent.every(({ decision }) => decision !== undefined);
  if (all && sent === batch && at("who").hidden) load();
}

function takeBack(photo) {
  photo.decision = undefined;
  [decided, pending] = [decided - 1, pending + 1];
  const place = batch.indexOf(photo);
  if (place >= 0) show(place);
  else load(); // of a batch before; it comes back with the next one
}

async function undo() {
  const photo = history.pop();
  if (!photo) return;
  await photo.sending;
  try {
    await ask(`/${photo.id}`, { method: "DELETE" });
    complain();
    takeBack(photo);
  } catch (error) {
    complain(error.message);
    count();
  }
}

// Buttons and keys: a label's own first letter or digit that is free.

const keys = new Map();

function drawLabels() {
  keys.clear();
  for (const label of [...labels].sort((a, b) => a.length - b.length)) {
    const free = (key) => /[\p{L}\p{N}]/u.test(key) && !"xu".includes(key) && !keys.has(key);
    const key = [...label.toLowerCase(), ..."123456789"].find(free);
    if (key) keys.set(key, label);
  }
  const keyOf = new Map([...keys].map(([key, label]) => [label, key]));
  const buttons = labels.map((label) => {
    const key = keyOf.get(label);
    const hint = key && key !== label ? [" ", made("kbd", key)] : [];
    const button = made("button", [label, ...hint], { type: "button", className: "button" });
    button.dataset.label = label;
    if (key) button.setAttribute("aria-keyshortcuts", key);
    button.addEventListener("click", () => decide(label));
    return button;
  });
  at("labels").replaceChildren(...buttons);
}

at("discard").addEventListener("click", () => decide(null));
at("undo").addEventListener("click", undo);
at("back").addEventListener("click", () => show(current - 1));
at("next").addEventListener("click", () => show(current + 1));

addEventListener("keydown", (event) => {
  const { key, target } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || target.matches("input")) return;
  const pressed = key.toLowerCase();
  if (key === "Enter" && !target.matches("button") && batch.length) decide(proposal(batch[current]));
  else if (key === "ArrowLeft" || key === "ArrowUp") show(current - 1);
  else if (key === "ArrowRight" || key === "ArrowDown") show(current + 1);
  else if (pressed === "x") decide(null);
  else if (pressed === "u") undo();
  else if (keys.has(pressed)) decide(keys.get(pressed));
  else return;
  event.preventDefault();
});

load();
