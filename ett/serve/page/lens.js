// The tokenizer's lens: a picture, what comes back from its indices, the difference, and the indices themselves.

import { ask } from "./api.js";
import { $, element, failed, picker, png } from "./parts.js";

const NUMBERED = 16; // columns up to which a code's number fits into its cell on a wide screen
const NUMBERED_SMALL = 8; // and on a phone

let shown = null; // what is on the page: images by name, indices after and before tuning
let asked = 0;

export function setUpLens(served) {
  picker($("lens-picker"), (url) => look(url, served.initial));
  $("difference-of").addEventListener("change", drawDifference);
  $("amplified").addEventListener("change", drawDifference);
  $("indices-of").addEventListener("change", drawCodes);
  $("codes").addEventListener("click", (event) => {
    const cell = event.target.closest("span");
    if (cell) choose([...$("codes").children].indexOf(cell));
  });
  $("codes").addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -shown.width, ArrowDown: shown.width }[event.key];
    if (!step) return;
    event.preventDefault();
    choose(Math.min(shown.after.length - 1, Math.max(0, shown.chosen + step)));
  });
}

async function look(url, initial) {
  const number = ++asked;
  const hint = $("lens-hint");
  hint.textContent = "Looking ";
  hint.className = "hint waiting";
  try {
    const found = await (await ask("/v1/images/reconstructions", { body: { image: url, initial } })).json();
    const after = found.data[0];
    const images = { original: found.original, "after tuning": after };
    if (found.initial) images["before tuning"] = found.initial;
    const loaded = {};
    for (const [name, each] of Object.entries(images)) loaded[name] = await opened(png(each.b64_json));
    if (number !== asked) return; // another picture was chosen meanwhile
    hint.textContent = `${found.width} × ${found.height} pixels, as the model works on it.`;
    shown = { loaded, width: after.indices[0].length, after: after.indices.flat(), before: found.initial?.indices.flat(),
      chosen: 0 };
    draw(images, found);
  } catch (error) {
    hint.replaceChildren(failed(error));
    $("lens-result").hidden = true;
  } finally {
    hint.classList.remove("waiting");
  }
}

function opened(url) {
  const image = new Image();
  image.src = url;
  return image.decode().then(() => image);
}

function draw(images, found) {
  const order = ["original", "before tuning", "after tuning"].filter((name) => name in images);
  const alone = !found.initial;
  const title = (name) => (alone && name === "after tuning" ? "reconstruction" : name);
  const figures = order.map((name) => {
    const each = images[name];
    const figures = each.psnr === undefined ? "" : `${each.psnr.toFixed(2)} dB, SSIM ${each.ssim.toFixed(3)}`;
    shown.loaded[name].alt = title(name);
    return element("figure", {}, caption(title(name), figures), shown.loaded[name]);
  });
  const canvas = element("canvas", { id: "difference" });
  canvas.setAttribute("role", "img");
  figures.push(element("figure", {}, caption("difference", ""), canvas));
  $("versions").replaceChildren(...figures);
  const pairs = [["original", "after tuning"]];
  if (!alone) pairs.push(["original", "before tuning"], ["before tuning", "after tuning"]);
  options($("difference-of"), pairs.map((pair) => [pair.join("|"), pair.map(title).join(" and ")]));
  options($("indices-of"), alone ? [["after", "all"]] : [["after", "after tuning"], ["before", "before tuning"]]);
  $("indices-fields").hidden = alone;
  $("lens-result").hidden = false;
  const count = shown.after.length;
  const rows = count / shown.width;
  let words = `${rows} × ${shown.width} tokens, each one of ${found.codebook_size.toLocaleString("en")} codes.`;
  if (found.width * rows !== found.height * shown.width) words += " The margin that fills the canvas has tokens too.";
  if (shown.before) {
    const changed = shown.after.filter((index, i) => index !== shown.before[i]).length;
    words += ` Tuning changed ${changed} of ${count} (${Math.round((100 * changed) / count)}\u00a0%); these are marked.`;
  }
  $("indices-summary").textContent = words;
  drawDifference();
  drawCodes();
}

function caption(name, figures) {
  const text = name[0].toUpperCase() + name.slice(1);
  return element("figcaption", {}, text, element("span", { textContent: figures }));
}

function options(select, pairs) {
  const kept = select.value;
  select.replaceChildren(...pairs.map(([value, text]) => element("option", { value, textContent: text })));
  if (pairs.some(([value]) => value === kept)) select.value = kept;
}

function pixels(image) {
  const canvas = element("canvas", { width: image.naturalWidth, height: image.naturalHeight });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

function drawDifference() {
  const names = $("difference-of").value.split("|");
  const [first, second] = names.map((name) => pixels(shown.loaded[name]));
  const times = Number($("amplified").value);
  const result = new ImageData(first.width, first.height);
  let sum = 0;
  for (let i = 0; i < first.data.length; i += 1) {
    if (i % 4 === 3) {
      result.data[i] = 255;
      continue;
    }
    const apart = Math.abs(first.data[i] - second.data[i]);
    sum += apart;
    result.data[i] = 255 - Math.min(255, times * apart);
  }
  const canvas = $("difference");
  canvas.width = first.width;
  canvas.height = first.height;
  canvas.getContext("2d").putImageData(result, 0, 0);
  const mean = (sum / (0.75 * first.data.length)).toFixed(1);
  canvas.setAttribute("aria-label", `difference, mean ${mean} of 255`);
  canvas.parentElement.querySelector("span").textContent = `mean ${mean} of 255`;
}

// A colour for each code: neighbours in the codebook are no neighbours in colour, light enough for dark figures on it.
function colour(index) {
  const hue = (index * 137.508) % 360;
  const light = 68 + ((index * 7) % 5) * 5;
  return `hsl(${hue.toFixed(1)} 62% ${light}%)`;
}

function drawCodes() {
  const indices = $("indices-of").value === "before" ? shown.before : shown.after;
  const grid = $("codes");
  grid.style.gridTemplateColumns = `repeat(${shown.width}, minmax(0, 1fr))`;
  grid.classList.toggle("dense", shown.width > NUMBERED);
  grid.classList.toggle("many", shown.width > NUMBERED_SMALL);
  grid.replaceChildren(...indices.map((index, i) => {
    const cell = element("span", { textContent: index, title: describe(i) });
    cell.style.backgroundColor = colour(index);
    if (shown.before && shown.before[i] !== shown.after[i]) cell.className = "changed";
    return cell;
  }));
  grid.setAttribute("aria-label", `grid of ${indices.length} indices; arrow keys walk through them`);
  choose(shown.chosen);
}

function describe(i) {
  const place = `Row ${Math.floor(i / shown.width) + 1}, column ${(i % shown.width) + 1}`;
  if (!shown.before) return `${place}: code ${shown.after[i]}`;
  if (shown.before[i] === shown.after[i]) return `${place}: code ${shown.after[i]}, before and after tuning`;
  return `${place}: code ${shown.before[i]} before tuning, ${shown.after[i]} after`;
}

function choose(i) {
  $("codes").querySelector(".chosen")?.classList.remove("chosen");
  shown.chosen = i;
  $("codes").children[i].classList.add("chosen");
  $("code-said").textContent = describe(i);
}
