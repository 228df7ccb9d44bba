// Requests to this server, with the API key where it wants one. Everything here is also open to other clients.

const KEY = "ett-api-key";

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

// A successful response (304 among them), or an ApiError with the server's own words.
export async function ask(path, { body, headers = {}, signal } = {}) {
  const sent = { ...headers };
  const key = sessionStorage.getItem(KEY);
  if (key) sent.Authorization = `Bearer ${key}`;
  if (body !== undefined) sent["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body === undefined ? "GET" : "POST", headers: sent,
      body: body === undefined ? undefined : JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached.");
  }
  if (response.ok || response.status === 304) return response;
  const said = await response.json().catch(() => ({}));
  throw new ApiError(response.status, said.error?.message ?? `The server answered ${response.status}.`);
}

// The objects of a stream of server-sent events, one by one.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const whole = text.split("\n\n");
    text = whole.pop();
    for (const event of whole) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const object = JSON.parse(data);
      if (object.error) throw new ApiError(500, object.error.message);
      yield object;
    }
  }
}
