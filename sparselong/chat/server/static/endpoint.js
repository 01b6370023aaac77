// The endpoint's requests. Each throws an Error with the server's message.

const KEY = "sparselong-token";

export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  const token = sessionStorage.getItem(KEY);
  if (token) headers.Authorization = `Bearer ${token}`;
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) {
    const given = window.prompt("Password of this server");
    if (given) {
      sessionStorage.setItem(KEY, given);
      return ask(path, options);
    }
  }
  if (!response.ok) {
    const document = await response.json().catch(() => null);
    throw new Refused(document?.error?.message ?? `${response.status} ${response.statusText}`, response.status);
  }
  return response;
}

async function get(path) {
  return (await ask(path)).json();
}

export const describe = () => get("/chat/start");
export const listConversations = () => get("/conversations");
export const readConversation = (name) => get(`/conversations/${encodeURIComponent(name)}`);

export function keepConversation(name, conversation) {
  const headers = { "Content-Type": "application/json" };
  return ask(`/conversations/${encodeURIComponent(name)}`, { method: "PUT", headers, body: JSON.stringify(conversation) });
}

export function deleteConversation(name) {
  return ask(`/conversations/${encodeURIComponent(name)}`, { method: "DELETE" });
}

export async function* complete(body, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await ask("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const document = JSON.parse(data);
      if (document.error) throw new Refused(document.error.message, 500);
      yield document;
    }
  }
}
