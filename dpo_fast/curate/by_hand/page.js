"use strict";

const KEYS = {
  ArrowLeft: "left", 1: "left", ArrowRight: "right", 2: "right", 0: "tie", t: "tie", s: "skip", u: "undo",
};
const SAID = {left: "answer 1 is better", right: "answer 2 is better", tie: "a tie", skip: "skipped", undo: "taken back"};
const GONE = "The program does not respond. Rerun the same command and open the address that it prints.";
const STALE = "This page was out of date, so nothing was judged. Here is the current comparison.";

const element = (id) => document.getElementById(id);
const buttons = [...document.querySelectorAll("button")];
let state = null;
let busy = false;
let ending = null;

function say(text, isAlarm = false) {
  const message = element("message");
  message.textContent = text;
  message.classList.toggle("alarm", isAlarm);
}

// One request at a time: a key press during a request is ignored.
async function ask(path, order) {
  if (busy) return;
  busy = true;
  try {
    const response = await fetch(path, order && {
      method: "POST",
      headers: {"Content-Type": "application/json"},
      body: JSON.stringify(order),
    });
    if (response.ok || response.status === 409) {
      show(await response.json());
      if (response.status === 409) say(STALE, true);
      else if (order) say(`Saved: ${SAID[order.choice ?? "undo"]}`);
    } else if (response.status === 507) {
      say((await response.json()).error, true);
    } else {
      say((await response.text()).trim() || `error ${response.status}`, true);
    }
  } catch {
    say(GONE, true);
  } finally {
    busy = false;
  }
}

function act(action) {
  if (!state || (action === "undo" ? !state.can_undo : state.finished)) return;
  if (action === "undo") ask("undo", {place: state.place});
  else ask("judge", {place: state.place, choice: action});
}

function show(next) {
  const changed = state?.place !== next.place;
  state = next;
  const {done, total, agreed, repeated, seconds} = state;
  element("bar").max = total;
  element("bar").value = done;
  element("done").textContent = `${done} of ${total}`;
  element("agreement").textContent = repeated ? `${agreed} of ${repeated}` : "–";
  element("time").textContent = duration(seconds);
  document.title = `${done} of ${total} · dpo-fast label`;
  element("comparison").hidden = state.finished;
  element("end").hidden = !state.finished;
  element("choices").hidden = element("skip").hidden = state.finished;
  for (const button of buttons) button.disabled = button.id === "undo" ? !state.can_undo : state.finished;
  clearTimeout(ending);
  if (state.finished) showEnd();
  else if (changed) showComparison();
}

function showComparison() {
  element("prompt").replaceChildren(...state.prompt.flatMap(({role, text}) => [
    ...(role ? [paragraph(role, "role")] : []), paragraph(text),
  ]));
  for (const side of ["left", "right"]) {
    const box = element(side);
    const text = state[side];
    box.textContent = text || "empty";
    box.dir = "auto";
    box.classList.toggle("empty", !text);
    const length = state[`${side}_length`];
    element(`${side}-length`).textContent = `${length.toLocaleString("en")} character${length === 1 ? "" : "s"}`;
  }
  for (const id of ["prompt", "left", "right"]) element(id).scrollTop = 0;
  window.scrollTo(0, 0);
}

function paragraph(text, kind = "") {
  const made = document.createElement("p");
  made.textContent = text;
  made.className = kind;
  made.dir = "auto";
  return made;
}

function showEnd() {
  const {done, skipped, agreed, repeated, seconds, seconds_to_end: left} = state;
  const parts = [`${done - skipped} judged`, `${skipped} skipped`, duration(seconds)];
  if (repeated) parts.push(`you agreed with yourself ${agreed} of ${repeated} times`);
  element("summary").textContent = parts.join(" · ");
  element("farewell").textContent = `The program exits in ${Math.round(left)} seconds; until then, u undoes the last judgement.`;
  ending = setTimeout(() => {
    for (const button of buttons) button.disabled = true;
    state.can_undo = false;
    say("");
    element("farewell").textContent = "The program has ended and the result is written. You can close this page.";
  }, 1000 * left);
}

function duration(seconds) {
  const whole = Math.round(seconds);
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  const tail = `${String(minutes).padStart(hours ? 2 : 1, "0")}:${String(whole % 60).padStart(2, "0")}`;
  return hours ? `${hours}:${tail}` : tail;
}

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (!Object.hasOwn(KEYS, key)) return;
  event.preventDefault();
  act(KEYS[key]);
});
for (const button of buttons) button.addEventListener("click", () => act(button.dataset.choice ?? "undo"));
// Another tab may have moved on in the meantime.
document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible" && state && !state.finished) ask("state");
});

ask("state");
