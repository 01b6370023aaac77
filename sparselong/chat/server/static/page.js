// The page: one conversation at a time, kept in the run directory after every answer.

import { complete, deleteConversation, describe, keepConversation, listConversations, readConversation } from "./endpoint.js";
import { render } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "max_new_tokens", "seed"];
const REQUEST_NAMES = { max_new_tokens: "max_tokens" };
let start; // what /chat/start says: model, format, settings
let conversation;
let name = null;
let running = null; // AbortController of the answer in progress
const REDRAW_MS = 100; // an answer is drawn anew each time

function fresh() {
  return { ...start.format, model: start.model, settings: {}, messages: [] };
}

function title(text) {
  const stamp = new Date().toISOString().slice(0, 19).replace("T", " ").replaceAll(":", ".");
  const words = text.replace(/[^\p{L}\p{N} ]/gu, " ").replace(/ +/g, " ").trim();
  return `${stamp} ${[...words].slice(0, 40).join("")}`.trim(); // whole characters
}

function tell(text) {
  $("notice").hidden = !text;
  $("notice").textContent = text;
}

function settings() {
  const found = { reasoning: $("reasoning").value };
  for (const key of NUMBERS) if ($(key).value !== "") found[key] = Number($(key).value);
  return found;
}

function showSettings(values) {
  $("reasoning").value = values.reasoning ?? "medium";
  for (const key of NUMBERS) $(key).value = values[key] ?? "";
}

function draw(message) {
  const node = document.createElement("article");
  node.className = message.role;
  fill(node, message);
  $("messages").append(node);
  return node;
}

function fill(node, message) {
  node.replaceChildren();
  if (message.role !== "assistant") {
    node.textContent = message.content ?? "";
    return;
  }
  if (message.thinking && $("thinking").checked) add(node, "thinking", message.thinking);
  const body = document.createElement("div");
  body.append(render(message.content ?? ""));
  node.append(body);
  for (const call of message.tool_calls ?? []) add(node, "call", `${call.function.name}(${call.function.arguments})`);
}

function add(node, kind, text) {
  const part = document.createElement("div");
  part.className = kind;
  part.textContent = text;
  node.append(part);
}

function drawAll() {
  $("messages").replaceChildren();
  conversation.messages.filter((m) => m.role !== "system").forEach(draw);
  $("system").value = conversation.messages.find((m) => m.role === "system")?.content ?? "";
  update();
  scroll(true);
}

function scroll(always = false) {
  const area = $("messages");
  if (always || area.scrollHeight - area.scrollTop - area.clientHeight < 120) area.scrollTop = area.scrollHeight;
}

function update() {
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  $("retry").disabled = Boolean(running) || conversation.messages.at(-1)?.role !== "assistant";
  for (const id of ["new", "import", "delete"]) $(id).disabled = Boolean(running);
}

async function send() {
  const text = $("question").value;
  if (running || !text.trim()) return;
  $("question").value = "";
  size();
  conversation.messages.push({ role: "user", content: text });
  draw(conversation.messages.at(-1));
  name ??= title(text);
  await keep(); // the question survives even if no answer comes
  if (!(await reply())) {
    conversation.messages.pop();
    $("question").value = text;
    drawAll();
    await keep();
  }
}

async function retry() {
  if (running || conversation.messages.at(-1)?.role !== "assistant") return;
  const last = conversation.messages.pop();
  drawAll();
  if (!(await reply())) conversation.messages.push(last);
  drawAll();
}

function body(used) {
  const { reasoning, ...rest } = used;
  const sampling = Object.fromEntries(Object.entries(rest).map(([key, value]) => [REQUEST_NAMES[key] ?? key, value]));
  const messages = conversation.messages.filter((m) => m.role !== "system").map(({ thinking, ...message }) => message);
  const system = $("system").value.trim();
  if (system) messages.unshift({ role: "system", content: system });
  return { model: start.model, messages, stream: true, stream_options: { include_usage: true }, reasoning_effort: reasoning, ...sampling };
}

// Returns whether there is an answer, whole or stopped.
async function reply() {
  tell("");
  running = new AbortController();
  update();
  const message = { role: "assistant", content: "" };
  const node = draw(message);
  const begun = performance.now();
  const seen = { first: null, usage: null, reason: null, settings: settings() };
  let timer = null;
  const redraw = () => {
    timer = null;
    fill(node, message);
    scroll();
  };
  try {
    for await (const event of complete(body(seen.settings), running.signal)) {
      const choice = event.choices[0];
      if (event.usage) seen.usage = event.usage;
      if (!choice) continue;
      take(message, choice.delta);
      seen.reason = choice.finish_reason ?? seen.reason;
      if (seen.first === null && (message.content || message.thinking)) seen.first = performance.now() - begun;
      showProgress(begun, message);
      timer ??= setTimeout(redraw, REDRAW_MS);
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      tell(error.message);
      if (!message.content && !message.thinking) node.remove();
    }
  } finally {
    running = null;
    clearTimeout(timer);
  }
  const has = Boolean(message.content || message.thinking || message.tool_calls);
  if (has) await finish(message, node, seen, begun);
  update();
  $("question").focus();
  return has;
}

