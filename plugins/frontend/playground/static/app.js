/* The page: settings, chat, completion, and what the server needs before it can answer. */

import { apiKey, generate, readiness, request } from "./client.js";
import { LiveView } from "./live.js";

const NUM_ALTERNATIVES = 5;
const POLL_INTERVAL = 500; // ms between two looks at a server that is not ready
const NEAR_END = 48; // px from the end within which an answer that grows is followed

const $ = (id) => document.getElementById(id);
const make = (tag, className, text = "") =>
  Object.assign(document.createElement(tag), { className, textContent: text });
const makeButton = (text, onclick) =>
  Object.assign(make("button", "plain", text), { type: "button", onclick });

// --- settings ------------------------------------------------------------------------------------

const fields = [...document.querySelectorAll("[data-field]")].map((row) => ({
  name: row.dataset.field,
  row,
  number: row.querySelector("input[type=number]"),
  range: row.querySelector("input[type=range]"),
}));

function showField({ row, number, range }) {
  row.classList.toggle("set", number.value !== "");
  if (range) range.value = number.value === "" ? range.defaultValue : number.value;
}

for (const field of fields) {
  field.number.addEventListener("input", () => showField(field));
  field.range?.addEventListener("input", () => {
    field.number.value = field.range.value;
    showField(field);
  });
}

/** What the next request asks for: only what was set, the server decides the rest. */
function readSettings() {
  const settings = { model: $("model").value };
  for (const { name, number } of fields) {
    if (number.value !== "") settings[name] = number.valueAsNumber;
  }
  const stop = $("stop").value.split("\n").filter(Boolean);
  if (stop.length) settings.stop = stop.map((line) => line.replaceAll("\\n", "\n"));
  return settings;
}

$("reset").addEventListener("click", () => {
  $("fields").reset();
  fields.forEach(showField);
  showTint();
});

function showTint() {
  document.body.classList.toggle("tinted", $("tint").checked);
}
$("tint").addEventListener("change", showTint);
showTint();

// --- tokens --------------------------------------------------------------------------------------

const tokensOf = new WeakMap(); // span → its tokens
const popover = $("popover");
let shown = null;

