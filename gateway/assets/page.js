// The page at /: sends the form, follows jobs by their events, shows videos. The key stays in this tab's storage.

const STORED = "wan-trt key", PAGE = 12, FOLLOWED = 2, LOOK_MS = 5000, AGAIN_MS = 2000;
const trusted = globalThis.trustedTypes?.createPolicy("page", { createHTML: (text) => text });
const find = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const parse = (text) => JSON.parse(text.replace(/"seed": ?(\d{16,})/g, '"seed": "$1"')); // numbers here have 53 bits
const isOpen = ({ video }) => video.status === "queued" || video.status === "in_progress";
const cards = new Map(); // id of a video → its card
let last = null, followed = new Map(), pictures = null;

// -- asking the gateway

class Refused extends Error {
  constructor(status, error) {
    super(error?.message ?? `The gateway answered ${status}.`);
    Object.assign(this, { status, param: error?.param, code: error?.code });
  }
}

async function ask(path, { headers = {}, ...options } = {}) {
  const key = sessionStorage.getItem(STORED);
  if (key) headers.authorization = `Bearer ${key}`;
  const answer = await fetch(path, { ...options, headers, cache: "no-store" });
  if (answer.ok) return answer;
  const error = new Refused(answer.status, (await answer.json().catch(() => ({}))).error);
  if (error.status === 401 && key && key === sessionStorage.getItem(STORED) && find("#make")) forget(error.message);
  throw error;
}

async function open(model = "") {
  const answer = await ask(model ? `/?model=${encodeURIComponent(model)}` : "/");
  const text = await answer.text();
  stop();
  cards.clear();
  const made = new DOMParser().parseFromString(trusted ? trusted.createHTML(text) : text, "text/html");
  document.body.replaceWith(made.body);
  start();
}

async function forget(message = "") {
  sessionStorage.removeItem(STORED);
  await open();
  tell(message);
}

function tell(message, param = "") {
  find("#trouble").textContent = message;
  for (const field of all("[aria-invalid]")) field.removeAttribute("aria-invalid");
  const field = param && (document.getElementById(param) ?? document.getElementsByName(`${param}[]`)[0]);
  if (!field) return;
  const folded = field.closest("details");
  if (folded) folded.open = true;
  field.setAttribute("aria-invalid", "true");
  field.focus();
}

// -- the form

function prepare(form) {
  form.addEventListener("submit", (event) => { event.preventDefault(); make(form); });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  form.elements.model.addEventListener("change", ({ target }) => open(target.value).catch((error) => tell(error.message)));
  form.elements.size.addEventListener("change", () => fitLength(form));
  form.elements.preset.addEventListener("change", () => carry(form));
  find("#carried button").addEventListener("click", () => carry(form));
  all(".drop", form).forEach(prepareDrop);
  fitLength(form);
}

function fitLength({ elements: { size, num_frames: length } }) {
  const possible = size.selectedOptions[0].dataset.frames.split(" ");
  const wanted = Number(length.value);
  for (const option of length.options) option.disabled = option.hidden = !possible.includes(option.value);
  if (length.selectedOptions[0].disabled) {
    length.value = possible.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
  }
}

function prepareDrop(place) {
  const input = find("input", place), shown = find("img", place), clear = find("button", place);
  const put = (files) => {
    const file = [...files].find((each) => each.type.startsWith("image/"));
    if (!file) return false;
    const held = new DataTransfer();
    held.items.add(file);
    input.files = held.files;
    input.dispatchEvent(new Event("change"));
    return true;
  };
  input.addEventListener("change", () => {
    URL.revokeObjectURL(shown.src);
    const file = input.files[0];
    shown.hidden = clear.hidden = !file;
    if (file) shown.src = URL.createObjectURL(file);
    const used = all(".drop input").some((each) => each.files.length);
    for (const field of all("[data-without-image]")) field.disabled = used;
  });
  clear.addEventListener("click", () => { input.value = ""; input.dispatchEvent(new Event("change")); input.focus(); });
  place.addEventListener("dragover", (event) => { event.preventDefault(); place.classList.add("over"); });
  place.addEventListener("dragleave", () => place.classList.remove("over"));
  place.addEventListener("drop", (event) => {
    event.preventDefault();
    place.classList.remove("over");
    put(event.dataTransfer.files);
  });
  if (input.name === "input_reference") {
    find("#make").addEventListener("paste", (event) => { if (put(event.clipboardData.files)) event.preventDefault(); });
  }
}

