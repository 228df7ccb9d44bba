// Small pieces that the tabs share: elements, errors, choosing a picture.

export const $ = (id) => document.getElementById(id);

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

export function failed(error) {
  return element("p", { className: "error", role: "alert", textContent: error.message });
}

export const png = (base64) => `data:image/png;base64,${base64}`;

const LONGEST = 2048; // side of a picture that is sent [pixels]; the model's own is smaller still
const SENT_AS_IT_IS = 1 << 20; // bytes

// A data URL of a file. Phones take pictures of ten megabytes: what is large is shrunk here, before it travels.
async function dataUrl(file) {
  const read = new FileReader();
  const whole = new Promise((resolve, reject) => {
    read.onload = () => resolve(read.result);
    read.onerror = () => reject(new Error(`${file.name} cannot be read.`));
  });
  read.readAsDataURL(file);
  const url = await whole;
  if (file.size <= SENT_AS_IT_IS) return url;
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (!bitmap) return url; // not for this browser: the server says what it thinks of it
  const scale = Math.min(1, LONGEST / Math.max(bitmap.width, bitmap.height));
  const canvas = element("canvas", { width: Math.max(1, Math.round(bitmap.width * scale)),
    height: Math.max(1, Math.round(bitmap.height * scale)) });
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.95);
}

// Makes `box` a place to choose, drop or paste a picture; `chosen` is called with its data URL.
export function picker(box, chosen) {
  const input = element("input", { type: "file", accept: "image/*", id: `${box.id}-file` });
  const image = element("img", { alt: "the chosen picture", hidden: true });
  const said = element("p", { textContent: "or drop or paste one" });
  const label = element("label", { htmlFor: input.id, textContent: "Choose a picture" });
  box.append(image, element("div", {}, input, label, said));

  async function take(file) {
    if (!file) return;
    try {
      const url = await dataUrl(file);
      image.src = url;
      image.hidden = false;
      said.textContent = file.name || "pasted";
      chosen(url);
    } catch (error) {
      said.textContent = error.message;
    }
  }

  input.addEventListener("change", () => take(input.files[0]));
  box.addEventListener("dragover", (event) => { event.preventDefault(); box.classList.add("over"); });
  box.addEventListener("dragleave", () => box.classList.remove("over"));
  box.addEventListener("drop", (event) => {
    event.preventDefault();
    box.classList.remove("over");
    take(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => {
    if (box.offsetParent !== null) take(event.clipboardData.files[0]);
  });
}
