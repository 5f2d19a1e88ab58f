// The page's one script: gather a photo, ask /predict, show what it says.

import { at, made, percent } from "./dom.js";

const SIGNS = {
  0: "closed ring",
  1: "index",
  2: "index, middle",
  3: "thumb and two",
  4: "four fingers",
  5: "open hand",
};
const MOST_BARS = 10;
const MOST_BUTTONS = 12;
const HEALTH_SECONDS = 10;
const LARGE_BYTES = 1_000_000;
const LARGEST_SIDE = 1600;

const [stage, hint, preview, video] = ["stage", "hint", "preview", "video"].map(at);
const [sign, words, bars, tokenRow] = ["sign", "words", "bars", "token-row"].map(at);

// What was read.

let labels = Object.keys(SIGNS); // of the model that answers
let hands = true; // whether they are the six signs

function know(found) {
  labels = found;
  hands = found.join("/") === Object.keys(SIGNS).join("/");
  at("samples").hidden = !hands;
  at("what").textContent = hands ? "Show a hand, read its sign" : "Show a photo, see what it is";
  at("of").textContent = hands ? "A photo of one hand showing 0 to 5." : "";
  at("sign-heading").textContent = hands ? "Sign" : "Answer";
  draw(null, null);
}

function bar(label) {
  const meaning = made("span", hands ? SIGNS[label] : "");
  const head = made("th", [made("b", label), meaning], { scope: "row" });
  const track = made("div", made("div", "", { className: "fill" }), { className: "track" });
  track.setAttribute("aria-hidden", "true");
  const row = made("tr", [head, made("td", track), made("td", "–")]);
  return Object.assign(row, { label });
}

// The most probable first where there are more than fit.
function ranked(probabilities, most, names = labels) {
  if (names.length <= most) return names;
  return [...names].sort((a, b) => probabilities[b] - probabilities[a]).slice(0, most);
}

function say(text, { label = null, certain = true, bad = false, detail = "" } = {}) {
  sign.textContent = certain ? label ?? "–" : "?";
  sign.classList.toggle("word", sign.textContent.length > 2);
  sign.classList.toggle("known", label !== null && certain);
  words.classList.toggle("bad", bad);
  words.replaceChildren(text, ...(detail ? [made("small", detail)] : []));
}

function draw(probabilities, best) {
  const shown = probabilities ? ranked(probabilities, MOST_BARS) : labels.slice(0, MOST_BARS);
  const now = [...bars.rows].map((row) => row.label);
  if (now.join("/") !== shown.join("/")) bars.replaceChildren(...shown.map(bar));
  [...bars.rows].forEach((row) => {
    const share = probabilities ? probabilities[row.label] : null;
    row.classList.toggle("best", row.label === best);
    row.querySelector(".fill").style.width = `${100 * (share ?? 0)}%`;
    row.cells[2].textContent = share === null ? "–" : percent(share);
  });
}

function report({ label, certain, probabilities }) {
  const share = percent(probabilities[label]);
  if (certain) {
    const doubt = probabilities[label] < 0.9 ? ", not quite certain" : "";
    say(hands ? `Sign ${label}: ${SIGNS[label]}` : label, { label, detail: `${share}${doubt}` });
  } else {
    const advice = hands ? "Show one hand, well lit and close." : "Show it well lit and close.";
    const detail = `Perhaps ${hands ? "sign " : ""}${label}, ${share}. ${advice}`;
    say(hands ? "No clear hand" : "Not clear", { certain, detail });
  }
  draw(probabilities, certain ? label : null);
}

draw(null, null);

function refused(reason) {
  say(reason, { bad: true });
  draw(null, null);
}

// What it should have been: a person decides on it later.

let keeps = false; // whether the service keeps any photo

function doubt(photo, answer) {
  at("feedback").hidden = !keeps;
  at("thanks").textContent = "";
  unfold(false);
  const others = labels.filter((label) => label !== answer.label || !answer.certain);
  const buttons = ranked(answer.probabilities, MOST_BUTTONS, others).map((label) => {
    const button = made("button", label, { type: "button", className: "button" });
    button.addEventListener("click", () => suggest(photo, label));
    return button;
  });
  at("right").replaceChildren(...buttons);
}

function unfold(open) {
  at("right").hidden = !open;
  at("wrong").hidden = false;
  at("wrong").setAttribute("aria-expanded", String(open));
}

async function suggest(photo, label) {
  at("right").hidden = at("wrong").hidden = true;
  try {
    const response = await send(`feedback?label=${encodeURIComponent(label)}`, photo);
    const { outcome, error } = await response.json();
    const kept = outcome === "full" ? "No more photos are kept today." : "A person will look at it.";
    at("thanks").textContent = error ?? `Thank you. ${kept}`;
  } catch {
    at("thanks").textContent = "The service did not answer. Try again.";
    at("wrong").hidden = false;
  }
}

at("wrong").addEventListener("click", () => unfold(at("right").hidden));

// Ask.

let asking = new AbortController();
let unsent = null;

function show(photo) {
  stopCamera();
  URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(photo);
  preview.alt = "Your photo";
  preview.hidden = false;
  hint.hidden = true;
  stage.classList.add("full");
}

// A large photo is made smaller before it is sent; what the browser cannot read is sent as it is.
async function shrunk(photo) {
  if (photo.size < LARGE_BYTES) return photo;
  try {
    const image = await createImageBitmap(photo, { imageOrientation: "from-image" });
    const scale = Math.min(1, LARGEST_SIDE / Math.max(image.width, image.height));
    const size = { width: image.width * scale, height: image.height * scale };
    const canvas = made("canvas", "", size);
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    return await new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.92));
  } catch {
    return photo;
  }
}

