// The tab that asks about a picture.

import { ask, events } from "./api.js";
import { $, element, failed, picker } from "./parts.js";

let picture = null;

export function setUpAsk(served) {
  picker($("ask-picker"), (url) => { picture = url; });
  $("ask-length").max = served.max_new_tokens;
  $("ask-form").addEventListener("submit", (event) => {
    event.preventDefault();
    answer($("question").value.trim());
  });
}

async function answer(question) {
  if (!picture && !question) {
    $("question").focus();
    return;
  }
  const said = element("p", { className: "answer waiting" });
  const note = element("p", { className: "unit" });
  const exchange = element("div", { className: "exchange" });
  if (picture) exchange.append(element("img", { src: picture, alt: "the picture asked about" }));
  const asked = element("p", { className: "question", textContent: question || "(describe)" });
  exchange.append(element("div", {}, asked, said, note));
  $("answers").querySelector(".hint")?.remove();
  $("answers").prepend(exchange);

  const content = [];
  if (picture) content.push({ type: "image_url", image_url: { url: picture } });
  if (question) content.push({ type: "text", text: question });
  const body = { messages: [{ role: "user", content }], stream: true, stream_options: { include_usage: true },
    max_completion_tokens: Number($("ask-length").value) || 1, temperature: Number($("ask-temperature").value) || 0 };
  const stopping = new AbortController();
  const button = $("ask-form").querySelector(".main");
  button.disabled = true;
  $("ask-stop").hidden = false;
  $("ask-stop").onclick = () => stopping.abort();
  const started = performance.now();
  try {
    const response = await ask("/v1/chat/completions", { body, signal: stopping.signal });
    for await (const chunk of events(response)) {
      said.textContent += chunk.choices[0]?.delta.content ?? "";
      if (chunk.usage) {
        const seconds = ((performance.now() - started) / 1000).toFixed(1);
        note.textContent = `${chunk.usage.completion_tokens} tokens in ${seconds} s`;
      }
    }
    if (!said.textContent) said.textContent = "(nothing)";
  } catch (error) {
    if (error.name === "AbortError") note.textContent = "stopped";
    else said.replaceWith(failed(error));
  } finally {
    said.classList.remove("waiting");
    button.disabled = false;
    $("ask-stop").hidden = true;
  }
}