// Settings of an earlier video that the form has no field for.
function carry(form, video = null) {
  const names = form.dataset.carried.split(" ").filter((name) => video && video[name] != null);
  const experts = names.some((name) => name.endsWith("_noise"));
  const kept = names.filter((name) => !(experts && name === "guidance_scale"));
  form.carried = kept.map((name) => [name, String(video[name])]);
  find("#carried").hidden = !kept.length;
  find("#carried span").textContent = `Also: ${form.carried.map(([name, value]) => `${name} ${value}`).join(", ")}.`;
}

async function make(form) {
  const button = find("button.main", form), body = new FormData();
  for (const [name, value] of new FormData(form)) if (value !== "" && value.size !== 0) body.append(name, value);
  if (!body.has("input_reference") && !body.has("last_image")) body.delete("fit");
  for (const [name, value] of form.carried ?? []) body.append(name, value);
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  const once = [...bytes].map((each) => each.toString(16).padStart(2, "0")).join("");
  button.disabled = true;
  tell("");
  try {
    const send = () => ask("/v1/videos", { method: "POST", body, headers: { "idempotency-key": once } });
    const answer = await send().catch((error) => (error instanceof Refused ? Promise.reject(error) : send()));
    const card = show(parse(await answer.text()), true);
    card.plays = true;
    say("The video is in the queue.");
    card.element.scrollIntoView({ block: "nearest" });
    schedule();
  } catch (error) {
    tell(error instanceof Refused ? error.message : "The gateway does not answer. Try again.", error.param);
  } finally {
    button.disabled = false;
  }
}

function again(form, video) {
  form.reset();
  for (const input of all(".drop input")) input.dispatchEvent(new Event("change"));
  for (const name of ["prompt", "size", "preset", "seed", "negative_prompt"]) form.elements[name].value = video[name] ?? "";
  if (!form.elements.size.value) form.elements.size.selectedIndex = 0; // one that the page does not offer
  fitLength(form);
  const length = [...form.elements.num_frames.options].find((option) => option.value === String(video.num_frames));
  if (length && !length.disabled) length.selected = true;
  carry(form, video);
  tell(video.fit ? "Add the image again: it was not kept." : "");
  form.elements.prompt.focus();
}

// -- the videos

function show(video, first = false) {
  let card = cards.get(video.id);
  if (!card) {
    const element = find("#card").content.firstElementChild.cloneNode(true);
    card = { element, video: {} };
    cards.set(video.id, card);
    element.id = video.id;
    find("#videos")[first ? "prepend" : "append"](element);
    element.addEventListener("click", (event) => {
      const does = event.target.closest("button")?.dataset.does;
      if (does) act(card, does).catch((error) => { find(".status", element).textContent = error.message; });
    });
  }
  find("#none").hidden = true;
  const before = card.video.status;
  Object.assign(card.video, video);
  draw(card, before);
  return card;
}