async function send(path, photo, signal) {
  const form = new FormData();
  form.append("file", await shrunk(photo), "photo");
  const token = at("token").value;
  const headers = { "Handsigns-No-Capture": String(Number(at("private").checked)) };
  if (token) headers.Authorization = `Bearer ${token}`;
  return fetch(path, { method: "POST", body: form, headers, signal });
}

async function ask(photo) {
  asking.abort();
  asking = new AbortController();
  const { signal } = asking;
  unsent = null;
  show(photo);
  say("Reading the photo.");
  draw(null, null);
  at("feedback").hidden = true;
  try {
    const response = await send("predict", photo, signal);
    const answer = await response.json();
    if (signal.aborted) return;
    if (response.ok) {
      report(answer);
      doubt(photo, answer);
    } else refused(answer.error);
    if (response.status === 401) {
      tokenRow.hidden = false;
      at("token").focus();
    }
  } catch (error) {
    if (signal.aborted) return;
    refused("Offline, retrying. The photo is sent once the service answers.");
    unsent = photo;
  }
}

let last = null;

function take(files) {
  const photo = [...files].find((file) => file.type.startsWith("image/")) ?? files[0];
  if (photo) ask((last = photo));
}

for (const id of ["file", "shot"]) {
  at(id).addEventListener("change", ({ target }) => {
    take(target.files);
    target.value = ""; // so that the same file can be chosen again
  });
}
at("ask").addEventListener("submit", (event) => event.preventDefault());
at("token").addEventListener("change", () => last && ask(last));

addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) take(event.clipboardData.files);
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  stage.classList.add("over");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) stage.classList.remove("over");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  stage.classList.remove("over");
  take(event.dataTransfer.files);
});

// The camera: a live picture where the browser gives one, else the phone's own app.

const live = Boolean(navigator.mediaDevices?.getUserMedia);
const phone = matchMedia("(pointer: coarse)").matches;
at("camera").hidden = !live || phone;
at("capture").hidden = !phone;

function cameraOn(on) {
  video.hidden = !on;
  at("snap").hidden = at("stop").hidden = !on;
  at("camera").hidden = on || !live || phone;
  if (on) preview.hidden = hint.hidden = true;
}

function stopCamera() {
  if (!video.srcObject) return;
  video.srcObject.getTracks().forEach((track) => track.stop());
  video.srcObject = null;
  cameraOn(false);
  hint.hidden = preview.hidden = !preview.src;
  hint.hidden = !preview.hidden;
}

at("camera").addEventListener("click", async () => {
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 1280 } } });
    await video.play();
    cameraOn(true);
    at("snap").focus();
  } catch (error) {
    refused(`The camera cannot be used: ${error.message}. Choose a photo instead.`);
  }
});
at("stop").addEventListener("click", () => {
  stopCamera();
  at("camera").focus();
});
at("snap").addEventListener("click", () => {
  const canvas = made("canvas", "", { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob((photo) => take([photo]), "image/jpeg", 0.92);
  at("camera").focus();
});

// Examples.

for (const label of Object.keys(SIGNS)) {
  const image = made("img", "", {
    src: `examples/${label}.png`,
    alt: `Rendered hand, sign ${label}`,
    width: 64,
    height: 64,
  });
  const button = made("button", [image, made("span", `rendered ${label}`)], { type: "button" });
  button.addEventListener("click", async () => {
    ask((last = await (await fetch(image.src)).blob()));
    at("ask").scrollIntoView({ block: "nearest" });
  });
  at("examples").append(made("li", button));
}

// The model behind it all.

const MOMENT = { dateStyle: "medium", timeStyle: "short" };
const CHIPS = {
  ready: "ready",
  behind: "ready, update pending",
  waiting: "not ready yet",
  offline: "offline, retrying",
};

function facts(health) {
  const { model } = health;
  if (!model) return [["Model", health.state === "offline" ? "not known" : "none yet"]];
  if (model.version === null) return [["Model", model.description]];
  const since = new Date(model.promoted_at);
  const shown = isNaN(since) ? "not known" : since.toLocaleString([], MOMENT);
  return [
    ["Version", String(model.version)],
    ["Release", made("code", model.release)],
    ["Champion since", made("time", shown, { dateTime: model.promoted_at })],
  ];
}

async function look() {
  let health;
  try {
    health = await (await fetch("health")).json();
  } catch {
    health = { state: "offline", model: null, problem: "" };
  }
  if (unsent && health.model) ask(unsent);
  const name = CHIPS[health.state];
  at("chip").className = `chip ${health.state}`;
  if (at("chip").textContent !== name) at("chip").textContent = name;
  const problem = health.problem ?? "";
  if (at("problem").textContent !== problem) at("problem").textContent = problem;
  at("problem").hidden = !problem;
  if (health.labels?.length && health.labels.join("/") !== labels.join("/")) know(health.labels);
  keeps = Boolean(health.capture);
  at("kept").textContent = keeps ? "and may be kept to learn from it" : "and not kept";
  at("private-row").hidden = !keeps;
  const rows = facts(health).map(([term, fact]) => made("div", [made("dt", term), made("dd", fact)]));
  at("model").replaceChildren(...rows);
}

at("curl").textContent = `curl -F file=@photo.jpg ${new URL("predict", location.href)}`;
setInterval(() => document.hidden || look(), 1000 * HEALTH_SECONDS);
addEventListener("visibilitychange", () => document.hidden || look());
look();
