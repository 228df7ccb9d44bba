// Starts the page: what is served, the tabs, the key.

import { ask, useKey } from "./api.js";
import { setUpAsk } from "./ask.js";
import { setUpDraw } from "./draw.js";
import { setUpLens } from "./lens.js";
import { $, failed } from "./parts.js";
import { setUpRun } from "./run.js";

const tabs = [...document.querySelectorAll('[role="tab"]')];

function open(tab) {
  for (const each of tabs) {
    const chosen = each === tab;
    each.setAttribute("aria-selected", chosen);
    each.tabIndex = chosen ? 0 : -1;
    $(each.getAttribute("aria-controls")).hidden = !chosen;
  }
  history.replaceState(null, "", `#${tab.getAttribute("aria-controls")}`);
  document.dispatchEvent(new Event("tab"));
}

for (const tab of tabs) {
  tab.addEventListener("click", () => open(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
    next.focus();
    open(next);
  });
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key").value.trim());
  start();
});

async function start() {
  let model;
  try {
    model = (await (await ask("/v1/models")).json()).data[0];
  } catch (error) {
    $("key-form").hidden = error.status !== 401;
    $("facts").replaceChildren(failed(error));
    return;
  }
  $("key-form").hidden = true;
  const served = model.ett;
  const [height, width] = served.image_size;
  const tokens = (height / served.downsample) * (width / served.downsample);
  $("model").textContent = model.id;
  document.title = `ett · ${model.id}`;
  $("facts").textContent = `${width} × ${height} pixels, ${tokens.toLocaleString("en")} tokens a picture, ` +
    `${served.codebook_size.toLocaleString("en")} codes`;
  if (!served.chats) {
    $("tab-ask").hidden = $("tab-draw").hidden = true;
  }
  setUpAsk(served);
  setUpDraw(served);
  setUpLens(served);
  setUpRun(served);
  const wanted = tabs.find((tab) => `#${tab.getAttribute("aria-controls")}` === location.hash && !tab.hidden);
  open(wanted ?? tabs.find((tab) => !tab.hidden));
}

start();