function draw(card, before) {
  const { element, video } = card;
  const open = isOpen(card), done = video.status === "completed";
  find(".prompt", element).textContent = video.prompt;
  find(".status", element).textContent = words(video);
  const rewritten = video.extended_by ? `, prompt by ${video.extended_by}` : video.extend_warning ? ", your own prompt" : "";
  const why = video.extend_warning ? ` (not rewritten: ${video.extend_warning})` : "";
  find(".settings", element).textContent =
    `${video.size.replace("x", " × ")}, ${video.num_frames} frames, ${video.steps} steps, seed ${video.seed}${rewritten}${why}`;
  Object.assign(find("progress", element), { value: video.progress, hidden: !open });
  for (const button of all("[data-does]", element)) {
    const does = button.dataset.does;
    button.hidden = { play: !done, download: !done, again: false, cancel: !open, remove: open }[does];
  }
  if (before === video.status) return;
  if (before) say(`${words(video)} ${video.prompt.slice(0, 80)}`);
  if (done && card.plays && !matchMedia("(prefers-reduced-motion: reduce)").matches) act(card, "play").catch(() => {});
  else if (done) pictures?.observe(element);
  else if (!open) find(".screen", element).hidden = true;
}

function words(video) {
  const rest = video.eta_seconds == null ? "" : `, about ${time(video.eta_seconds)} left`;
  if (video.status === "completed") return "Done.";
  if (video.status === "failed") {
    return video.error?.code === "cancelled" ? "Cancelled." : `Failed: ${video.error?.message ?? "unknown"}.`;
  }
  if (video.status === "queued") return `Waiting${video.queue_position ? `, number ${video.queue_position}` : ""}${rest}`;
  const phase = { text: "Reading the prompt", image: "Reading the image", decode: "Decoding", encode: "Writing the file" };
  if (video.phase !== "denoise") return `${phase[video.phase] ?? "Starting"}${rest}`;
  const expert = video.expert?.endsWith("noise") ? `, ${video.expert.replace("_", " ")} expert` : "";
  return `Step ${video.step} of ${video.steps}${expert}${rest}`;
}

