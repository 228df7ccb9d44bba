// The tab that shows a run's report, and keeps it up to date while the run trains.

import { ask } from "./api.js";
import { $, failed } from "./parts.js";

const PAUSE = 3000; // between two looks [milliseconds]

let tag = null;

export function setUpRun(served) {
  $("run-unable").hidden = served.run;
  $("run-state").hidden = !served.run;
  if (!served.run) return;
  const root = $("report").attachShadow({ mode: "open" });
  const look = async () => {
    if ($("run").hidden || document.hidden || (tag && !$("run-live").checked)) return;
    try {
      const response = await ask("/run/report", { headers: tag ? { "If-None-Match": tag } : {} });
      if (response.status !== 304) {
        show(root, await response.text());
        tag = response.headers.get("ETag");
      }
      $("run-said").textContent = `as of ${new Date().toLocaleTimeString()}`;
    } catch (error) {
      $("run-said").replaceChildren(failed(error));
    }
  };
  const again = async () => {
    await look();
    setTimeout(again, PAUSE);
  };
  document.addEventListener("tab", look);
  again();
}

// The report's own style and content, apart from this page's; what was unfolded stays so.
function show(root, html) {
  const report = new DOMParser().parseFromString(html, "text/html");
  const open = new Set([...root.querySelectorAll("details[open] > summary")].map((each) => each.textContent));
  const main = report.querySelector("main");
  main.style.padding = "0";
  for (const each of main.querySelectorAll("details")) {
    each.open = open.has(each.querySelector("summary").textContent);
  }
  root.replaceChildren(...report.querySelectorAll("style"), main);
}