function take(message, delta) {
  if (delta.content) message.content += delta.content;
  if (delta.reasoning_content) message.thinking = (message.thinking ?? "") + delta.reasoning_content;
  if (delta.tool_calls) message.tool_calls = delta.tool_calls.map(({ type, function: called }) => ({ type, function: called }));
}

function showProgress(begun, message) {
  const seconds = (performance.now() - begun) / 1000;
  $("stats").textContent = `${message.content ? "answering" : "thinking"} … ${seconds.toFixed(1)} s`;
}

async function finish(message, node, seen, begun) {
  fill(node, message);
  if (seen.reason !== "stop" && seen.reason !== "tool_calls") add(node, "cut", seen.reason === "length" ? "(cut: most new tokens, or no more room)" : "(stopped)");
  scroll();
  conversation.messages.push(message);
  conversation.settings = seen.settings;
  showStats(seen, begun);
  await keep();
}

function showStats(seen, begun) {
  const whole = (performance.now() - begun) / 1000;
  if (!seen.usage) {
    $("stats").textContent = `stopped after ${whole.toFixed(1)} s`;
    return;
  }
  const { completion_tokens: tokens, prompt_tokens: prompt, prompt_tokens_details: details, seconds } = seen.usage;
  const later = seconds.whole - seconds.first_token;
  const speed = tokens > 1 && later > 0 ? `, ${((tokens - 1) / later).toFixed(1)} tokens/s` : "";
  $("stats").textContent = `${tokens} tokens${speed}, first token after ${seconds.first_token.toFixed(2)} s; prompt ${prompt} tokens, ${details.cached_tokens} reused`;
}

async function keep() {
  const system = $("system").value.trim();
  const rest = conversation.messages.filter((m) => m.role !== "system");
  conversation.messages = system ? [{ role: "system", content: system }, ...rest] : rest;
  try {
    await keepConversation(name, conversation);
    sessionStorage.setItem("sparselong-open", name);
    await showNames();
  } catch (error) {
    tell(`The conversation was not kept: ${error.message}`);
  }
}

async function showNames() {
  const names = await listConversations();
  $("names").replaceChildren(...names.map((each) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = each;
    if (each === name) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => open(each));
    const item = document.createElement("li");
    item.append(button);
    return item;
  }));
}

async function open(each) {
  if (running) return;
  try {
    conversation = await readConversation(each);
    name = each;
    sessionStorage.setItem("sparselong-open", name);
    showSettings({ ...start.settings, ...conversation.settings });
    tell("");
    drawAll();
    await showNames();
  } catch (error) {
    tell(error.message);
  }
}

function begin() {
  conversation = fresh();
  name = null;
  sessionStorage.removeItem("sparselong-open");
  tell("");
  drawAll();
  showNames();
  $("question").focus();
}

async function importFile() {
  const [file] = $("file").files;
  $("file").value = "";
  if (!file) return;
  try {
    if (file.size > start.most_bytes) throw new Error(`${file.name} has more than ${start.most_bytes.toLocaleString()} bytes`);
    const found = JSON.parse(await file.text());
    const chosen = title(file.name.replace(/\.json$/, ""));
    await keepConversation(chosen, found);
    await open(chosen);
  } catch (error) {
    tell(`${file.name} was not imported: ${error.message}`);
  }
}

function exportFile() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(conversation, null, 1)], { type: "application/json" }));
  link.download = `${name ?? "conversation"}.json`;
  link.click();
  URL.revokeObjectURL(link.href);
}

async function remove() {
  if (!name || !window.confirm(`Delete the conversation "${name}"?`)) return;
  await deleteConversation(name).catch((error) => tell(error.message));
  begin();
}

function toggle(button, part) {
  const shown = $(part).hidden;
  $(part).hidden = !shown;
  $(button).setAttribute("aria-expanded", String(shown));
}

function size() {
  const box = $("question");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

function listen() {
  $("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("question").addEventListener("input", size);
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && running) running.abort(); });
  $("stop").addEventListener("click", () => running?.abort());
  $("retry").addEventListener("click", retry);
  $("new").addEventListener("click", begin);
  $("import").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", importFile);
  $("export").addEventListener("click", exportFile);
  $("delete").addEventListener("click", remove);
  $("thinking").addEventListener("change", drawAll);
  $("settings").addEventListener("submit", (event) => event.preventDefault());
  $("toggle-list").addEventListener("click", () => toggle("toggle-list", "list"));
  $("toggle-settings").addEventListener("click", () => toggle("toggle-settings", "settings"));
}

async function main() {
  try {
    start = await describe();
  } catch (error) {
    tell(error.message);
    return;
  }
  $("model").textContent = start.model;
  document.title = start.model;
  showSettings(start.settings);
  listen();
  const last = sessionStorage.getItem("sparselong-open");
  begin();
  if (last && (await listConversations()).includes(last)) await open(last);
}

main();