function time(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function say(text) {
  find("#said").textContent = text;
}

async function media(card, variant) {
  const answer = await ask(`/v1/videos/${card.video.id}/content?variant=${variant}`);
  return answer.status === 200 ? URL.createObjectURL(await answer.blob()) : "";
}

function screen(card, kind, url, more = {}) {
  const place = find(".screen", card.element);
  const old = place.firstElementChild, shown = old?.localName === kind ? old : document.createElement(kind);
  if (old) URL.revokeObjectURL(old.src);
  Object.assign(shown, more, { src: url });
  if (shown !== old) place.replaceChildren(shown);
  place.hidden = false;
  return shown;
}

async function act(card, does) {
  const { video, element } = card, path = `/v1/videos/${video.id}`;
  if (does === "play") {
    const more = { controls: true, loop: true, muted: true, playsInline: true };
    const shown = screen(card, "video", await media(card, "video"), more);
    shown.setAttribute("aria-label", video.prompt.slice(0, 200));
    await shown.play();
  } else if (does === "download") {
    const link = Object.assign(document.createElement("a"), { href: await media(card, "video") });
    link.download = `${video.id}.${video.output_format ?? "mp4"}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  } else if (does === "again") {
    if (video.model !== find("#make").elements.model.value) await open(video.model);
    again(find("#make"), video);
  } else if (does === "cancel") {
    find("[data-does=cancel]", element).disabled = true;
    try {
      show(parse(await (await ask(`${path}/cancel`, { method: "POST" })).text()));
    } finally {
      find("[data-does=cancel]", element).disabled = false;
    }
  } else if (does === "remove" && confirm("Delete this video for good?")) {
    await ask(path, { method: "DELETE" });
    drop(card);
    say("Deleted.");
    find("#history").focus(); // the button that had it is gone
  }
}

function drop(card) {
  const shown = find(".screen", card.element).firstElementChild;
  if (shown) URL.revokeObjectURL(shown.src);
  card.element.remove();
  cards.delete(card.video.id);
  find("#none").hidden = cards.size > 0;
}

async function list(after = "") {
  const page = parse(await (await ask(`/v1/videos?limit=${PAGE}${after && `&after=${after}`}`)).text());
  const newest = [...cards.keys()].sort().at(-1) ?? "";
  if (after) page.data.forEach((video) => show(video));
  else for (const video of page.data.reverse()) {
    if (cards.has(video.id) ? !followed.has(video.id) : video.id > newest) show(video, true);
  }
  if (after || last === null) {
    last = page.last_id ?? last;
    find("#older").hidden = !page.has_more;
  }
  find("#none").hidden = cards.size > 0;
}

// -- following

// Browsers have six connections to a host, so only the jobs that are first in the queue are followed by events.
function schedule() {
  const order = ({ video }) => `${video.status} ${video.id}`; // "in_progress" comes before "queued"
  const waiting = [...cards.values()].filter(isOpen).sort((a, b) => (order(a) < order(b) ? -1 : 1));
  for (const card of waiting) {
    if (followed.size < FOLLOWED && !followed.has(card.video.id)) follow(card);
  }
}

async function follow(card) {
  const stopper = new AbortController(), id = card.video.id;
  followed.set(id, stopper);
  let seen = "";
  while (!stopper.signal.aborted && cards.has(id) && isOpen(card)) {
    try {
      const headers = seen ? { "last-event-id": seen } : {};
      const answer = await ask(`/v1/videos/${id}/events`, { headers, signal: stopper.signal });
      if (answer.status === 204) break;
      for await (const event of events(answer.body)) {
        seen = event.id || seen;
        if (event.kind === "deleted") drop(card);
        else show(event.data);
        if (card.video.preview && card.video.phase === "denoise" && card.video.step >= 2) preview(card);
      }
    } catch (error) {
      if (error.status === 404) drop(card);
      if (error.status < 500) break;
      if (!stopper.signal.aborted) find(".status", card.element).textContent = "No connection; trying again.";
    }
    if (isOpen(card)) await new Promise((go) => setTimeout(go, AGAIN_MS));
  }
  if (followed.get(id) === stopper) followed.delete(id);
  if (!stopper.signal.aborted) schedule();
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const said = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/s)));
      if (said.data) yield { id: said.id, kind: said.event, data: parse(said.data) };
    }
  }
}

async function preview(card) {
  if (card.fetching) return;
  card.fetching = true;
  try {
    const url = await media(card, "preview");
    if (url && card.video.status === "in_progress") screen(card, "img", url, { alt: "Preview" });
  } catch { /* the next step has another */ } finally {
    card.fetching = false;
  }
}

function stop() {
  for (const stopper of followed.values()) stopper.abort();
  followed.clear();
}

// -- start

function start() {
  last = null;
  const entry = find("#entry"), form = find("#make"), leave = find("#forget");
  leave.hidden = !sessionStorage.getItem(STORED);
  leave.addEventListener("click", () => forget());
  entry?.addEventListener("submit", async (event) => {
    event.preventDefault();
    sessionStorage.setItem(STORED, find("#key").value.trim());
    await open().catch((error) => { sessionStorage.removeItem(STORED); tell(error.message); });
  });
  find("#key")?.focus();
  if (!form) return;
  prepare(form);
  pictures = new IntersectionObserver((seen) => {
    for (const { target, isIntersecting } of seen) {
      const card = cards.get(target.id);
      if (!isIntersecting || !card) continue;
      pictures.unobserve(target);
      media(card, "thumbnail").then((url) => url && find(".screen", target).firstElementChild?.localName !== "video" && screen(card, "img", url, { alt: "" }), () => {});
    }
  });
  find("#older").addEventListener("click", () => list(last).then(schedule, (error) => tell(error.message)));
  list().then(schedule, (error) => tell(error.message));
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) stop();
  else if (find("#make")) list().then(schedule, () => {});
});
setInterval(() => { // for jobs that are not followed
  if (!document.hidden && [...cards.values()].filter(isOpen).length > followed.size) list().then(schedule, () => {});
}, LOOK_MS);
if (find("#entry") && sessionStorage.getItem(STORED)) {
  open().catch((error) => { sessionStorage.removeItem(STORED); tell(error.message); });
} else {
  start();
}