const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(logprob < -4.6 ? 2 : 1)} %`;

/** The text of a token with every character visible. */
function quote(text) {
  const escaped = JSON.stringify(text).slice(1, -1).replaceAll('\\"', '"');
  return escaped.replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length)) || "(empty)";
}
/** A piece of an answer; its tint is the probability of the least likely token in it. */
function makeSpan({ text, tokens }) {
  const span = make("span", "", text);
  const logprobs = tokens.map((token) => token.logprob).filter((logprob) => logprob !== null);
  if (!logprobs.length) return span;
  span.className = "token";
  span.tabIndex = -1;
  span.style.setProperty("--p", Math.exp(Math.min(...logprobs)).toFixed(3));
  tokensOf.set(span, tokens);
  return span;
}

function makeBar(text, logprob, isChosen) {
  const bar = make("li", isChosen ? "chosen" : "");
  const fill = make("i", "");
  fill.style.inlineSize = `${100 * Math.exp(logprob)}%`;
  bar.append(fill, make("code", "", quote(text)), make("span", "", percent(logprob)));
  return bar;
}

function describeToken(token) {
  const box = make("div", "choice");
  const list = make("ol", "bars");
  const others = token.alternatives.filter(({ text }) => text !== token.text);
  const all = [...others, token].sort((a, b) => b.logprob - a.logprob);
  list.append(...all.map((one) => makeBar(one.text, one.logprob, one === token)));
  box.append(list);
  return box;
}

function showPopover(span) {
  if (span === shown) return;
  hidePopover();
  shown = span;
  span.classList.add("shown");
  span.setAttribute("aria-describedby", "popover");
  popover.replaceChildren(...tokensOf.get(span).filter((t) => t.logprob !== null).map(describeToken));
  popover.hidden = false;
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const fits = box.bottom + popover.offsetHeight + 12 < innerHeight;
  const left = Math.min(box.left, innerWidth - popover.offsetWidth - 12);
  popover.style.insetInlineStart = `${Math.max(12, left)}px`;
  popover.style.insetBlockStart = `${fits ? box.bottom + 6 : Math.max(8, box.top - popover.offsetHeight - 6)}px`;
}

function hidePopover() {
  shown?.classList.remove("shown");
  shown?.removeAttribute("aria-describedby");
  shown = null;
  popover.hidden = true;
}

const findToken = (target) => target.closest?.(".token");
for (const kind of ["mouseover", "focusin", "click"]) {
  document.addEventListener(kind, ({ target }) => {
    const span = findToken(target);
    if (span) showPopover(span);
    else if (kind !== "focusin") hidePopover();
  });
}
document.addEventListener("scroll", hidePopover, { capture: true, passive: true });

/** Left and right walk through the tokens of an answer that has the focus. */
function walk(event) {
  if (event.key !== "ArrowRight" && event.key !== "ArrowLeft") return;
  const spans = [...event.currentTarget.querySelectorAll(".token")];
  const index = spans.indexOf(document.activeElement);
  const next = spans[index + (event.key === "ArrowRight" ? 1 : -1)] ?? spans[Math.max(index, 0)];
  next?.focus();
  if (next) event.preventDefault();
}

// --- answers -------------------------------------------------------------------------------------

/** Text that is being generated, and what is said about it below. */
class Answer {
  constructor(list, label) {
    this.text = "";
    this.element = make("article", "turn assistant");
    this.body = make("div", "body");
    this.body.tabIndex = 0;
    this.body.role = "group";
    this.body.ariaLabel = label;
    this.body.addEventListener("keydown", walk);
    this.foot = make("footer", "foot");
    this.element.append(make("h3", "who", label), this.body, this.foot);
    list.append(this.element);
  }

  add(spans) {
    for (const span of spans) {
      this.text += span.text;
      this.body.append(makeSpan(span));
    }
  }

  /** Say how it ended, and offer what can be done with it. */
  close(facts, buttons) {
    const copy = makeButton("Copy", async () => {
      await navigator.clipboard.writeText(this.text);
      announce("Copied.");
      copy.textContent = "Copied";
      setTimeout(() => (copy.textContent = "Copy"), 1500);
    });
    this.foot.replaceChildren(make("span", "facts", facts.join(" · ")), copy, ...buttons);
    this.element.classList.toggle("empty", !this.text);
  }
}

let running = null; // the AbortController of the answer that is being generated

/** Stream one answer into the page; `makeButtons` says what is offered below it in the end. */
async function stream(answer, path, body, scroller, makeButtons) {
  const clock = new Stopwatch();
  const ending = { reason: "stopped", usage: null };
  let follows = true;
  running = new AbortController();
  showRunning(true);
  hideError();
  answer.element.ariaBusy = "true";
  if ($("logprobs").checked) Object.assign(body, logprobFields(path));
  try {
    for await (const part of generate(path, body, running.signal)) {
      follows = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_END;
      if (part.spans.length) clock.tick();
      answer.add(part.spans);
      ending.reason = part.finishReason ?? ending.reason;
      ending.usage = part.usage ?? ending.usage;
      if (part.warnings.length) showError(part.warnings.join("\n"));
      if (follows) scroller.scrollTop = scroller.scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      ending.reason = "failed";
      showFailure(error);
    }
  }
  running = null;
  showRunning(false);
  answer.element.ariaBusy = "false";
  const facts = describe(ending, clock);
  answer.close(facts, makeButtons());
  announce(`Answer: ${facts.join(", ")}.`);
  if (follows) scroller.scrollTop = scroller.scrollHeight;
}

const logprobFields = (path) =>
  path.endsWith("chat/completions")
    ? { logprobs: true, top_logprobs: NUM_ALTERNATIVES }
    : { logprobs: NUM_ALTERNATIVES };

class Stopwatch {
  #begin = performance.now();
  #first = null;
  #last = null;

  tick() {
    this.#last = performance.now();
    this.#first ??= this.#last;
  }

  /** Seconds to the first text, and from there to the last. */
  get latency() {
    return this.#first === null ? null : (this.#first - this.#begin) / 1000;
  }
  get duration() {
    return this.#first === null ? 0 : (this.#last - this.#first) / 1000;
  }
}

const REASONS = { stop: "done", length: "max tokens reached" };

function describe({ reason, usage }, clock) {
  const facts = [REASONS[reason] ?? reason];
  const count = usage?.completion_tokens;
  if (count) facts.push(`${count} ${count === 1 ? "token" : "tokens"}`);
  if (count > 1 && clock.duration) facts.push(`${((count - 1) / clock.duration).toFixed(1)} tokens/s`);
  if (clock.latency !== null) facts.push(`first after ${clock.latency.toFixed(2)} s`);
  return facts;
}

function showRunning(isRunning) {
  for (const button of document.querySelectorAll("[data-send]")) {
    button.textContent = isRunning ? "Stop" : button.dataset.send;
    button.classList.toggle("stop", isRunning);
  }
  document.body.classList.toggle("busy", isRunning);
}

// --- chat ----------------------------------------------------------------------------------------

const turns = []; // {role, content, element}, without the system prompt
const messageBox = $("message");

function addUserTurn(content) {
  const element = make("article", "turn user");
  element.append(make("h3", "who", "You"), make("div", "body", content));
  $("transcript").append(element);
  turns.push({ role: "user", content, element });
}

async function answerChat() {
  $("welcome").hidden = true;
  for (const button of document.querySelectorAll(".regenerate")) button.remove();
  const scroller = $("chat-scroll");
  const answer = new Answer($("transcript"), "Model");
  scroller.scrollTop = scroller.scrollHeight;
  const system = $("system").value;
  const messages = turns.map(({ role, content }) => ({ role, content }));
  if (system) messages.unshift({ role: "system", content: system });
  const turn = { role: "assistant", content: "", element: answer.element };
  turns.push(turn);
  const body = { ...readSettings(), messages };
  await stream(answer, "v1/chat/completions", body, scroller, makeRegenerate);
  turn.content = answer.text;
}

function makeRegenerate() {
  const button = makeButton("Regenerate", regenerate);
  button.classList.add("regenerate");
  return [button];
}

function regenerate() {
  if (running) return;
  turns.pop().element.remove();
  answerChat();
}

function send() {
  const content = messageBox.value;
  if (running || !content.trim() || !isReady) return;
  dropUnanswered();
  messageBox.value = "";
  fit();
  addUserTurn(content);
  answerChat();
}

/** Forget a question that got no answer: chat templates want the roles to take turns. */
function dropUnanswered() {
  if (turns.at(-1)?.content === "") turns.splice(-2).forEach(({ element }) => element.remove());
}

/** Let the box be as high as its text. */
function fit() {
  messageBox.style.blockSize = "auto";
  messageBox.style.blockSize = `${messageBox.scrollHeight}px`;
}

messageBox.addEventListener("input", fit);
messageBox.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
$("chat-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else send();
});
$("clear").addEventListener("click", () => {
  running?.abort();
  turns.length = 0;
  $("transcript").replaceChildren();
  $("welcome").hidden = false;
  hideError();
  messageBox.focus();
});

// --- completion ----------------------------------------------------------------------------------

const promptBox = $("prompt");
let continuation = null;

async function complete() {
  if (running || !isReady) return;
  $("continuation").replaceChildren();
  $("adopt").hidden = true;
  const answer = new Answer($("continuation"), "Continuation");
  continuation = answer;
  const body = { ...readSettings(), prompt: promptBox.value };
  const again = () => [makeButton("Regenerate", complete)];
  await stream(answer, "v1/completions", body, $("completion-scroll"), again);
  $("adopt").hidden = !answer.text;
}

promptBox.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  complete();
});
$("completion-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else complete();
});
$("adopt").addEventListener("click", () => {
  promptBox.value += continuation.text;
  $("continuation").replaceChildren();
  $("adopt").hidden = true;
  promptBox.focus();
});

// --- tabs and panels -----------------------------------------------------------------------------

const tabs = [...document.querySelectorAll("[role=tab]")];

function select(tab) {
  for (const other of tabs) {
    const isSelected = other === tab;
    other.ariaSelected = String(isSelected);
    other.tabIndex = isSelected ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = !isSelected;
  }
  document.body.dataset.mode = tab.getAttribute("aria-controls");
  hidePopover();
}

for (const tab of tabs) {
  tab.addEventListener("click", () => select(tab));
  tab.addEventListener("keydown", ({ key }) => {
    if (key !== "ArrowLeft" && key !== "ArrowRight") return;
    const other = tabs[(tabs.indexOf(tab) + 1) % tabs.length];
    select(other);
    other.focus();
  });
}
select(tabs[0]);

/** Open a panel, or close all; only matters where there is no room for them beside the text. */
function showPanel(name) {
  document.body.dataset.panel = name;
  for (const button of document.querySelectorAll("[data-toggle]")) {
    button.ariaExpanded = String(button.dataset.toggle === name);
  }
}

for (const button of document.querySelectorAll("[data-toggle]")) {
  button.addEventListener("click", () => {
    const name = button.dataset.toggle;
    const isOpen = document.body.dataset.panel === name;
    showPanel(isOpen ? "" : name);
    document.querySelector(isOpen ? `.top [data-toggle=${name}]` : `#${name} .close`).focus();
  });
}

