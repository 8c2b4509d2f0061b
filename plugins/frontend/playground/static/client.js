/* The server as the page sees it: requests with the key, event streams, and generated text whose
   tokens are known. Nothing here touches the page. */

const KEY = "cythera.playground.key";
const MAX_GROUP = 8; // tokens that may share one character before they are shown as they come

export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
};

export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status; // 0: the server could not be reached, or broke off
  }
}

/** Send a request; with a body it is a POST of JSON. Paths are relative to the page. */
export async function request(path, { body, signal } = {}) {
  const headers = {};
  if (apiKey.get()) headers.authorization = `Bearer ${apiKey.get()}`;
  if (body) headers["content-type"] = "application/json";
  const method = body ? "POST" : "GET";
  let response;
  try {
    response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server does not answer.");
  }
  if (!response.ok) throw new ServerError(response.status, await readProblem(response));
  return response;
}

async function readProblem(response) {
  const fallback = `The server answered ${response.status} ${response.statusText}`.trim();
  try {
    return (await response.json()).error?.message || fallback;
  } catch {
    return fallback;
  }
}

/** How far the server is: {phase, percent, error}. Phase "ready" if it serves, "stalled" if it has
 * stopped getting on with its work, "offline" if it does not answer. */
export async function readiness() {
  try {
    const response = await fetch("readyz");
    if (response.ok) return { phase: "ready", percent: 100, error: "" };
    const { phase = "starting", percent = 0, error = "" } = await response.json();
    return { phase: phase === "ready" ? "stalled" : phase, percent, error };
  } catch {
    return { phase: "offline", percent: 0, error: "" };
  }
}

/** The `data` of each server-sent event. */
export async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (!line && data.length) yield data.splice(0).join("\n");
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The connection broke off.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Stream a chat or text completion: {spans, finishReason, usage, warnings} again and again. */
export async function* generate(path, body, signal) {
  const options = { stream: true, stream_options: { include_usage: true } };
  const response = await request(path, { body: { ...body, ...options }, signal });
  const aligner = new Aligner();
  for await (const data of readEvents(response)) {
    if (data === "[DONE]") {
      yield { spans: aligner.flush(), finishReason: null, usage: null, warnings: [] };
      return;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(response.status, chunk.error.message);
    const choice = chunk.choices[0];
    yield {
      spans: choice ? aligner.push(readText(choice), readTokens(choice.logprobs)) : [],
      finishReason: choice?.finish_reason ?? null,
      usage: chunk.usage ?? null,
      warnings: chunk.warnings ?? [],
    };
  }
  throw new ServerError(0, "The server broke off before the answer was complete.");
}

const readText = (choice) => (choice.delta ? choice.delta.content : choice.text) ?? "";

/** Tokens as {text, bytes, logprob, alternatives}, from the shape of either kind of completion. */
function readTokens(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((entry) => ({
      text: entry.token,
      bytes: entry.bytes,
      logprob: entry.logprob,
      alternatives: entry.top_logprobs.map(({ token, logprob }) => ({ text: token, logprob })),
    }));
  }
  return (logprobs.tokens ?? []).map((text, index) => ({
    text,
    bytes: null,
    logprob: logprobs.token_logprobs[index],
    alternatives: Object.entries(logprobs.top_logprobs?.[index] ?? {}).map(([other, logprob]) => ({
      text: other,
      logprob,
    })),
  }));
}

/** Finds out which piece of a text each token has become.
 *
 * Text lags behind tokens: half a character, or what may begin a stop text, is held back. So both are
 * kept until they agree; several tokens that make one character become one span. What never agrees,
 * such as a special token that is not shown, is shown together with the text beside it. */
export class Aligner {
  #text = "";
  #tokens = [];

  push(text, tokens) {
    this.#text += text;
    this.#tokens.push(...tokens);
    const spans = [];
    for (let span = this.#next(); span; span = this.#next()) spans.push(span);
    return spans;
  }

  flush() {
    return this.#text ? [this.#take(this.#text.length, this.#tokens.length)] : [];
  }

  #next() {
    const text = this.#text;
    if (!text) return null;
    let joined = null;
    for (let count = 1; count <= this.#tokens.length; count++) {
      joined = joinTokens(this.#tokens.slice(0, count));
      if (!joined) continue;
      if (text.startsWith(joined)) return this.#take(joined.length, count);
      if (joined.startsWith(text)) return null;
    }
    const canGrow = joined === null && this.#tokens.length > 0 && this.#tokens.length < MAX_GROUP;
    return canGrow ? null : this.#take(text.length, this.#tokens.length);
  }

  #take(length, count) {
    const text = this.#text.slice(0, length);
    this.#text = this.#text.slice(length);
    return { text, tokens: this.#tokens.splice(0, count) };
  }
}

/** The text of consecutive tokens; null while their bytes end in the middle of a character. */
function joinTokens(tokens) {
  if (!tokens.every((token) => token.bytes)) return tokens.map((token) => token.text).join("");
  const bytes = new Uint8Array(tokens.flatMap((token) => token.bytes));
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return null;
  }
}
