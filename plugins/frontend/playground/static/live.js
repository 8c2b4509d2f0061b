/* The live view: numbers, a minute of throughput, and the most recent requests. */

import { readEvents, request } from "./client.js";

const NUM_ROWS = 40;
const NUM_SAMPLES = 120;
const SAMPLE_INTERVAL = 500; // ms, so that all samples are one minute
const RETRY_DELAY = 3000; // ms
const STATES = { stop: "finished", length: "finished", abort: "aborted", error: "failed" }; // by reason

const whole = new Intl.NumberFormat(undefined, { maximumFractionDigits: 0 });
const tenths = new Intl.NumberFormat(undefined, { maximumFractionDigits: 1 });
const formatRate = (rate) => (rate < 100 ? tenths : whole).format(rate);

export class LiveView {
  #root;
  #rows = new Map(); // number of the request → its row
  #samples = new Array(NUM_SAMPLES).fill(0);
  #rate = 0;

  constructor(root) {
    this.#root = root;
    setInterval(() => this.#sample(), SAMPLE_INTERVAL);
    new ResizeObserver(() => this.#draw()).observe(root.querySelector("#spark"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
  }

  /** Keep showing what the server tells, until it wants another key.
   *
   * @param onBreak called whenever the server no longer tells anything. */
  async follow(onBreak) {
    for (;;) {
      try {
        const response = await request("playground/events");
        this.#begin();
        for await (const data of readEvents(response)) this.#show(JSON.parse(data));
      } catch (error) {
        if (error.status === 401) return;
      } finally {
        this.#end();
      }
      onBreak();
      await new Promise((resolve) => setTimeout(resolve, RETRY_DELAY));
    }
  }

  #begin() {
    this.#rows.clear();
    this.#find("#requests").replaceChildren();
    this.#find("#feed-state").textContent = "connected";
    this.#find("#feed-state").dataset.on = "";
  }

  #end() {
    this.#rate = 0;
    this.#find("#feed-state").textContent = "not connected";
    delete this.#find("#feed-state").dataset.on;
  }

  #show(message) {
    this.#rate = message.output_rate;
    for (const name of ["num_running", "num_waiting", "num_finished"]) {
      this.#stat(name, whole.format(message[name]));
    }
    const percent = 100 * message.kv_usage;
    this.#stat("kv_usage", `${(percent < 10 ? tenths : whole).format(percent)} %`);
    this.#stat("output_rate", formatRate(message.output_rate));
    this.#stat("prompt_rate", formatRate(message.prompt_rate));
    const meter = this.#find("#kv-meter");
    meter.setAttribute("aria-valuenow", percent.toFixed(1));
    meter.firstElementChild.style.inlineSize = `${percent}%`;
    this.#find("#incidents").textContent = [
      message.num_preempted && `${whole.format(message.num_preempted)} preempted`,
      message.num_refused && `${whole.format(message.num_refused)} refused`,
    ]
      .filter(Boolean)
      .join(" · ");
    for (const view of message.requests) this.#showRequest(view);
  }

  #showRequest(view) {
    const list = this.#find("#requests");
    let row = this.#rows.get(view.number);
    if (!row) {
      row = makeRow();
      this.#rows.set(view.number, row);
      list.prepend(row);
      while (list.childElementCount > NUM_ROWS) list.lastElementChild.remove();
      for (const [number, { isConnected }] of this.#rows) if (!isConnected) this.#rows.delete(number);
    }
    fillRow(row, view);
    this.#find("#no-requests").hidden = true;
  }

  #sample() {
    this.#samples.push(this.#rate);
    this.#samples.shift();
    this.#draw();
  }

  #draw() {
    const canvas = this.#find("#spark");
    const { clientWidth: width, clientHeight: height } = canvas;
    if (!width) return; // the panel is closed
    canvas.width = width * devicePixelRatio;
    canvas.height = height * devicePixelRatio;
    const style = getComputedStyle(canvas);
    const context = canvas.getContext("2d");
    context.scale(devicePixelRatio, devicePixelRatio);
    const top = Math.max(1, ...this.#samples) * 1.08;
    const line = new Path2D();
    this.#samples.forEach((rate, index) => {
      line.lineTo((index / (NUM_SAMPLES - 1)) * width, height - 1 - (rate / top) * (height - 3));
    });
    context.strokeStyle = style.color;
    context.lineWidth = 1.5;
    context.lineJoin = "round";
    context.stroke(line);
    line.lineTo(width, height);
    line.lineTo(0, height);
    context.globalAlpha = 0.14;
    context.fillStyle = style.color;
    context.fill(line);
  }

  #find(selector) {
    return this.#root.querySelector(selector);
  }

  #stat(name, text) {
    this.#find(`[data-stat=${name}]`).textContent = text;
  }
}

function makeRow() {
  const row = document.createElement("li");
  for (const name of ["state", "id", "tokens", "time"]) {
    const cell = document.createElement("span");
    cell.className = name;
    row.append(cell);
  }
  return row;
}

function fillRow(row, view) {
  const [state, id, tokens, time] = row.children;
  const name = STATES[view.state] ?? view.state;
  row.dataset.state = name;
  row.title = [view.id, view.error].filter(Boolean).join("\n");
  state.textContent = name === "finished" ? `${name}: ${view.state}` : name;
  id.textContent = view.id;
  tokens.textContent = view.state === "refused" ? "" : describeTokens(view);
  time.textContent = view.duration === null ? "" : `${view.duration.toFixed(2)} s`;
}

function describeTokens({ num_prompt: prompt, num_cached: cached, num_output: output }) {
  const before = prompt === null ? "?" : whole.format(prompt);
  return `${before}${cached ? ` (${whole.format(cached)} cached)` : ""} → ${whole.format(output)}`;
}