document.querySelector(".stage").addEventListener("click", () => showPanel(""));
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) running.abort();
  else showPanel("");
  hidePopover();
});

// --- the server ----------------------------------------------------------------------------------

const PHASES = {
  offline: "The server does not answer",
  starting: "The server is starting",
  loading: "Loading the weights",
  profiling: "Measuring memory",
  warming: "Warming up",
  stalled: "The server is stuck",
  draining: "The server is shutting down",
  stopped: "The server has stopped",
  failed: "The server could not start",
};

const live = new LiveView($("live"));
let isReady = false;
let isConnecting = false;
let isFollowing = false;

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

function announce(text) {
  $("announcer").textContent = text;
}

function showError(text) {
  $("error-text").textContent = text;
  $("error").hidden = false;
}

function hideError() {
  $("error").hidden = true;
}
$("dismiss").addEventListener("click", hideError);

function showFailure(error) {
  if (error.status === 401) {
    askForKey(error.message);
    return;
  }
  showError(error.message);
  if (error.status === 503 || error.status === 0) connect();
}

function showPhase({ phase, percent: done, error }) {
  $("phase").textContent = phase;
  $("phase").dataset.phase = phase;
  $("loading").hidden = phase === "ready";
  const text = PHASES[phase] ?? phase;
  $("loading-text").textContent = error ? `${text}: ${error}` : done ? `${text}, ${Math.round(done)} %` : `${text}.`;
  const bar = $("loading-bar");
  bar.hidden = ["offline", "stalled", "failed", "stopped"].includes(phase);
  if (done) bar.value = done;
  else bar.removeAttribute("value");
}

