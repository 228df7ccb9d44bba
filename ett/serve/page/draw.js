// The tab that draws from a prompt.

import { ask } from "./api.js";
import { $, element, failed, png } from "./parts.js";

export function setUpDraw(served) {
  $("draw-unable").hidden = served.draws;
  $("draw-form").parentElement.hidden = !served.draws;
  $("draw-count").max = served.max_images;
  $("draw-form").addEventListener("submit", (event) => {
    event.preventDefault();
    draw($("prompt").value.trim());
  });
}

async function draw(prompt) {
  const body = { prompt, n: Number($("draw-count").value) || 1 };
  for (const name of ["seed", "guidance", "temperature"]) {
    const given = $(`draw-${name}`).value;
    if (given !== "") body[name] = Number(given);
  }
  const waiting = element("p", { className: "hint waiting", textContent: `Drawing ${prompt} ` });
  const results = $("drawings");
  results.querySelector(".hint")?.remove();
  results.prepend(waiting);
  const stopping = new AbortController();
  const button = $("draw-form").querySelector(".main");
  button.disabled = true;
  $("draw-stop").hidden = false;
  $("draw-stop").onclick = () => stopping.abort();
  try {
    const drawn = await (await ask("/v1/images/generations", { body, signal: stopping.signal })).json();
    const figures = drawn.data.map((each) => {
      const image = element("img", { src: png(each.b64_json), alt: prompt });
      return element("figure", {}, element("a", { href: image.src, download: "drawn.png", title: "save" }, image));
    });
    waiting.replaceWith(element("div", {}, element("p", { textContent: prompt }),
      element("div", { className: "drawn" }, ...figures)));
  } catch (error) {
    if (error.name === "AbortError") waiting.remove();
    else waiting.replaceWith(failed(error));
  } finally {
    button.disabled = false;
    $("draw-stop").hidden = true;
  }
}
