// The chat page: texts of models, servers and users become text nodes only, never markup.
"use strict";

const part = (id) => document.getElementById(id);
let messages = [];
let key = "";
let running = null; // the AbortController of the answer that is coming

function headers() {
  const found = { "Content-Type": "application/json" };
  if (key) found.Authorization = `Bearer ${key}`;
  return found;
}

function show(role, text) {
  const article = document.createElement("article");
  article.className = role;
  article.textContent = text;
  part("log").append(article);
  article.scrollIntoView({ block: "end" });
  return article;
}

function note(text) {
  const line = document.createElement("p");
  line.className = "note";
  line.textContent = text;
  part("log").append(line);
  line.scrollIntoView({ block: "end" });
}

function complain(text) {
  part("problem").textContent = text;
  part("problem").hidden = !text;
}

// The message of an answer that is no success, in the API's own form where it is one.
async function refusal(response) {
  if (response.status === 401) part("access").hidden = false;
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}

async function loadModels() {
  complain("");
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (response.status === 401 && !key) {
      part("access").hidden = false;
      part("key").focus();
      return;
    }
    if (!response.ok) throw new Error(await refusal(response));
    const models = (await response.json()).data;
    part("model").replaceChildren(...models.map((model) => new Option(model.id, model.id)));
    part("model").disabled = models.length < 2;
    part("access").hidden = true;
    part("text").focus();
  } catch (error) {
    complain(error.message);
  }
}

// The values of a stream of server-sent events, up to [DONE].
async function* events(body) {
  let rest = "";
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the connection ended before the answer did");
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function request() {
  const system = part("system").value.trim();
  const found = {
    model: part("model").value,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    stream: true,
    stream_options: { include_usage: true },
  };
  for (const [name, id] of [["temperature", "temperature"], ["max_tokens", "most"], ["seed", "seed"]]) {
    const value = part(id).valueAsNumber;
    if (!Number.isNaN(value)) found[name] = value;
  }
  return found;
}

// Show an answer as it comes; return its text, and what is said below it.
async function answer(article, signal) {
  const begin = performance.now();
  let text = "";
  let reason = "";
  let usage = null;
  const body = JSON.stringify(request());
  const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body, signal });
  if (!response.ok) throw new Error(await refusal(response));
  try {
    for await (const event of events(response.body)) {
      const [choice] = event.choices;
      const more = choice?.delta.content ?? "";
      if (more) {
        const log = part("log");
        const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
        text += more;
        article.append(more);
        if (atEnd) article.scrollIntoView({ block: "end" });
      }
      reason = choice?.finish_reason ?? reason;
      usage = event.usage ?? usage;
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    reason = "stopped";
  }
  const seconds = ((performance.now() - begin) / 1000).toFixed(1);
  const ends = { length: ", cut at the most tokens", stopped: ", stopped" };
  return [text, `${usage ? `${usage.completion_tokens} tokens, ` : ""}${seconds} s${ends[reason] ?? ""}`];
}

function busy(controller) {
  running = controller;
  part("send").hidden = controller !== null;
  part("stop").hidden = controller === null;
}

async function send() {
  const asked = part("text").value;
  if (!asked.trim() || running) return;
  const conversation = messages;
  complain("");
  part("text").value = "";
  const question = show("user", asked);
  const article = show("assistant", "");
  article.setAttribute("aria-busy", "true");
  const controller = new AbortController();
  busy(controller);
  messages = [...conversation, { role: "user", content: asked }];
  try {
    const [text, said] = await answer(article, controller.signal);
    if (controller !== running) return; // a new chat was begun
    messages = [...messages, { role: "assistant", content: text }];
    note(said);
  } catch (error) {
    if (controller !== running) return;
    // what failed is no part of the conversation, and can be sent again
    messages = conversation;
    question.remove();
    article.remove();
    part("text").value = part("text").value || asked;
    if (error.name !== "AbortError") complain(error.message);
  } finally {
    article.removeAttribute("aria-busy");
    if (controller === running) busy(null);
  }
}

part("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
part("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
part("stop").addEventListener("click", () => running?.abort());
part("clear").addEventListener("click", () => {
  running?.abort();
  busy(null);
  messages = [];
  part("log").replaceChildren();
  complain("");
  part("text").focus();
});
part("access").addEventListener("submit", (event) => {
  event.preventDefault();
  key = part("key").value.trim();
  part("key").value = "";
  loadModels();
});
loadModels();