/** Wait until the server is ready, then learn its models and follow its events. */
async function connect() {
  if (isConnecting) return;
  isConnecting = true;
  isReady = false;
  try {
    await waitUntilReady();
    showModels((await (await request("v1/models")).json()).data);
    isReady = true;
    follow();
  } catch (error) {
    if (error.status === 401) askForKey(error.message);
    else showError(error.message);
  } finally {
    isConnecting = false;
  }
}

async function waitUntilReady() {
  for (;;) {
    const state = await readiness();
    showPhase(state);
    if (state.phase === "ready") return;
    await sleep(POLL_INTERVAL);
  }
}

async function follow() {
  if (isFollowing) return;
  isFollowing = true;
  await live.follow(() => connect());
  isFollowing = false;
}

function showModels(cards) {
  const options = cards.map(({ id }) => Object.assign(make("option", "", id), { value: id }));
  $("model").replaceChildren(...options);
  $("model").disabled = cards.length < 2;
}

function askForKey(problem) {
  if (apiKey.get() && problem) showError(problem);
  $("change-key").hidden = false;
  $("key-form").hidden = false;
  $("key").focus();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey.set($("key").value.trim());
  $("key").value = "";
  $("key-form").hidden = true;
  hideError();
  connect();
});
$("change-key").addEventListener("click", () => askForKey(""));

connect();
messageBox.focus();
